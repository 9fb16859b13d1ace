"""Captions, folders and caches of any content: what is read is right, the rest is left out with a reason."""

import json

import torch
from comfyui_softrepa.softrepa.data.cache import Cache
from comfyui_softrepa.softrepa.data.folder import ImageFolder, read_folder
from hypothesis import given
from hypothesis import strategies as st
from softrepa_tests.properties import EDITS, TEXT, bounded, edited

from benchmarks.fuzz import outcome
from benchmarks.mutations import PICTURES, write_pictures


def read(root, index="index.json") -> ImageFolder:
    return read_folder(root / "data", "data", 64, False, 0.0, root / index)


def captions_of(found: ImageFolder) -> dict[str, list[str]]:
    return {example.name: list(example.captions) for example in found.train}


@bounded
@given(st.sampled_from(["2.txt", "2.png.txt"]), st.lists(TEXT, unique_by=str.strip, max_size=5), st.booleans())
def test_every_line_of_a_text_is_a_caption(tmp_path, name, lines, is_windows):
    for old in (tmp_path / "data").glob("2.*"):
        old.unlink()
    write_pictures(tmp_path / "data")
    (tmp_path / "data" / "2.caption").unlink()
    content = ("\r\n" if is_windows else "\n").join(lines)
    (tmp_path / "data" / name).write_bytes(content.removeprefix("\ufeff").encode())
    expected = [line.strip() for line in content.removeprefix("\ufeff").split("\n") if line.strip()]
    assert captions_of(read(tmp_path)).get("2.png", []) == expected


@bounded
@given(st.lists(TEXT.map(str.strip).filter(bool), min_size=3, max_size=3))
def test_a_table_gives_each_image_its_own_caption(tmp_path, texts):
    write_pictures(tmp_path / "data")
    for path in (tmp_path / "data").rglob("*.caption"):
        path.unlink()
    rows = [json.dumps({"file_name": name, "text": text}) for name, text in zip(PICTURES, texts, strict=True)]
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(rows), encoding="utf-8")
    assert captions_of(read(tmp_path)) == {name: [text] for name, text in zip(PICTURES, texts, strict=True)}


@bounded
@given(st.integers(0, 2**32))
def test_damaged_captions_and_tables(number):
    assert outcome("captions", number) in ("used", "refused")


@bounded
@given(EDITS)
def test_an_index_that_is_damaged_changes_nothing(tmp_path, edits):
    write_pictures(tmp_path / "data")
    expected = read(tmp_path, "whole.json")
    content = (tmp_path / "whole.json").read_bytes()
    (tmp_path / "index.json").write_bytes(edited(content, edits))
    assert captions_of(read(tmp_path)) == captions_of(expected)


@bounded
@given(EDITS)
def test_a_damaged_entry_of_the_cache_is_none(tmp_path, edits):
    cache, tensors = Cache(tmp_path, 10**6), {"latent": torch.arange(60.0).view(3, 4, 5)}
    assert cache.write("a/b", tensors)
    cache.flush()
    (path,) = tmp_path.glob("a/*.safetensors")
    path.write_bytes(edited(path.read_bytes(), edits))
    cache.survey([])
    found = cache.read("a/b")
    path.unlink()
    assert found is None or torch.equal(found["latent"], tensors["latent"])
    assert cache.has("a/b") == (found is not None)
