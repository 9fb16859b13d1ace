"""What the property tests share: how many examples they draw, and damage to the content of a file."""

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

bounded = settings(
    max_examples=60,
    deadline=None,  # what a machine's speed is has no place in a test
    derandomize=True,  # `benchmarks.fuzz` looks for what nobody has seen; these always draw the same
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)

EDITS = st.lists(
    st.tuples(st.sampled_from(["flip", "cut", "drop", "insert"]), st.floats(0, 1), st.binary(min_size=1, max_size=8)),
    min_size=1,
    max_size=5,
)

TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=40)
"""Without control characters and lone surrogates."""


def edited(content: bytes, edits: list[tuple[str, float, bytes]]) -> bytes:
    data = bytearray(content)
    for kind, where, more in edits:
        place = int(where * len(data))
        match kind:
            case "flip":
                data[place : place + 1] = bytes(byte ^ more[0] for byte in data[place : place + 1])
            case "cut":
                del data[place:]
            case "drop":
                del data[place : place + len(more)]
            case "insert":
                data[place:place] = more
    return bytes(data)
