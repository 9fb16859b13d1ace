"""Encodings on disk: what has room, what makes room, and what of it is believed."""

import json
import os
import random
import threading
from pathlib import Path

import pytest
import torch
from comfyui_softrepa.softrepa.data.cache import Cache
from safetensors.torch import load, save


def entry(size=1000):
    return {"x": torch.arange(size, dtype=torch.float32)}


def surveyed(folder, limit, keep=()):
    cache = Cache(folder, limit)
    cache.survey(set(keep))
    return cache


def on_disk(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_cache_keeps_its_limit_and_drops_the_oldest(tmp_path):
    cache = surveyed(tmp_path, 20_000)
    for number, key in enumerate(("a/1", "a/2", "b/3")):
        assert cache.write(key, entry())
        os.utime(cache.path(key), (number, number))
    cache.survey({"a/1"})
    written = [cache.write(f"c/{i}", entry()) for i in range(5)]
    assert written == [True, True, True, False, False]
    assert [cache.has(key) for key in ("a/1", "a/2", "b/3")] == [True, False, False]
    assert cache.used == on_disk(tmp_path) <= 20_000
    assert not cache.has_room(4_000)
    assert cache.has_room(3_000)


def test_the_limit_alone_decides_how_much_has_room(tmp_path):
    cache = surveyed(tmp_path, 10**6)
    assert all(cache.write(str(i), entry(1000 * (i + 1))) for i in range(10))


def test_nothing_is_deleted_where_nothing_is_written(tmp_path):
    cache = surveyed(tmp_path, 10**6)
    for i in range(10):
        cache.write(str(i), entry())
    for limit in (0, 3_000):
        small = surveyed(tmp_path, limit)
        assert not small.write("new", entry())
        assert sum(small.has(str(i)) for i in range(10)) == 10
    small = surveyed(tmp_path, 9_000)
    assert [small.write(f"new {i}", entry()) for i in range(3)] == [True, True, False]
    assert not any(small.has(str(i)) for i in range(10))


def test_a_dataset_larger_than_the_limit_keeps_what_it_has(tmp_path):
    cache = surveyed(tmp_path, 9_000)
    assert [cache.write(str(i), entry()) for i in range(3)] == [True, True, False]
    cache.survey({"0", "1", "2"})
    assert not cache.write("2", entry())
    assert [cache.has(str(i)) for i in range(3)] == [True, True, False]


def test_damaged_entries_are_as_absent(tmp_path):
    cache = surveyed(tmp_path, 4_500)
    cache.write("k", entry())
    assert torch.equal(cache.read("k")["x"], entry()["x"])
    cache.path("k").write_bytes(cache.path("k").read_bytes()[:-10])
    cache.survey({"k"})
    assert cache.read("k") is None
    assert not cache.has("k")
    assert cache.write("k", entry())  # in the place of the damaged one
    assert torch.equal(cache.read("k")["x"], entry()["x"])
    assert cache.read("never") is None
    assert not list(tmp_path.rglob("*.tmp"))


def test_entries_that_cannot_be_used_are_gone_before_they_are_drawn(tmp_path):
    cache = surveyed(tmp_path, 9_000)
    cache.write("good", entry())
    cache.write("cut", entry())
    cache.path("cut").write_bytes(cache.path("cut").read_bytes()[:-10])
    bad = {"old": save(entry(1)), "other": save(entry(1), {"x": "y"}), "none": b"", "null": b"\4" + b"\0" * 7 + b"null"}
    for key, content in bad.items():
        cache.path(key).write_bytes(content)
    keys = {"good", "cut", *bad}
    cache.survey(keys)
    assert {key for key in keys if cache.has(key)} == {"good"}
    assert cache.used == on_disk(tmp_path)
    assert cache.write("cut", entry())  # in the room of what was of no use


def test_no_flipped_bit_is_believed(tmp_path):
    cache = surveyed(tmp_path, 10**6)
    tensors = {"cross_attn": torch.randn(1, 4, 8).half(), "pooled_output": torch.randn(1, 3)}
    cache.write("k", tensors)
    content = cache.path("k").read_bytes()
    rng = random.Random(0)
    for _ in range(1000):
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        cache.path("k").write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        found = cache.read("k")  # None, or a change that means nothing, as that of a blank
        assert found is None or all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert cache.has("k") == (found is not None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_believed(tmp_path, value):
    cache = surveyed(tmp_path, 10**6)
    cache.write("k", {"x": torch.tensor([1.0, value])})
    assert cache.read("k") is None


def test_files_of_others_are_not_believed(tmp_path):
    cache = surveyed(tmp_path, 10**6)
    for content in (b"", b"null", save(entry()), save(entry(), {"sha256": "0" * 64}), json.dumps({}).encode()):
        cache.path("k").write_bytes(content)
        assert cache.read("k") is None
    cache.write("k", entry())
    assert load(cache.path("k").read_bytes()).keys() == {"x"}


def test_entries_may_vanish_meanwhile(tmp_path, monkeypatch):
    cache = surveyed(tmp_path, 13_000)
    for i in range(3):
        cache.write(str(i), entry())
    real = Path.stat

    def deleting(path, **rest):
        if path.name == "1.safetensors":
            path.unlink(missing_ok=True)
        return real(path, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", deleting)
        cache.survey({"0", "1"})
    assert cache.used == on_disk(tmp_path)
    cache.path("2").unlink()
    cache.drop("2")
    assert cache.write("new", entry())
    assert cache.write("newer", entry())


def test_two_at_once_on_one_folder(tmp_path):
    failures = []

    def work(name):
        try:
            cache = Cache(tmp_path, 30_000)
            for i in range(60):
                cache.survey({f"{name} {i - 1}"})
                cache.write(f"{name} {i}", entry())
                cache.read(f"{name} {i}")
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert on_disk(tmp_path) <= 40_000  # each counts what the other wrote at its next look
