"""Caption-Image Folder on a real ComfyUI: what is encoded, what is kept, and what happens when files change."""

import errno
import os
import re
import tarfile
from pathlib import Path
from types import SimpleNamespace

import comfy.model_management
import folder_paths
import pytest
import torch
from comfyui_softrepa.nodes import dataset as dataset_nodes
from comfyui_softrepa.softrepa import configuration
from comfyui_softrepa.softrepa.comfy import headless
from comfyui_softrepa.softrepa.comfy.data import dataset_folders, encoding, folder_encodings
from comfyui_softrepa.softrepa.comfy.identity import clip_identity, vae_identity
from comfyui_softrepa.softrepa.comfy.training.pairs import PairNetwork
from comfyui_softrepa.softrepa.data import images
from comfyui_softrepa.softrepa.data.cache import Cache
from comfyui_softrepa.softrepa.data.sources import WholeFile
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training.pairs import StepBatch
from PIL import Image
from softrepa_tests.conftest import ROOT

import nodes
from tools.standins import stand_in

CAPTIONS = ("a (very) red square", "blue", "green (left) and grey", "something yellow")
COLOURS = ((200, 20, 20), (10, 10, 220), (20, 160, 60), (230, 220, 40))
SIDE = 64

Folder, FromLatents = dataset_nodes.NODES


@pytest.fixture(scope="module")
def encoders():
    """CLIP and VAE of the SD1.5 stand-in, by the stock loader."""
    checkpoint = stand_in("sd15").checkpoint
    folder_paths.add_model_folder_path("checkpoints", str(checkpoint.parent))
    with torch.inference_mode():
        _, clip, vae = nodes.CheckpointLoaderSimple().load_checkpoint(checkpoint.name)
    return clip, vae


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """input/photos with four captioned pictures, in folders of this test alone."""
    for kind in ("input", "user"):
        (tmp_path / kind).mkdir()
        monkeypatch.setattr(folder_paths, f"{kind}_directory", str(tmp_path / kind))
    root = tmp_path / "input" / "photos"
    root.mkdir()
    for number, (caption, colour) in enumerate(zip(CAPTIONS, COLOURS, strict=True)):
        image = Image.new("RGB", (90, 70), colour)
        image.paste((250, 250, 250), (30, 20, 50, 40))
        image.save(root / f"{number}.png")
        (root / f"{number}.txt").write_text(caption, encoding="utf-8")
    return root


@pytest.fixture
def encoded(encoders, monkeypatch):
    """What the encoders are asked for, as it happens: captions but the empty one, and "image" for each other image."""
    clip, vae = encoders
    asked = []
    tokenize, encode = clip.tokenize, vae.encode

    def encoding(pixels):
        asked.extend(["image"] * len({one.numpy().tobytes() for one in pixels}))
        return encode(pixels)

    monkeypatch.setattr(
        clip, "tokenize", lambda text, **rest: asked.extend([text][: len(text)]) or tokenize(text, **rest)
    )
    monkeypatch.setattr(vae, "encode", encoding)
    return asked


def read(encoders, **options):
    dataset, summary = Folder.execute("photos", *encoders, **{"resolution": SIDE} | options).args
    assert summary == dataset.summary
    return dataset


def cached(tmp_path) -> list:
    return list((tmp_path / "user").rglob("*.safetensors"))


def drawn(dataset, count=3):
    """The first batches, by image."""
    view = dataset.started(0)
    found = []
    for _ in range(count):
        batch = view.batch(2)
        found += list(zip(batch.keys, batch.captions, batch.latents, batch.conds, strict=True))
    return found


def same(one, other) -> bool:
    return all(
        a[:2] == b[:2]
        and torch.equal(a[2], b[2])
        and torch.equal(a[3]["cross_attn"], b[3]["cross_attn"])
        and torch.equal(a[3]["pooled_output"], b[3]["pooled_output"])
        for a, b in zip(one, other, strict=True)
    )


def test_encodings_are_those_of_the_stock_nodes(encoders, photos):
    clip, vae = encoders
    dataset = read(encoders)
    ((empty, extra),) = nodes.CLIPTextEncode().encode(clip, "")[0]
    assert torch.equal(dataset.empty["cross_attn"], empty.float())
    assert torch.equal(dataset.empty["pooled_output"], extra["pooled_output"].float())
    for key, caption, latent, cond in drawn(dataset):
        assert caption == CAPTIONS[int(key[0])]
        pixels = images.prepared((photos / key).read_bytes(), (SIDE, SIDE))
        expected = nodes.VAEEncode().encode(vae, pixels[None])[0]["samples"]
        assert torch.allclose(latent, expected[0], atol=1e-5)  # several at once round differently in the last bits
        escaped = caption.replace("(", "\\(").replace(")", "\\)")
        ((context, extra),) = nodes.CLIPTextEncode().encode(clip, escaped)[0]
        assert cond["cross_attn"].dtype == torch.float32
        assert torch.allclose(cond["cross_attn"], context.half().float(), rtol=2e-3, atol=1e-4)
        assert torch.allclose(cond["pooled_output"], extra["pooled_output"].float(), atol=1e-4)


def test_tensors_serve_autograd(encoders, photos):
    dataset = read(encoders)
    with torch.inference_mode(False), torch.enable_grad():
        batch = dataset.batch(2)
        weight = torch.ones(1, requires_grad=True)
        cross = [
            batch.conds[0]["cross_attn"],
            batch.conds[0]["pooled_output"],
            batch.latents,
            dataset.empty["cross_attn"],
        ]
        sum((weight * tensor).sum() for tensor in cross).backward()
    assert weight.grad is not None


def test_the_second_run_encodes_nothing(encoders, photos, encoded, tmp_path):
    first = read(encoders)
    assert sorted(encoded) == sorted([*CAPTIONS, *["image"] * 4])
    assert len(cached(tmp_path)) == 2  # one for the images, one for the captions
    expected = drawn(first)
    encoded.clear()
    assert same(drawn(read(encoders)), expected)
    assert encoded == []
    assert not list(tmp_path.rglob("*.tmp"))


def test_a_changed_file_is_encoded_again(encoders, photos, encoded):
    before = read(encoders)
    marks, linked = (Folder.fingerprint_inputs(folder=name, clip=None, vae=None) for name in ("photos", None))
    encoded.clear()
    (photos / "2.txt").write_text("quite another caption", encoding="utf-8")
    Image.new("RGB", (90, 70), "black").save(photos / "1.png")
    assert Folder.fingerprint_inputs(folder="photos", clip=None, vae=None) != marks
    assert Folder.fingerprint_inputs(folder=None, clip=None, vae=None) != linked
    after = read(encoders)
    assert encoded == ["image", "quite another caption"]
    assert after.fingerprint != before.fingerprint


def test_a_file_that_may_not_be_looked_at_stops_no_fingerprint(photos, monkeypatch):
    stat = Path.stat

    def denied(path, **options):
        if path.name == "1.png":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    before = dataset_folders.fingerprint(photos)
    monkeypatch.setattr(Path, "stat", denied)
    assert dataset_folders.fingerprint(photos) != before


def test_without_a_cache_everything_is_the_same(encoders, photos, encoded, tmp_path):
    expected = drawn(read(encoders))
    for path in cached(tmp_path):
        path.unlink()
    dataset = read(encoders, cache_gb=0.0)
    assert "except 4 images and 4 captions for which cache_gb leaves no room" in dataset.summary
    encoded.clear()
    assert same(drawn(dataset), expected)
    assert encoded.count("image") == 6  # two batches of two for each pass, and one of the next
    assert not cached(tmp_path)


def test_a_cache_with_room_for_some(encoders, photos, tmp_path):
    dataset = read(encoders, cache_gb=0.00026)  # four latents and two captions of 120 kB
    assert "except 0 images and 2 captions" in dataset.summary
    assert sum(path.stat().st_size for path in cached(tmp_path)) <= 260_000
    assert same(drawn(dataset), drawn(read(encoders)))


def test_a_damaged_entry_is_made_anew(encoders, photos, encoded, tmp_path):
    expected = drawn(read(encoders))
    for path in cached(tmp_path):
        path.write_bytes(path.read_bytes()[:-7])
    encoded.clear()
    dataset = read(encoders)
    assert same(drawn(dataset), expected)
    repaired = len(encoded)
    assert repaired >= 4
    assert same(drawn(dataset), expected)
    assert len(encoded) == repaired


def test_flipped_bytes_are_noticed(encoders, photos, encoded, tmp_path):
    expected = drawn(read(encoders))
    for path in cached(tmp_path):
        content = bytearray(path.read_bytes())
        for place in range(1000, len(content), 500):
            content[place] = 255 - content[place]
        path.write_bytes(content)
    encoded.clear()
    dataset = read(encoders)
    assert same(drawn(dataset), expected)
    assert encoded.count("image") == 4
    assert {caption for caption in encoded if caption in CAPTIONS} == set(CAPTIONS)


OF_OTHERS = (
    {"latent": torch.zeros(4, 8, 9), "cross_attn": torch.zeros(1, 77, 4), "pooled_output": torch.zeros(1, 768)},
    {"cross_attn": torch.zeros(77, 768), "pooled_output": torch.zeros(1, 768)},
    {"cross_attn": torch.zeros(1, 77, 768)},
    {"something": torch.zeros(3)},
)


def test_entries_of_other_names_and_shapes_are_made_anew(encoders, photos, encoded, tmp_path):
    expected = drawn(read(encoders))
    for tensors in OF_OTHERS:
        cache = Cache(tmp_path / "user" / "__softrepa" / "cache", 10**9)
        cache.survey([])
        for key in list(cache._places):
            is_image = key.startswith("latent")
            names = ("latent", "something") if is_image else tensors.keys() - {"latent"}
            assert cache.write(key, {name: value for name, value in tensors.items() if name in names})
        cache.flush()
        encoded.clear()
        assert same(drawn(read(encoders)), expected), tensors.keys()
        assert encoded.count("image") == 4, tensors.keys()


def test_files_of_an_older_version_are_the_first_to_go(encoders, photos, encoded, tmp_path):
    expected = drawn(read(encoders))
    needed = sum(path.stat().st_size for path in cached(tmp_path))
    for path in cached(tmp_path):
        path.with_name("0" * 64 + ".safetensors").write_bytes(path.read_bytes())
        path.unlink()
    encoded.clear()
    dataset = read(encoders, cache_gb=(needed + 2000) / 10**9)
    assert "encoded and cached" in dataset.summary.splitlines()
    assert same(drawn(dataset), expected)
    assert encoded.count("image") == 4
    assert not [path for path in cached(tmp_path) if path.name.startswith("0" * 64)]


def test_an_index_of_wrong_types_is_as_none(encoders, photos, encoded, tmp_path):
    expected = drawn(read(encoders))
    (index,) = (tmp_path / "user").rglob("*.json")
    for content in ("null", "[1]", '{"files": {"0.png": null, "1.png": [1, 2, 3]}}', "{"):
        index.write_text(content, encoding="utf-8")
        assert same(drawn(read(encoders)), expected)
    assert encoded.count("image") == 4


def test_exchanged_files_are_noticed(encoders, photos):
    for number in (0, 1):
        Image.new("RGB", (90, 70), COLOURS[number]).save(photos / f"{number}.png")
        (photos / f"{number}.png").write_bytes((photos / f"{number}.png").read_bytes().ljust(1000, b"\0"))
        os.utime(photos / f"{number}.png", ns=(10**18, 10**18))
    latents = {key: latent for key, _, latent, _ in drawn(read(encoders))}
    marks = Folder.fingerprint_inputs(folder="photos", clip=None, vae=None)
    assert Folder.fingerprint_inputs(folder="photos", clip=None, vae=None) == marks
    (photos / "0.png").rename(photos / "other.png")
    (photos / "1.png").rename(photos / "0.png")
    (photos / "other.png").rename(photos / "1.png")
    assert {(photos / f"{i}.png").stat().st_mtime_ns for i in (0, 1)} == {10**18}
    assert Folder.fingerprint_inputs(folder="photos", clip=None, vae=None) != marks
    after = {key: latent for key, _, latent, _ in drawn(read(encoders))}
    assert torch.equal(after["0.png"], latents["1.png"])
    assert torch.equal(after["1.png"], latents["0.png"])
    assert not torch.equal(after["0.png"], latents["0.png"])


def test_long_captions_have_room(encoders, photos, encoded, caplog):
    for number in range(4):
        (photos / f"{number}.txt").write_text(f"{number} " + "a rather long caption " * 30, encoding="utf-8")
    caplog.set_level("INFO")
    dataset = read(encoders)
    assert "encoded and cached" in dataset.summary.splitlines()
    assert "up to 4 images and 4 captions to encode; the cache in" in caplog.text
    assert "takes 0.0 MB, its limit is 50,000.0 MB" in caplog.text
    encoded.clear()
    drawn(dataset)
    assert not encoded


def test_without_room_no_caption_is_encoded_ahead(encoders, photos, encoded):
    for number in range(4):
        (photos / f"{number}.txt").write_text(f"{number} " + "a rather long caption " * 30, encoding="utf-8")
    dataset = read(encoders, cache_gb=0.0002)  # room for a short text beside the latents, not for these
    assert "except 0 images and 4 captions" in dataset.summary
    assert len([text for text in encoded if len(text) > 9]) == 1  # it was tried once


def test_a_text_as_one_caption(encoders, photos):
    for number in range(4):
        (photos / f"{number}.txt").write_text(f"Picture {number}.\n- Mood: calm", encoding="utf-8")
    assert "4 text files have several lines" in read(encoders).summary
    dataset = read(encoders, caption_lines="whole")
    assert {caption for _, caption, _, _ in drawn(dataset)} == {f"Picture {i}.\n- Mood: calm" for i in range(4)}
    assert dataset.settings["caption_lines"] == "whole"
    assert "several lines" not in dataset.summary


def test_the_command_line_makes_the_same_dataset(encoders, photos):
    for number in range(4):
        (photos / f"{number}.txt").write_text(f"Picture {number}.\n- Mood: calm", encoding="utf-8")
    whole = {"folder": "photos", "resolution": SIDE, "caption_lines": "whole"}
    configuration.check_inputs(whole)
    node, command = read(encoders, caption_lines="whole"), headless.load_dataset(dict(whole), *encoders)
    assert command.fingerprint == node.fingerprint != read(encoders).fingerprint
    configuration.check_inputs(command.settings)  # as the file of a trained run says


def test_a_large_damaged_file_is_left_out_and_the_rest_encoded(encoders, photos, encoded):
    Image.new("RGB", (900, 700), "red").save(photos / "large.bmp")
    content = (photos / "large.bmp").read_bytes()
    (photos / "large.txt").write_text("a large one", encoding="utf-8")
    (photos / "large.bmp").write_bytes(content[:-1000])
    dataset = read(encoders)
    assert sorted(one.name for one in dataset.train) == [f"{i}.png" for i in range(4)]
    assert "left out 1 (image file is truncated: large.bmp)" in dataset.summary
    (photos / "large.bmp").write_bytes(content)
    assert len(read(encoders)) == 5
    assert encoded.count("image") == 5


def test_without_room_large_files_are_not_read_whole(encoders, photos, monkeypatch):
    for path in photos.glob("*.png"):
        Image.open(path).resize((900, 700)).save(path.with_suffix(".bmp"))
        path.unlink()
    whole = []
    real = WholeFile.read
    monkeypatch.setattr(WholeFile, "read", lambda source, most: whole.append(source.path.suffix) or real(source, most))
    dataset = read(encoders, cache_gb=0.0)
    assert ".bmp" not in whole
    dataset.batch(2)
    assert whole.count(".bmp") >= 2


def test_shards_are_encoded_like_files(encoders, photos, encoded):
    expected = drawn(read(encoders))
    with tarfile.open(photos / "00.tar", "w") as archive:
        for path in sorted(photos.glob("[0-9].*")):
            archive.add(path, path.name)
    for path in photos.glob("[0-9].*"):
        path.unlink()
    encoded.clear()
    found = drawn(read(encoders))
    assert [key for key, *_ in found] == [f"00.tar/{key}" for key, *_ in expected]
    assert same([("", *rest) for _, *rest in found], [("", *rest) for _, *rest in expected])
    assert "image" not in encoded  # by content, wherever it lies


def test_an_interrupted_run_is_taken_up(encoders, photos, encoded, tmp_path, monkeypatch):
    made = []
    encode = encoders[1].encode

    def interrupting(pixels):
        made.append(encode(pixels))
        if len(made) == 2:
            comfy.model_management.interrupt_current_processing(True)
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(encoders[1], "encode", interrupting)
        patch.setattr(folder_encodings, "images_at_once", lambda vae, size: 1)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            read(encoders)
    assert len(cached(tmp_path)) == 1
    encoded.clear()
    read(encoders)
    assert sorted(encoded) == sorted([*CAPTIONS, "image", "image"])


def test_an_image_that_goes_away(encoders, photos):
    in_cache, not_kept = read(encoders), read(encoders, resolution=96, cache_gb=0.0)
    for path in photos.glob("*.png"):
        path.unlink()
    assert len(drawn(in_cache)) == 6
    with pytest.raises(SoftREPAError, match=r'Dataset "photos": \d.png cannot be used any more \(No such file'):
        not_kept.batch(2)


def test_other_encoders_have_other_entries(encoders, photos):
    clip, vae = encoders
    names = {clip_identity(clip)}
    assert clip_identity(clip) in names
    skipping = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    names.add(clip_identity(skipping))
    longer = clip.clone()
    longer.set_tokenizer_option("t5xxl_min_length", 512)
    names.add(clip_identity(longer))
    patched = clip.clone()
    key = next(name for name in patched.patcher.model_state_dict() if name.endswith("q_proj.weight"))
    patched.add_patches({key: (torch.ones_like(patched.patcher.model_state_dict()[key]),)}, 0.5)
    names.add(clip_identity(patched))
    assert len(names) == 4
    # an encode loads the LoRA into the weights, which all clones share
    encoding.encode_caption(patched, "a cat")
    assert patched.patcher.backup
    assert names == {clip_identity(one) for one in (clip, skipping, longer, patched)}
    encoding.encode_caption(clip, "a cat")
    before = vae_identity(vae)
    weight = next(iter(vae.first_stage_model.parameters()))
    old = weight.data.flatten()[0].clone()
    weight.data.flatten()[0] += 1
    assert vae_identity(vae) != before
    weight.data.flatten()[0] = old
    assert vae_identity(vae) == before


def test_clip_skip_is_seen_in_the_encodings(encoders, photos):
    clip, vae = encoders
    plain = read(encoders)
    skipping = read((nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0], vae))
    assert not same(drawn(plain), drawn(skipping))


def test_buckets_and_validation(encoders, photos):
    for number in range(4, 30):
        Image.new("RGB", (100, 60) if number % 2 else (60, 100), (number, 0, 9)).save(photos / f"{number}.png")
        (photos / f"{number}.txt").write_text(CAPTIONS[number % 4] + "!" * (number // 4), encoding="utf-8")
    dataset = read(encoders, bucketing=True, validation_percent=20.0)
    assert (len(dataset.train), len(dataset.validation)) == (24, 6)
    shapes = set()
    for _ in range(30):
        batch = dataset.batch(2)
        shapes.add(tuple(batch.latents.shape))
        for key in batch.keys:
            if int(key.split(".")[0]) >= 4:  # the first four are nearly square, and too few for a bucket
                width, height = Image.open(photos / key).size
                assert (width > height) == (batch.latents.shape[3] > batch.latents.shape[2])
    assert shapes == {(2, 4, 6, 10), (2, 4, 10, 6)}
    measured = [key for batch in dataset.validation_batches(2) for key in batch.keys]
    assert len(measured) == len(set(measured))
    assert len(measured) >= 4


def test_the_list_of_folders(photos, tmp_path, monkeypatch):
    def fill(folder, *files):
        folder.mkdir(parents=True, exist_ok=True)
        for name in files:
            (folder / name).write_bytes(b"")

    source = tmp_path / "input"
    fill(source, "loose.png", "loose.txt")
    fill(source / "coco" / "val2017", "1.jpg")
    fill(source / "coco" / "annotations", "captions_val2017.json")
    fill(source / "uncaptioned", "1.jpg", "other.txt")
    fill(source / "shards", "00.tar")
    fill(source / "cells", "train.parquet")
    fill(source / "texts only", "1.txt")
    fill(source / ".hidden", "1.jpg", "1.txt")
    fill(source / "深い" / "sub", "1.webp", "1.caption")
    (source / "photos" / "loop").symlink_to(source / "photos", target_is_directory=True)
    below = ["cells", "coco", "coco/val2017", "photos", "shards", "uncaptioned", "深い", "深い/sub"]
    assert dataset_folders.dataset_names() == below
    extra = tmp_path / "disk" / "photos"
    fill(extra / "set", "1.png", "metadata.jsonl")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "softrepa_datasets", ([str(extra)], set()))
    assert dataset_folders.dataset_names() == sorted([*below, f"photos ({extra})", "photos/set"])
    assert dataset_folders.dataset_path("photos") == photos
    assert dataset_folders.dataset_path(f"photos ({extra})") == extra
    assert "photos/set" in Folder.INPUT_TYPES()["required"]["folder"][1]["options"]


def test_names_that_are_no_folder(photos):
    assert Folder.validate_inputs("photos") is True
    assert Folder.validate_inputs(None) is True
    for name in ("gone", "../user", "", str(photos)):
        assert Folder.validate_inputs(name) == (
            f'folder is "{name}", which holds no images below ComfyUI\'s input folder or softrepa_datasets, '
            "expected one of photos."
        )


def test_a_folder_without_captions_is_listed_and_says_why(encoders, photos):
    for path in photos.glob("*.txt"):
        path.unlink()
    assert Folder.validate_inputs("photos") is True
    with pytest.raises(SoftREPAError, match=r"no caption \(4\): 0.png, 1.png, ...\)\), looked for a.txt.*\*.csv"):
        read(encoders)


def test_names_in_messages_are_bounded(encoders, photos):
    for number in range(30):
        (photos / f"{number} {'x' * 150}").mkdir()
        (photos / f"{number} {'x' * 150}" / "1.png").touch()
    for name in ("gone" * 10_000, "\udcff"):
        message = Folder.validate_inputs(name)
        assert len(message) < 1_000
        message.encode()


def test_names_that_are_no_text_are_left_out(encoders, photos):
    try:
        (photos / "caf\udce9.png").write_bytes((photos / "0.png").read_bytes())
        (photos.parent / "caf\udce9").mkdir()
    except OSError:
        return  # a file system that refuses them itself
    (photos.parent / "caf\udce9" / "1.png").touch()
    assert dataset_folders.dataset_names() == ["photos"]
    summary = read(encoders).summary
    assert "its name is no text that can be written: caf\\udce9.png" in summary
    summary.encode()


def test_wrong_inputs(encoders, photos):
    with pytest.raises(SoftREPAError, match='caption_lines is "all", expected each or whole'):
        read(encoders, caption_lines="all")
    with pytest.raises(SoftREPAError, match="resolution is 100, expected a multiple of 8"):
        read(encoders, resolution=100)
    assert [len(part) for part in (read(encoders, validation_percent=10.0).train, read(encoders).train)] == [2, 4]
    with pytest.raises(
        SoftREPAError, match="1 different images and 1 different captions for training.*percent divides"
    ):
        read(encoders, validation_percent=80.0)
    for path in photos.glob("*.txt"):
        path.write_text("the same", encoding="utf-8")
    with pytest.raises(SoftREPAError, match="4 different images and 1 different captions for training"):
        read(encoders)


def test_a_vae_that_gives_no_numbers(encoders, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(encoders[1], "encode", lambda pixels: torch.full((len(pixels), 4, 8, 8), torch.nan))
    with pytest.raises(SoftREPAError, match=r"vae gives NaN or infinite values for 0.png"):
        read(encoders)
    for shape in ((8, 16, 2, 8, 8), (1, 4, 8, 8)):  # two frames each; fewer than the images of a call
        monkeypatch.setattr(encoders[1], "encode", lambda pixels, shape=shape: torch.zeros(shape))
        with pytest.raises(SoftREPAError, match=re.escape(f"vae gives latents of shape {list(shape)}, expected")):
            read(encoders)
    assert not cached(tmp_path)


def test_the_cache_can_lie_elsewhere(encoders, photos, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "softrepa_cache", ([str(tmp_path / "fast")], set()))
    read(encoders)
    assert len(list((tmp_path / "fast").rglob("*.safetensors"))) == 2
    assert not cached(tmp_path)


def test_core_training_lists(encoders, photos):
    import comfy_extras.nodes_dataset as core

    clip, vae = encoders
    pixels = [images.prepared((photos / f"{i}.png").read_bytes(), (SIDE, SIDE))[None] for i in range(4)]
    made = core.MakeTrainingDataset.execute(pixels, [vae], [clip], list(CAPTIONS)).args
    bucketed = core.ResolutionBucket.execute(*made).args
    empty = [nodes.CLIPTextEncode().encode(clip, "")[0]]
    whole = read(encoders)
    by_caption = {}
    for lists in (made, bucketed):
        (dataset,) = FromLatents.execute(*lists, empty).args
        assert torch.equal(dataset.empty["cross_attn"], whole.empty["cross_attn"])
        for key, caption, latent, cond in drawn(dataset):
            number = int(key.split()[1]) - 1
            assert torch.equal(latent, made[0][number]["samples"][0])
            assert torch.equal(cond["cross_attn"], made[1][number][0][0])
            by_caption.setdefault(caption, set()).add(number)
    assert all(len(numbers) == 1 for numbers in by_caption.values())


@pytest.mark.parametrize("node", dataset_nodes.NODES)
def test_nodes_are_documented(node, photos):
    schema = node.GET_SCHEMA()
    page = (ROOT / "nodes" / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert schema.description
    assert schema.category == "SoftREPA"
    for entry in (*schema.inputs, *schema.outputs):
        assert entry.tooltip, entry.id
    for entry in schema.inputs:
        assert f"`{entry.id}`" in page


def test_the_optional_inputs_and_their_defaults(photos):
    inputs = Folder.INPUT_TYPES()
    assert list(inputs["required"]) == ["folder", "clip", "vae"]
    defaults = {name: options["default"] for name, (_, options) in inputs["optional"].items()}
    assert defaults == {"resolution": 512, "bucketing": False, "validation_percent": 0.0, "cache_gb": 50.0} | {
        "caption_lines": "each"
    }
    assert list(defaults)[-1] == "caption_lines"  # widgets_values of saved graphs are positional
    assert Folder.RETURN_TYPES == ["SOFTREPA_DATASET", "STRING"]
    assert FromLatents.INPUT_IS_LIST is True


@pytest.mark.parametrize("cache_gb", [1.0, 0.0])
def test_what_an_encoder_gives_besides_reaches_the_network(encoders, photos, monkeypatch, models, cache_gb):
    """Masks and ids, as some families have them; numbers that are whole stay so."""
    clip, vae = encoders
    encode = type(clip).encode_from_tokens_scheduled

    def with_more(self, tokens, *args, **kwargs):
        ((context, extra),) = encode(self, tokens, *args, **kwargs)
        ids = torch.arange(context.shape[1])[None]
        return [[context, extra | {"attention_mask": ids > 70, "t5xxl_ids": ids, "guidance": 3.5}]]

    monkeypatch.setattr(type(clip), "encode_from_tokens_scheduled", with_more)
    for _ in range(2):  # encoded, then from the cache
        batch = read((clip, vae), cache_gb=cache_gb).batch(2)
        assert batch.conds[0]["rest"].keys() == {"attention_mask", "t5xxl_ids"}
        assert batch.conds[0]["rest"]["t5xxl_ids"].dtype == torch.int64
        assert batch.conds[0]["rest"]["attention_mask"].dtype == torch.bool
    seen = []
    extra_conds = type(models["sd15"].model).extra_conds
    monkeypatch.setattr(
        type(models["sd15"].model),
        "extra_conds",
        lambda self, **given: seen.append(given) or extra_conds(self, **given),
    )
    with torch.inference_mode(False):
        step = StepBatch.of_all(torch.zeros(2, 4, 8, 8), torch.zeros(1, 4, 8, 8), batch.conds, 500)
        PairNetwork(models["sd15"]).prepared(step)
    assert all({"attention_mask", "t5xxl_ids", "cross_attn"} <= given.keys() for given in seen)
    assert "rest" not in seen[0]


def test_a_video_vae_gives_stills_of_one_frame():
    def vae(frames):
        return SimpleNamespace(encode=lambda pixels: torch.ones(1, 16, frames, 8, 8))

    pixels = torch.zeros(64, 64, 3)
    assert encoding.encode_image(vae(1), pixels, "a.png").shape == (16, 1, 8, 8)
    with pytest.raises(SoftREPAError, match=r"vae gives latents of shape \[1, 16, 2, 8, 8\], expected those of still"):
        encoding.encode_image(vae(2), pixels, "a.png")
