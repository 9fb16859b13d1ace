"""Several images and captions to a call of ComfyUI's encoders, a stretch of batches ahead of their use."""

import threading
from collections import Counter

import comfy.model_management as memory
import folder_paths
import pytest
import torch
from comfyui_softrepa.softrepa.comfy.data import encoding, folder_encodings
from comfyui_softrepa.softrepa.comfy.data.assembly import dataset_of_folder
from comfyui_softrepa.softrepa.data import folder
from comfyui_softrepa.softrepa.data.ahead import Needed
from comfyui_softrepa.softrepa.data.batches import Sampler
from comfyui_softrepa.softrepa.data.inputs import DatasetInputs
from PIL import Image

from benchmarks import encoding as benchmark

CAPTIONS = [f"{'a red cat beside ' * (number % 4 * 9)}a dog {number}" for number in range(11)]


@pytest.fixture(scope="module")
def clips():
    with torch.inference_mode():
        return {kind: benchmark.tiny_clip(kind) for kind in ("CLIP-L", "T5")}


@pytest.fixture(scope="module")
def vae():
    with torch.inference_mode():
        return benchmark.small_vae()


@pytest.fixture
def photos(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    benchmark.make_folder(tmp_path / "coco", 40)
    return tmp_path / "coco"


def read(photos, clips, vae, cache_gb=1.0):
    return dataset_of_folder(photos, "coco", clips["CLIP-L"], vae, DatasetInputs(64, cache_gb=cache_gb))


def equal(one, other) -> bool:
    return (
        one.captions == other.captions
        and torch.equal(one.latents, other.latents)
        and all(
            torch.equal(a["cross_attn"], b["cross_attn"]) and torch.equal(a["pooled_output"], b["pooled_output"])
            for a, b in zip(one.conds, other.conds, strict=True)
        )
    )


@pytest.mark.parametrize("kind", ["CLIP-L", "T5"])
def test_a_caption_is_encoded_as_alone_whatever_is_encoded_with_it(clips, kind):
    clip = clips[kind]
    part = next(clip.cond_stage_model.children())
    calls = []
    hook = part.register_forward_pre_hook(lambda module, args: calls.append([len(row) for row in args[0]]))
    together = encoding.encode_captions(clip, CAPTIONS)
    hook.remove()
    assert "encode" not in vars(part)
    usual = [rows for rows in calls if rows[0] == 77]
    assert {len(rows) for rows in usual} == {encoding.AT_ONCE}  # always of one shape
    assert all(len(rows) == 1 for rows in calls if rows[0] > 77)
    assert len(calls) < len(CAPTIONS)
    for caption, found in zip(CAPTIONS, together, strict=True):
        (alone,) = encoding.encode_captions(clip, [caption])
        assert torch.equal(found["cross_attn"], alone["cross_attn"])
        assert torch.equal(found["pooled_output"], alone["pooled_output"])
        plain = encoding.encode_caption(clip, caption)
        assert found["cross_attn"].shape == plain["cross_attn"].shape
        assert torch.allclose(found["cross_attn"], plain["cross_attn"], rtol=1e-4, atol=1e-5)
        assert torch.allclose(found["pooled_output"], plain["pooled_output"], rtol=1e-4, atol=1e-5)
    assert len({one["cross_attn"].shape[1] for one in together}) > 1


def test_an_encoder_that_fails_is_left_as_it_was(clips, monkeypatch):
    part = clips["CLIP-L"].cond_stage_model.clip_l
    monkeypatch.setattr(type(part), "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        encoding.encode_captions(clips["CLIP-L"], CAPTIONS)
    assert "encode" not in vars(part)


def test_images_are_encoded_the_same_whatever_is_encoded_with_them(vae):
    for side, most in ((64, 8), (512, 2), (1024, 1)):
        assert encoding.images_at_once(vae, (side, side)) == most
    pixels = list(torch.rand(8, 64, 64, 3))
    together = encoding.encode_images(vae, pixels, [""] * 8)
    for one, latent in zip(pixels, together, strict=True):
        assert torch.equal(encoding.encode_images(vae, [one], [""])[0], latent)


def test_one_image_alone_is_encoded_once(vae, monkeypatch):
    pixels, shapes, encode = torch.rand(64, 64, 3), [], vae.encode
    monkeypatch.setattr(vae, "encode", lambda batch: shapes.append(tuple(batch.shape)) or encode(batch))
    found = encoding.encode_image(vae, pixels, "a.png")
    assert shapes == [(1, 64, 64, 3)]
    assert torch.allclose(found, encoding.encode_images(vae, [pixels], [""])[0], atol=1e-4)
    monkeypatch.setattr(vae, "encode", lambda batch: torch.full((1, 4, 8, 8), torch.nan))
    with pytest.raises(ValueError, match=r"NaN or infinite values for a\.png"):
        encoding.encode_image(vae, pixels, "a.png")


def test_text_is_kept_in_the_half_precision_that_holds_it():
    def kept(tensor):
        return encoding.stored_text({"cross_attn": tensor, "pooled_output": None})["cross_attn"].dtype

    assert kept(torch.tensor([1 / 3])) == torch.float16
    assert kept(torch.tensor([1 / 3]).bfloat16().float()) == torch.bfloat16
    assert kept(torch.tensor([1e6 / 3])) == torch.float32


@pytest.mark.parametrize("cache_gb", [0.0, 0.0003, 1.0])
def test_batches_do_not_depend_on_the_cache(photos, clips, vae, monkeypatch, cache_gb):
    expected = read(photos, clips, vae).started(5)
    expected = [expected.batch(4, 1, 5) for _ in range(12)]
    monkeypatch.setattr(folder_encodings, "UP_FRONT", 100)
    monkeypatch.setattr(folder_paths, "user_directory", str(photos / "other user"))
    data = read(photos, clips, vae, cache_gb)
    assert "40 of 40 images and 200 of 200 captions are not encoded yet" in data.summary
    log = []
    for name in ("encode_images", "encode_captions"):
        real = getattr(folder_encodings, name)
        monkeypatch.setattr(folder_encodings, name, lambda *args, real=real, name=name: log.append(name) or real(*args))
    view, when = data.started(5), []
    for step, batch in enumerate(expected):
        before = len(log)
        found = view.batch(4, 1, 5, left=12 - step)
        assert equal(found, batch)
        assert all(
            torch.equal(a["cross_attn"], b["cross_attn"]) for a, b in zip(found.further, batch.further, strict=True)
        )
        if log[before:]:
            when.append(step)
            assert log[before:] == sorted(log[before:])  # first all captions, then all images
    assert when == [0, 8]
    size = sum(path.stat().st_size for path in (photos / "other user").rglob("*.safetensors"))
    assert size <= cache_gb * 1e9
    log.clear()
    resumed = read(photos, clips, vae, cache_gb).started(5)
    resumed.restore(view.state() | {"index": view.state()["index"] - 1})
    assert equal(resumed.batch(4, 1, 5), expected[-1])
    assert bool(log) == (cache_gb < 1)


@pytest.fixture
def counts(monkeypatch) -> Counter:
    """How many captions and images each thread encodes, by its name and that of the function."""
    alone, found = threading.Lock(), Counter()

    def counted(name):
        real = getattr(folder_encodings, name)

        def encode(encoder, given, *rest):
            with alone, torch.inference_mode():  # ComfyUI's encoders serve one at a time
                found[threading.current_thread().name, name] += len(given)
                return real(encoder, given, *rest)

        return encode

    for name in ("encode_captions", "encode_images"):
        monkeypatch.setattr(folder_encodings, name, counted(name))
    return found


def in_two(work) -> None:
    """`work(rank)` of two processes, here threads."""
    failures = []

    def caught(rank):
        try:
            work(rank)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=caught, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def divided(counts, captions: int, images: int, twice: int = 0) -> bool:
    """Whether both threads did a part, and what there is was encoded once, but for a few."""
    sums = [sum(counts[str(rank), name] for rank in range(2)) for name in ("encode_captions", "encode_images")]
    is_once = all(0 <= found - least <= twice for found, least in zip(sums, (captions, images), strict=True))
    return is_once and all(counts.values()) and len({rank for rank, _ in counts} - {"MainThread"}) == 2


@pytest.mark.parametrize("known", [folder.SMALL, 100])
def test_processes_divide_what_is_encoded(photos, clips, vae, monkeypatch, counts, known):
    """Two draw the same batches with one folder of the cache, and one of them has encoded something before.

    Files of more than `known` bytes are not read whole to know them apart.
    """
    expected = read(photos, clips, vae).started(1)
    expected = [expected.batch(4) for _ in range(8)]
    monkeypatch.setattr(folder, "SMALL", known)
    monkeypatch.setattr(folder_encodings, "UP_FRONT", 10)
    monkeypatch.setattr(folder_encodings, "LEAST_PATIENCE", 10.0)
    monkeypatch.setattr(folder_paths, "user_directory", str(photos / "other user"))
    views = [read(photos, clips, vae).started(1) for _ in range(2)]
    first, second = (next(one for one in views[0].train if one.name == expected[step].keys[0]) for step in (0, 1))
    views[0].encodings.latent(first)
    views[0].encodings.cond(expected[0].captions[1])
    views[1].encodings.latent(second)

    def draw(rank):
        views[rank].encodings.share = (rank, 2)
        for step, batch in enumerate(expected):
            assert equal(views[rank].batch(4, left=8 - step), batch)

    in_two(draw)
    captions, images = (
        len({one for batch in expected for one in getattr(batch, part)}) for part in ("captions", "keys")
    )
    assert divided(counts, captions - 1, images - 2, twice=3)


def test_processes_divide_what_is_encoded_before_the_first_step(photos, clips, vae, monkeypatch, counts):
    monkeypatch.setattr(folder_encodings, "LEAST_PATIENCE", 60.0)
    cache, inputs = [], DatasetInputs(64, cache_gb=1.0)

    def fill(rank):
        data = dataset_of_folder(photos, "coco", clips["CLIP-L"], vae, inputs, (rank, 2))
        assert "encoded and cached" in data.summary.splitlines()
        cache.append(data.encodings.cache)

    in_two(fill)
    assert divided(counts, 200, 40)
    assert {one.used for one in cache} == {sum(path.stat().st_size for path in cache[0].folder.rglob("*.safetensors"))}


def test_a_process_that_waits_for_encodings_can_be_interrupted(photos, clips, vae, monkeypatch):
    monkeypatch.setattr(folder_encodings, "UP_FRONT", 10)
    view = read(photos, clips, vae).started(1)
    view.encodings.share = (0, 2)
    waits = []

    def interrupt(seconds):
        waits.append(seconds)
        memory.interrupt_current_processing()

    monkeypatch.setattr(folder_encodings.time, "sleep", interrupt)
    with pytest.raises(memory.InterruptProcessingException):
        view.batch(4)
    assert len(waits) == 1  # or the signal that torchrun sends is heard when it kills


def test_an_image_that_goes_away_stops_the_batch_that_needs_it(photos, clips, vae, monkeypatch):
    monkeypatch.setattr(folder_encodings, "UP_FRONT", 10)
    data = read(photos, clips, vae, 0.0)
    view = data.started(0)
    names = [view.batch(4).keys for _ in range(6)]
    (photos / names[4][0]).unlink()
    view = data.started(0)
    assert [view.batch(4, left=6).keys for _ in range(4)] == names[:4]
    with pytest.raises(folder_encodings.UnusableImageError, match="cannot be used any more"):
        view.batch(4, left=2)


def test_what_an_encoder_gives_for_some_captions_alone_is_cached(photos, clips, vae, monkeypatch):
    """As HunyuanImage's does for text in quotes."""
    tokenize, encode, asked = encoding._tokens, encoding._encoded, []

    def tokens(clip, caption):
        asked.append(caption)
        return tokenize(clip, caption) | {"caption": caption}

    def encoded(clip, tokens):
        quotes = {"rest": {"conditioning_byt5small": torch.ones(1, 3, 4)}} if '"' in tokens.pop("caption") else {}
        return encode(clip, tokens) | quotes

    monkeypatch.setattr(encoding, "_tokens", tokens)
    monkeypatch.setattr(encoding, "_encoded", encoded)
    encodings = read(photos, clips, vae).encodings
    for caption in ('a sign "OPEN"', "a dog"):
        first = encodings.cond(caption)
        asked.clear()
        again = encodings.cond(caption)
        assert asked == []
        assert first.keys() == again.keys()
        assert ("rest" in again) == ('"' in caption)


def test_one_very_long_caption_makes_no_short_stretches(photos, clips, vae, monkeypatch):
    monkeypatch.setattr(folder_encodings, "UP_FRONT", 10)
    encodings = read(photos, clips, vae, 0.0).encodings
    for caption in ("a dog " * 1000, *map(str, range(50))):
        encodings.cond(caption)
    usual = sum(tensor.nbytes for tensor in encoding.stored_text(encodings.cond("a dog")).values())
    monkeypatch.setattr(folder_encodings, "MOST_HELD", 200 * usual)
    stretch = encodings.ahead([Needed([], [f"a cat {number}"]) for number in range(80)])
    assert len(stretch.texts) == 80


def test_a_large_damaged_image_costs_the_batches_that_have_it(photos, clips, vae, monkeypatch, caplog):
    """It shows when the image is first drawn, thousands of steps after the start perhaps."""
    monkeypatch.setattr(folder_encodings, "UP_FRONT", 10)
    Image.new("RGB", (900, 700), "red").save(photos / "train" / "0.bmp")
    (photos / "train" / "0.bmp").write_bytes((photos / "train" / "0.bmp").read_bytes()[:-1000])
    (photos / "train" / "0.txt").write_text("a large one", encoding="utf-8")
    data = read(photos, clips, vae)
    assert (len(data), data.train[0].name) == (41, "train/0.bmp")
    assert torch.equal(data.first_latent(), data.encodings.latent(data.train[1]))
    sampler = Sampler(data.train, 3)
    drawn = [[one.name for one, _ in sampler.next(4)] for _ in range(20)]
    whole = [names for names in drawn if "train/0.bmp" not in names]
    assert 0 < len(drawn) - len(whole) < 4
    view = data.started(3)
    assert [view.batch(4, left=20).keys for _ in whole] == whole
    assert "a batch is left out: Dataset" in caplog.text
    resumed = data.started(3)
    resumed.restore(view.state())
    assert resumed.batch(4).keys == view.batch(4).keys
    assert len(list(data.started(3).one_epoch(4))) == 9


def test_the_benchmark_of_a_large_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", folder_paths.get_user_directory())
    found = benchmark.measure(tmp_path, None, images=250, steps=20, cache_mb=0.5, rounds=0)
    assert found["the same first batch"] is True
    assert found["the same batch where it goes on"] is True
    assert found["cache, MB"] <= 0.5
    assert "250 of 250 images and 1250 of 1250 captions" in found["told"]
