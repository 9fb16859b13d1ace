"""Token files, names and texts of any content: what is read is right, the rest is refused in a sentence."""

import math
import random

import pytest
import torch
from comfyui_softrepa.softrepa import pth, token_files
from comfyui_softrepa.softrepa.data.swaps import swaps
from comfyui_softrepa.softrepa.errors import SoftREPAError, is_plain, printable, shown
from comfyui_softrepa.softrepa.families import FAMILIES, format_blocks, parse_blocks
from comfyui_softrepa.softrepa.files import UnreadableError, parse_json
from comfyui_softrepa.softrepa.tokens import SoftTokens
from comfyui_softrepa.softrepa.training.timesteps import parse_timesteps
from hypothesis import given
from hypothesis import strategies as st
from softrepa_tests.properties import EDITS, TEXT, bounded, edited

from benchmarks.mutations import mutated_tokens, whole_token_files

WHOLE = whole_token_files()
ANY_TEXT = st.text(st.characters())
"""With lone surrogates and control characters."""


def loaded(path) -> SoftTokens | None:
    """None where it is refused as it should be."""
    try:
        tokens = token_files.load(path)
    except SoftREPAError as error:
        text = str(error)
        text.encode("utf-8")
        assert text == printable(text)
        assert len(text) < 1000
        assert "\n" not in text
        return None
    assert tokens.tokens.isfinite().all()
    summary = "\n".join(token_files.summary(tokens))
    assert summary == printable(summary)
    return tokens


@bounded
@given(st.sampled_from(sorted(WHOLE)), EDITS)
def test_damaged_token_files(tmp_path, name, edits):
    path = tmp_path / name
    path.write_bytes(edited(WHOLE[name], edits))
    loaded(path)


@bounded
@given(st.sampled_from(sorted(WHOLE)), st.integers(0, 2**32))
def test_token_files_that_are_put_together_wrongly(tmp_path, name, seed):
    path = tmp_path / name
    path.write_bytes(mutated_tokens(WHOLE[name], random.Random(seed)))
    loaded(path)


@bounded
@given(st.sampled_from(["any.safetensors", "any.pth", "dc_tokens.pth"]), st.binary(max_size=200))
def test_any_bytes(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content)
    assert loaded(path) is None


FEW = st.integers(0, 6) | st.just(-1)


@bounded
@given(st.lists(st.tuples(st.integers(0, 4), FEW), max_size=3), FEW, st.integers(0, 24))
def test_a_tensor_is_what_torch_makes_of_it_or_refused(along, offset, count):
    """Its numbers are in the file, and there is one for each place."""
    size, stride = (tuple(part) for part in zip(*along, strict=True)) if along else ((), ())
    numbers = torch.arange(count, dtype=torch.float32)
    tensor = pth.Strided(pth.Storage(torch.float32, "0", count), offset, size, stride)
    last = offset + sum((steps - 1) * step for steps, step in along)
    fits = min((0, offset, *stride)) >= 0 and 0 not in size and last < count and math.prod(size) <= count
    if fits:
        made = pth._made(tensor, numbers.numpy().tobytes())
        assert torch.equal(made, numbers.as_strided(size, stride, offset))
    else:
        with pytest.raises(UnreadableError):
            pth._made(tensor, numbers.numpy().tobytes())


@bounded
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.dictionaries(TEXT.filter(lambda key: key not in ("format", "format_version", "family", "blocks")), TEXT),
    st.booleans(),
)
def test_what_is_saved_is_loaded(tmp_path, layers, count, metadata, has_table):
    table = torch.randn(100, 8 * layers) if has_table else None
    tokens = SoftTokens.of(torch.randn(layers, count, 8), "sd3", layers, time_table=table, metadata=metadata)
    again = token_files.load(token_files.save(tokens, tmp_path / "a.safetensors"))
    assert torch.equal(again.tokens, tokens.tokens)
    assert again.time_table is None if table is None else torch.equal(again.time_table, table)
    assert again.metadata == {printable(key): printable(text) for key, text in metadata.items()}


@bounded
@given(ANY_TEXT)
def test_texts(text):
    made = printable(text)
    made.encode("utf-8")
    assert printable(made) == made
    if all(char in "\n\t" or is_plain(char) for char in text):
        assert made == text
    assert len(shown(text, 50)) <= 50
    assert "\n" not in shown(text)
    for read in (parse_json, parse_timesteps, swaps):
        try:
            read(text)
        except (SoftREPAError, UnreadableError) as error:
            str(error).encode("utf-8")


@bounded
@given(st.sampled_from(list(FAMILIES)), ANY_TEXT | st.text("downmidup, 0123456789", max_size=12))
def test_blocks(family, text):
    try:
        blocks = parse_blocks(text, FAMILIES[family], "Test")
    except SoftREPAError:
        return
    assert parse_blocks(format_blocks(blocks), FAMILIES[family], "Test") == blocks
    assert isinstance(blocks, int) == FAMILIES[family].is_layered


@bounded
@given(ANY_TEXT.map(lambda text: text.replace("/", "")).filter(lambda text: text not in ("", ".", "..")))
def test_names_of_files(tmp_path, name):
    assert loaded(tmp_path / f"{name}.safetensors") is None
    assert loaded(tmp_path / name / "tokens.pth") is None
