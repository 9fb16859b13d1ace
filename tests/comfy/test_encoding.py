"""Several images and captions to a call of ComfyUI's encoders, a stretch of batches ahead of their use."""

import threading

import folder_paths
import pytest
import torch
from comfyui_softrepa.softrepa.comfy.data import encoding, folder_encodings
from comfyui_softrepa.softrepa.comfy.data.assembly import dataset_of_folder
from comfyui_softrepa.softrepa.data.inputs import DatasetInputs

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
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", str(tmp_path / "user"))
    benchmark.make_folder(tmp_path / "coco", 40)
    return tmp_path / "coco"


def read(folder, clips, vae, cache_gb=1.0):
    return dataset_of_folder(folder, "coco", clips["CLIP-L"], vae, DatasetInputs(64, cache_gb=cache_gb))


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


def test_text_is_kept_in_the_half_precision_that_holds_it():
    def kept(tensor):
        return encoding.stored_text({"cross_attn": tensor, "pooled_output": None})["cross_attn"].dtype

    assert kept(torch.tensor([1 / 3])) == torch.float16
    assert kept(torch.tensor([1 / 3]).bfloat16().float()) == torch.bfloat16
    assert kept(torch.tensor([1e6 / 3])) == torch.float32


@pytest.mark.parametrize("cache_gb", [0.0, 0.0003, 1.0])
def test_batches_do_not_depend_on_the_cache(folder, clips, vae, monkeypatch, cache_gb):
    expected = read(folder, clips, vae).started(5)
    expected = [expected.batch(4, 1, 5) for _ in range(12)]
    monkeypatch.setattr(folder_encodings, "UP_FRONT", 100)
    monkeypatch.setattr(folder_paths, "user_directory", str(folder / "other user"))
    data = read(folder, clips, vae, cache_gb)
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
    size = sum(path.stat().st_size for path in (folder / "other user").rglob("*.safetensors"))
    assert size <= cache_gb * 1e9
    log.clear()
    resumed = read(folder, clips, vae, cache_gb).started(5)
    resumed.restore(view.state() | {"index": view.state()["index"] - 1})
    assert equal(resumed.batch(4, 1, 5), expected[-1])
    assert bool(log) == (cache_gb < 1)


def test_processes_divide_what_is_encoded(folder, clips, vae, monkeypatch):
    """Two that draw the same batches and share the folder of the cache; ComfyUI's encoders serve one at a time."""
    expected = read(folder, clips, vae).started(1)
    expected = [expected.batch(4) for _ in range(8)]
    monkeypatch.setattr(folder_encodings, "UP_FRONT", 10)
    monkeypatch.setattr(folder_encodings, "LEAST_PATIENCE", 300.0)
    monkeypatch.setattr(folder_paths, "user_directory", str(folder / "other user"))
    alone, counts, failures = threading.Lock(), {}, []
    real = folder_encodings.encode_captions

    def counted(clip, captions):
        with alone, torch.inference_mode():
            counts[threading.current_thread().name] = counts.get(threading.current_thread().name, 0) + len(captions)
            return real(clip, captions)

    monkeypatch.setattr(folder_encodings, "encode_captions", counted)
    views = [read(folder, clips, vae).started(1) for _ in range(2)]

    def draw(rank):
        try:
            views[rank].encodings.share = (rank, 2)
            for step, batch in enumerate(expected):
                assert equal(views[rank].batch(4, left=8 - step), batch)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=draw, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert sorted(counts) == ["0", "1"]
    assert sum(counts.values()) == len({caption for batch in expected for caption in batch.captions})


def test_an_image_that_goes_away_stops_the_batch_that_needs_it(folder, clips, vae, monkeypatch):
    monkeypatch.setattr(folder_encodings, "UP_FRONT", 10)
    data = read(folder, clips, vae, 0.0)
    view = data.started(0)
    names = [view.batch(4).keys for _ in range(6)]
    (folder / names[4][0]).unlink()
    view = data.started(0)
    assert [view.batch(4, left=6).keys for _ in range(4)] == names[:4]
    with pytest.raises(folder_encodings.UnusableImageError, match="cannot be used any more"):
        view.batch(4, left=2)


def test_the_benchmark_of_a_large_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(folder_paths, "user_directory", folder_paths.get_user_directory())
    found = benchmark.measure(tmp_path, None, images=250, steps=20, cache_mb=0.5, rounds=0)
    assert found["the same first batch"] is True
    assert found["the same batch where it goes on"] is True
    assert found["cache, MB"] <= 0.5
    assert "250 of 250 images and 1250 of 1250 captions" in found["told"]
