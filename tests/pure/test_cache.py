"""Encodings on disk: what has room, what makes room, and what of it is believed."""

import json
import os
import random
import threading
from pathlib import Path

import pytest
import torch
from comfyui_softrepa.softrepa.data import cache as cache_module
from comfyui_softrepa.softrepa.data.cache import Cache
from safetensors.torch import load, save

PLAIN = 4_300
"""Bytes of a shard that holds one `entry`, about."""


def entry(size=1000):
    return {"x": torch.arange(size, dtype=torch.float32)}


def surveyed(folder, limit, keep=()):
    cache = Cache(folder, limit)
    cache.survey(keep)
    return cache


def written(cache, key, tensors=None) -> bool:
    """In a shard of its own."""
    has_room = cache.write(key, tensors or entry())
    cache.flush()
    return has_room


def shards(folder) -> list[Path]:
    return sorted(folder.rglob("*.safetensors"))


def on_disk(folder) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def test_many_entries_lie_in_few_files(tmp_path, monkeypatch):
    cache = surveyed(tmp_path, 10**7)
    for i in range(50):
        assert cache.write(f"text/{i % 2}/{i}", entry(i))
    assert not shards(tmp_path)
    assert torch.equal(cache.read("text/1/7")["x"], entry(7)["x"])  # while it waits
    cache.flush()
    assert len(shards(tmp_path)) == 2
    for one in (cache, surveyed(tmp_path, 10**7)):
        assert all(torch.equal(one.read(f"text/{i % 2}/{i}")["x"], entry(i)["x"]) for i in range(50))
        assert not one.has("text/0/1")
        assert one.used == on_disk(tmp_path)
    monkeypatch.setattr(cache_module, "SHARD", 3 * PLAIN)
    for i in range(9):
        cache.write(f"latent/{i}", entry())
    assert len(shards(tmp_path / "latent")) >= 2  # full ones are written by themselves
    monkeypatch.setattr(cache_module, "SHARD_ENTRIES", 2)
    cache.write("few/1", entry(1))
    cache.write("few/2", entry(1))
    assert len(shards(tmp_path / "few")) == 1
    assert load(shards(tmp_path / "few")[0].read_bytes()).keys() == {"1", "2"}


def test_what_waits_is_lost_alone(tmp_path, monkeypatch):
    cache = surveyed(tmp_path, 10**7)
    written(cache, "a/1")
    cache.write("a/2", entry())

    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache_module, "write_atomically", full)
    with pytest.raises(OSError, match="No space"):
        cache.flush()
    assert [cache.has("a/1"), cache.has("a/2")] == [True, False]
    assert cache.used == on_disk(tmp_path)


def test_the_cache_keeps_its_limit_and_drops_the_oldest(tmp_path):
    cache = surveyed(tmp_path, 4 * PLAIN + 200)
    for number, key in enumerate(("a/1", "a/2", "b/3")):
        assert written(cache, key)
        os.utime(shards(tmp_path / key[0])[-1], (number, number))
    cache.survey({"a/1"})
    new = [written(cache, f"c/{i}") for i in range(5)]
    assert new == [True, True, True, False, False]
    assert [cache.has(key) for key in ("a/1", "a/2", "b/3")] == [True, False, False]
    assert cache.used == on_disk(tmp_path) <= 4 * PLAIN + 200


def test_the_limit_alone_decides_how_much_has_room(tmp_path):
    cache = surveyed(tmp_path, 10**6)
    assert all(cache.write(str(i), entry(1000 * (i + 1))) for i in range(10))


@pytest.mark.parametrize("flushing", [True, False])
def test_the_limit_is_kept_with_the_heads_of_the_shards(tmp_path, flushing):
    cache = surveyed(tmp_path, 50_000)
    while cache.write(f"text/name of the encoder/{'digest' * 10}{len(list(cache._waiting))}{cache.used}", entry(10)):
        if flushing:
            cache.flush()
    cache.flush()
    assert on_disk(tmp_path) == cache.used <= 50_000


def test_nothing_is_deleted_where_nothing_is_written(tmp_path):
    cache = surveyed(tmp_path, 10**6)
    for i in range(10):
        written(cache, str(i))
    for limit in (0, 3_000):
        small = surveyed(tmp_path, limit)
        assert not small.write("new", entry())
        assert sum(small.has(str(i)) for i in range(10)) == 10
    small = surveyed(tmp_path, 2 * PLAIN + 200)
    assert [written(small, f"new {i}") for i in range(3)] == [True, True, False]
    assert not any(small.has(str(i)) for i in range(10))


def test_a_dataset_larger_than_the_limit_keeps_what_it_has(tmp_path):
    cache = surveyed(tmp_path, 2 * PLAIN + 200)
    assert [written(cache, str(i)) for i in range(3)] == [True, True, False]
    cache.survey({"0", "1", "2"})
    assert not cache.write("2", entry())
    assert [cache.has(str(i)) for i in range(3)] == [True, True, False]


def test_a_shard_of_which_little_is_wanted_may_go(tmp_path):
    cache = surveyed(tmp_path, 10 * PLAIN)
    for key in "abcd":
        cache.write(f"x/{key}", entry())
    cache.flush()
    for wanted, stays in (("abc", True), ("a", False)):
        small = surveyed(tmp_path, 4 * PLAIN, {f"x/{key}" for key in wanted})
        assert written(small, "new") is not stays
        assert small.has("x/b") is stays


def test_damaged_entries_are_as_absent(tmp_path):
    cache = surveyed(tmp_path, 10**6)
    for key in ("k", "l"):
        cache.write(key, entry())
    cache.flush()
    (path,) = shards(tmp_path)
    damage(path)
    assert cache.read("l") is None
    assert not cache.has("l")
    assert torch.equal(cache.read("k")["x"], entry()["x"])
    assert cache.write("l", entry())  # found before the damaged one
    cache.flush()
    for one in (cache, surveyed(tmp_path, 10**6)):
        assert torch.equal(one.read("l")["x"], entry()["x"])
        assert one.read("never") is None
    assert not list(tmp_path.rglob("*.tmp"))


def test_files_that_cannot_be_used_are_the_first_to_go(tmp_path):
    cache = surveyed(tmp_path, 4 * PLAIN)
    written(cache, "x/good")
    written(cache, "x/cut")
    for path in shards(tmp_path):
        if "cut" in path.read_bytes()[:300].decode(errors="replace"):
            damage(path)
    bad = {
        "entry": save(entry(1000)),
        "shard-1": b"",
        "shard-2": b"\4" + b"\0" * 7 + b"null",
        "shard-3": save(entry(9), {"x": "y"}),
    }
    for name, content in bad.items():
        (tmp_path / f"{name}.safetensors").write_bytes(content)
    cache.survey({"x/good", "x/cut", "entry"})
    assert [cache.has(key) for key in ("x/good", "x/cut", "entry", "x")] == [True, False, False, False]
    assert cache.used == on_disk(tmp_path)
    assert all(written(cache, f"x/{i}") for i in range(3))
    assert cache.has("x/good")


@pytest.mark.parametrize(
    "head",
    [
        {"k": {"dtype": "U8", "shape": [4], "data_offsets": [0.0, 4.0]}},
        {"k": {"dtype": "U8", "shape": [4], "data_offsets": [-8, 4]}},
        {"k": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2**62]}},
        {"k": {"dtype": "U8", "shape": [4], "data_offsets": [4, 0]}},
        {"k": {"dtype": "U8", "shape": [4], "data_offsets": "04"}},
        {"k": [0, 4]},
        {},
        [],
    ],
)
def test_a_head_that_cannot_be_holds_nothing(tmp_path, head):
    text = json.dumps(head).encode()
    (tmp_path / "shard-0.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4)
    cache = surveyed(tmp_path, 10**6)
    assert not cache.has("k")
    assert cache.read("k") is None


def test_a_pipe_is_left_alone(tmp_path):
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "shard-0.safetensors")
    assert surveyed(tmp_path, 10**6).used == 0


def test_no_flipped_bit_is_believed(tmp_path):
    tensors = {"cross_attn": torch.randn(1, 4, 8).half(), "pooled_output": torch.randn(1, 3)}
    written(surveyed(tmp_path, 10**6), "k", tensors)
    (path,) = shards(tmp_path)
    content = path.read_bytes()
    rng = random.Random(0)
    for _ in range(1000):
        place, bit = rng.randrange(len(content)), 1 << rng.randrange(8)
        path.write_bytes(content[:place] + bytes([content[place] ^ bit]) + content[place + 1 :])
        cache = surveyed(tmp_path, 10**6)
        found = cache.read("k")  # None, or a change that means nothing, as that of a blank
        assert found is None or all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert cache.has("k") == (found is not None)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_no_number_is_not_believed(tmp_path, value):
    cache = surveyed(tmp_path, 10**6)
    cache.write("k", {"x": torch.tensor([1.0, value])})
    assert cache.read("k") is None


def test_entries_of_others_are_not_believed(tmp_path):
    cache = surveyed(tmp_path, 10**6)
    for content in (b"", b"null", save(entry()), save(entry(), {"sha256": "0" * 64}), json.dumps({}).encode()):
        head = json.dumps({"k": {"dtype": "U8", "shape": [len(content)], "data_offsets": [0, len(content)]}}).encode()
        (tmp_path / "shard-0.safetensors").write_bytes(len(head).to_bytes(8, "little") + head + content)
        cache.survey({"k"})
        assert cache.has("k")
        assert cache.read("k") is None


def test_files_may_vanish_meanwhile(tmp_path, monkeypatch):
    cache = surveyed(tmp_path, 3 * PLAIN + 200)
    for i in range(3):
        written(cache, f"{i}/{i}")
    real = Path.stat

    def deleting(path, **rest):
        if path.parent.name == "1":
            path.unlink(missing_ok=True)
        return real(path, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "stat", deleting)
        cache.survey({"0/0", "1/1"})
    assert cache.used == on_disk(tmp_path)
    shards(tmp_path / "2")[0].unlink()
    assert cache.read("2/2") is None
    assert written(cache, "new")
    assert written(cache, "newer")


def test_what_others_write_and_delete_is_seen(tmp_path):
    one, other = surveyed(tmp_path, 10**6), surveyed(tmp_path, 10**6)
    written(one, "a/1")
    written(one, "a/2")
    assert not other.has("a/1")
    other.refresh()
    assert torch.equal(other.read("a/1")["x"], entry()["x"])
    shards(tmp_path)[0].unlink()
    other.refresh()
    assert [other.has("a/1"), other.has("a/2")] == [False, True]
    assert other.used == on_disk(tmp_path)


def test_two_at_once_on_one_folder(tmp_path):
    failures = []

    def work(name):
        try:
            cache = Cache(tmp_path, 30_000)
            for i in range(60):
                cache.survey({f"{name} {i - 1}"})
                written(cache, f"{name} {i}")
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
