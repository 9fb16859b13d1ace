"""The one exception of the package."""

MOST_ECHOED = 200
"""Characters of an input that a message repeats."""


class SoftREPAError(ValueError):
    """A refusal: one sentence with the input's name, what was found and what was expected.

    Its text can always be encoded: ComfyUI logs it as UTF-8, and a lone surrogate in a log line ends its worker.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


def printable(text: str) -> str:
    """`text` with everything that cannot be encoded, or that a terminal would act on, written as an escape."""
    kept = (char if char.isprintable() or char in "\n\t" else ascii(char)[1:-1] for char in text)
    return "".join(kept)


def shown(value: object, most: int = MOST_ECHOED) -> str:
    """An input as a message repeats it, cut where it is longer than `most` characters."""
    text = printable(str(value))
    return text if len(text) <= most else text[: most - 3] + "..."
