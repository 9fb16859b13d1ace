"""Folders of captioned images: what is read, what is refused, and which batches are drawn."""

import gc
import hashlib
import json
import os
import random
import struct
import subprocess
import sys
import threading
from collections import Counter
from dataclasses import replace
from io import BytesIO

import pytest
import torch
from comfyui_softrepa.softrepa.data import buckets, folder, images
from comfyui_softrepa.softrepa.data.ahead import AtHand
from comfyui_softrepa.softrepa.data.batches import Example, Sampler, caption_key, compatible_batches, epoch_batches
from comfyui_softrepa.softrepa.data.dataset import Dataset, divide
from comfyui_softrepa.softrepa.data.folder import read_folder
from comfyui_softrepa.softrepa.data.latent_lists import dataset_of_lists
from comfyui_softrepa.softrepa.data.sources import WholeFile, digests
from comfyui_softrepa.softrepa.data.tables import TABLES
from comfyui_softrepa.softrepa.errors import SoftREPAError
from PIL import Image
from softrepa_tests.conftest import ROOT
from softrepa_tests.folders import picture, write

# images


def centre(path) -> list[int]:
    image = images.decode(path.read_bytes())
    assert image.mode == "RGB"
    return list(image.getpixel((image.width // 2, image.height // 2)))


def test_orientation_is_followed(tmp_path):
    image = Image.new("RGB", (40, 20), "white")
    image.paste((255, 0, 0), (0, 0, 20, 20))
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6  # to be turned clockwise: the red left half comes to the top
    image.save(tmp_path / "phone.png", exif=exif)
    data = (tmp_path / "phone.png").read_bytes()
    assert [images.upright_size(BytesIO(data), whole) for whole in (True, False)] == [(20, 40)] * 2
    upright = images.decode(data)
    assert upright.size == (20, 40)
    assert (upright.getpixel((10, 5)), upright.getpixel((10, 35))) == ((255, 0, 0), (255, 255, 255))


@pytest.mark.parametrize(
    ("mode", "colour", "name", "options", "expected"),
    [
        ("RGBA", (0, 0, 255, 0), "clear.png", {}, [255, 255, 255]),
        ("RGBA", (0, 0, 255, 51), "faint.webp", {"lossless": True}, [204, 204, 255]),
        ("LA", (0, 128), "grey.png", {}, [127, 127, 127]),
        ("RGB", (9, 8, 7), "key.png", {"transparency": (9, 8, 7)}, [255, 255, 255]),
        ("L", 90, "grey8.png", {}, [90, 90, 90]),
        ("1", 1, "bits.png", {}, [255, 255, 255]),
        ("CMYK", (0, 255, 255, 0), "ink.jpg", {"quality": 100}, [255, 0, 0]),
        ("I;16", 128 * 257, "deep.png", {}, [128, 128, 128]),
        ("I;16", 65535, "deep.tif", {}, [255, 255, 255]),
    ],
)
def test_pixel_formats(tmp_path, mode, colour, name, options, expected):
    Image.new(mode, (16, 16), colour).save(tmp_path / name, **options)
    found = centre(tmp_path / name)
    assert max(abs(a - b) for a, b in zip(found, expected, strict=True)) <= 2, found


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (16, 16), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    image.save(tmp_path / "opaque.png")
    image.save(tmp_path / "clear.png", transparency=1)
    assert centre(tmp_path / "opaque.png") == [10, 200, 30]
    assert centre(tmp_path / "clear.png") == [255, 255, 255]


def tiff(bits: int, samples: int, inverted: bool, data: bytes) -> bytes:
    """16 x 16 grey pixels; `samples` is 1 for unsigned numbers, 2 for signed ones."""
    tags = [(256, 16), (257, 16), (258, bits), (259, 1), (262, 0 if inverted else 1), (273, 0), (277, 1), (278, 16)]
    tags += [(279, len(data)), (339, samples)]
    start = 14 + 12 * len(tags)
    body = b"".join(struct.pack("<HHII", tag, 4, 1, start if tag == 273 else value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + body + bytes(4) + data


@pytest.mark.parametrize(
    ("bits", "samples", "inverted", "data", "expected"),
    [
        (12, 1, False, bytes.fromhex("800800") * 128, 128),  # two pixels of 0x800
        (12, 1, False, b"\xff" * 384, 255),
        (16, 1, False, struct.pack("<H", 128 * 257) * 256, 128),
        (16, 1, True, struct.pack("<H", 55 * 257) * 256, 200),
        (16, 1, True, bytes(512), 255),
        (32, 1, False, struct.pack("<I", 2**31) * 256, None),
        (32, 2, False, struct.pack("<i", 1000) * 256, None),
        (16, 2, False, struct.pack("<h", 1000) * 256, None),
    ],
)
def test_grey_tiffs_are_right_or_left_out(bits, samples, inverted, data, expected):
    content = tiff(bits, samples, inverted, data)
    if expected is None:
        for look in (images.decode, lambda data: images.upright_size(BytesIO(data), whole=False)):
            with pytest.raises(ValueError, match="pixels of signed or of 32-bit numbers"):
                look(content)
    else:
        assert images.decode(content).getpixel((8, 8)) == (expected,) * 3


def test_a_strip_is_left_out_before_it_is_enlarged(tmp_path):
    strip = picture(tmp_path / "strip.png", (1, 20_000))
    assert strip.stat().st_size < 1000
    with pytest.raises(ValueError, match="a strip whose sides are over 16:1"):
        images.prepared(strip.read_bytes(), (512, 512))


@pytest.mark.parametrize("size", [(16, 1000), (1000, 100), (60, 300)])
def test_what_is_cut_off_is_not_enlarged(tmp_path, monkeypatch, size):
    enlarged = []
    real = Image.Image.resize
    monkeypatch.setattr(Image.Image, "resize", lambda *args: enlarged.append(args[1]) or real(*args))
    image = Image.new("RGB", size, "white")
    image.paste("red", (size[0] // 2 - 5, size[1] // 2 - 5, size[0] // 2 + 5, size[1] // 2 + 5))
    image.save(tmp_path / "long.png")
    with monkeypatch.context() as patch:
        patch.setattr(images, "NARROWEST", 1000)
        pixels = images.prepared((tmp_path / "long.png").read_bytes(), (64, 64))
    assert max(enlarged[0]) <= 4 * 64
    assert min(enlarged[0]) == 64
    assert (255 * pixels[32, 32]).tolist() == [255, 0, 0]
    assert torch.equal(pixels, pixels.flip(0)) or (pixels - pixels.flip(0)).abs().max() < 0.5  # the middle


def test_only_pictures_are_opened_whatever_their_name(tmp_path, monkeypatch):
    from PIL import EpsImagePlugin

    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **rest: started.append(args))
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 30\n%%EndComments\nshowpage\n%%EOF\n"
    write(tmp_path / "photos/eps.jpg", eps)
    write(tmp_path / "photos/eps.txt", "a program")
    Image.open(BytesIO(eps))  # PIL itself would
    with pytest.raises(SoftREPAError, match=r"no image that can be opened: eps.jpg"):
        read(tmp_path / "photos")
    assert not started


@pytest.mark.parametrize("size", [(301, 200), (200, 301), (64, 64), (90, 64), (50, 33)])
def test_square_preparation_is_resize_and_centre_crop(tmp_path, size):
    rng = random.Random(0)
    image = Image.frombytes("RGB", size, rng.randbytes(3 * size[0] * size[1]))
    image.save(tmp_path / "noise.png")
    pixels = images.prepared((tmp_path / "noise.png").read_bytes(), (64, 64))
    short = min(size)
    resized = image.resize([side if side == short else int(64 * side / short) for side in size], Image.BICUBIC)
    width, height = (64 if side == short else int(64 * side / short) for side in size)
    resized = image.resize((width, height), Image.BICUBIC)
    left, top = round((width - 64) / 2), round((height - 64) / 2)
    expected = torch.tensor(list(resized.crop((left, top, left + 64, top + 64)).tobytes())).view(64, 64, 3) / 255
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels, expected)


def test_bucket_preparation_cuts_the_longer_rest_only(tmp_path):
    image = Image.new("RGB", (100, 60), "white")
    image.paste((0, 0, 0), (0, 0, 100, 5))
    image.paste((0, 0, 0), (0, 55, 100, 60))
    image.save(tmp_path / "bars.png")
    pixels = images.prepared((tmp_path / "bars.png").read_bytes(), (100, 50))
    assert pixels.shape == (50, 100, 3)
    assert pixels.min() == 1


# buckets


@pytest.mark.parametrize("resolution", [96, 512, 1024])
def test_bucket_sizes_have_about_one_area(resolution):
    sizes = buckets.bucket_sizes(resolution)
    assert (resolution, resolution) in sizes
    assert all(0.7 * resolution**2 <= width * height <= resolution**2 for width, height in sizes)
    assert {(height, width) for width, height in sizes} <= set(sizes)
    assert buckets.nearest((3000, 2999), sizes) == (resolution, resolution)
    wide = buckets.nearest((1920, 1080), sizes)
    assert wide[0] > wide[1]


def examples(count, size=(512, 512), prefix="") -> list[Example]:
    return [
        Example(f"{prefix}{i}.png", f"digest {prefix}{i}", (f"caption {prefix}{i}", f"also {prefix}{i}"), size)
        for i in range(count)
    ]


def test_small_buckets_join_their_nearest():
    parts = [((512, 512), 20), ((640, 384), 10), ((704, 320), 3), ((384, 640), 2)]
    joined = buckets.join_small([one for size, count in parts for one in examples(count, size, str(size))])
    assert Counter(one.size for one in joined) == {(512, 512): 22, (640, 384): 13}
    assert len({one.name for one in joined}) == 35
    assert {one.size for one in buckets.join_small(examples(2, (512, 512), "a") + examples(1, (640, 384), "b"))} == {
        (512, 512)
    }


# batches


def check_batches(batches):
    for batch in batches:
        assert len({example.image for example, _ in batch}) == len(batch)
        assert len({example.size for example, _ in batch}) == 1
        for one, caption in batch:
            assert caption in one.captions
            for other, _ in batch:
                assert other is one or caption_key(caption) not in other.caption_keys


def test_no_batch_holds_equal_captions_or_copies():
    rng = random.Random(1)
    texts = ["A dog.", "a  dog", "a cat", "A CAT", "two birds", "a tree", "a house", "red", "blue", "green"]
    people = [
        Example(f"{i}", f"digest {i % 30}", tuple(rng.sample(texts, rng.randint(1, 3))), rng.choice([(8, 8), (16, 8)]))
        for i in range(60)
    ]
    sampler = Sampler(people, seed=3)
    check_batches([sampler.next(4) for _ in range(300)])
    check_batches(compatible_batches([(one, one.captions[0]) for one in people if one.size == (8, 8)], 5))


def test_every_image_and_every_caption_is_used():
    batches = epoch_batches(examples(12), 4, random.Random(0))
    assert sorted(one.name for batch in batches for one, _ in batch) == sorted(one.name for one in examples(12))
    sampler = Sampler(examples(12), seed=0)
    drawn = Counter(caption for _ in range(600) for _, caption in sampler.next(4))
    assert len(drawn) == 24
    assert 60 <= min(drawn.values()) <= max(drawn.values()) <= 140  # 100 each in the mean


def test_a_bucket_smaller_than_the_batch_gives_smaller_batches():
    small = examples(3, (8, 16), "small")
    batches = epoch_batches(examples(8) + small + examples(1, (16, 8), "alone"), 4, random.Random(0))
    assert sorted(map(len, batches)) == [3, 4, 4]


def test_a_caption_that_most_images_share():
    common = [Example(str(i), str(i), ("everyone's",), (8, 8)) for i in range(20000)]
    rare = [Example(f"r{i}", f"r{i}", (f"own {i}",), (8, 8)) for i in range(200)]
    batches = epoch_batches(common + rare, 2, random.Random(0))
    assert len(batches) >= 100
    check_batches(batches)


def test_the_seed_decides_and_the_global_generators_are_left_alone():
    before, torch_before = random.getstate(), torch.get_rng_state()
    first, again, other = Sampler(examples(40), 5), Sampler(examples(40), 5), Sampler(examples(40), 6)
    rows = [[sampler.next(4) for _ in range(25)] for sampler in (first, again, other)]
    assert rows[0] == rows[1]
    assert rows[0] != rows[2]
    assert rows[0][:10] != rows[0][10:20]
    assert random.getstate() == before
    assert torch.equal(torch.get_rng_state(), torch_before)


@pytest.mark.parametrize("drawn", [0, 1, 9, 10, 11])  # an epoch has ten batches
def test_a_restored_sampler_goes_on(drawn):
    sampler = Sampler(examples(40), 5)
    for _ in range(drawn):
        sampler.next(4)
    state = json.loads(json.dumps(sampler.state()))
    assert all(type(value) is int for value in state.values())
    expected = [sampler.next(4) for _ in range(15)]
    restored = Sampler(examples(40), 0)
    restored.restore(state)
    assert [restored.next(4) for _ in range(15)] == expected


def repeated(count, repeats, prefix="r"):
    return [replace(one, repeats=repeats) for one in examples(count, prefix=prefix)]


def test_repeats_say_how_often_an_image_comes_in_a_pass():
    batches = epoch_batches(repeated(20, 3) + examples(40), 4, random.Random(0))
    check_batches(batches)
    drawn = Counter(one.name for batch in batches for one, _ in batch)
    assert sum(map(len, batches)) >= 92  # of 100: what is left over at the end may not fit together
    assert max(drawn[f"r{i}.png"] for i in range(20)) == 3
    assert sum(drawn[f"r{i}.png"] for i in range(20)) >= 52
    assert max(drawn[f"{i}.png"] for i in range(40)) == 1


def test_an_image_meets_no_copy_of_itself_however_often_it_comes():
    sampler = Sampler(repeated(1, 10) + examples(4), 0)
    batches = [sampler.next(2) for _ in range(40)]
    check_batches(batches)
    counts = Counter(one.name for batch in batches for one, _ in batch)
    assert counts["r0.png"] > 1.5 * max(counts[f"{i}.png"] for i in range(4))


def test_measuring_takes_each_image_once():
    data = dataset(repeated(6, 5))
    plain = dataset(examples(6, prefix="r"))
    assert [batch.keys for batch in data.one_epoch(2)] == [batch.keys for batch in plain.one_epoch(2)]
    assert sorted(key for batch in data.one_epoch(2) for key in batch.keys) == sorted(one.name for one in data.train)
    assert data.state() == dataset(repeated(6, 5)).state()


# the dataset


class Counting(AtHand):
    """Encodings that tell which image and caption they are of."""

    empty = {"cross_attn": torch.zeros(1, 77, 8), "pooled_output": None}

    def latent(self, example):
        width, height = example.size
        return torch.full((4, height // 8, width // 8), float(len(example.name)))

    def cond(self, caption):
        return {"cross_attn": torch.full((1, 77, 8), float(len(caption))), "pooled_output": None}


def dataset(train, validation=()):
    return Dataset("set", list(train), list(validation), Counting(), ["a note"])


def test_a_batch_has_the_encodings_of_its_images_and_captions():
    batch = dataset(examples(20)).batch(4)
    assert batch.latents.shape == (4, 4, 64, 64)
    assert batch.latents.dtype == torch.float32
    for latent, caption, cond, key in zip(batch.latents, batch.captions, batch.conds, batch.keys, strict=True):
        assert latent[0, 0, 0] == len(key)
        assert cond["cross_attn"][0, 0, 0] == len(caption)
        assert caption.split()[1] == key.removesuffix(".png")


def test_started_views_do_not_move_one_another():
    data = dataset(examples(20))
    first, second = data.started(7), data.started(7)
    keys = [first.batch(4).keys for _ in range(8)]
    assert [second.batch(4).keys for _ in range(8)] == keys
    assert data.state()["index"] == 0
    assert data.fingerprint == first.fingerprint
    assert len(data) == 20


def test_validation_images_are_never_trained_on_and_all_measured():
    data = dataset(*divide(examples(30), 20))
    assert (len(data.train), len(data.validation)) == (24, 6)
    held_out = {one.name for one in data.validation}
    assert not held_out & {key for _ in range(50) for key in data.batch(4).keys}
    measured = [batch.keys for batch in data.validation_batches(4)]
    assert sorted(map(len, measured)) == [2, 4]
    assert {key for keys in measured for key in keys} == held_out
    assert [batch.keys for batch in data.validation_batches(4)] == measured


def test_the_division_goes_by_content():
    whole = examples(40)
    _, held_out = divide(whole, 25)
    renamed = [replace(one, name=f"other {one.name}") for one in reversed(whole)]
    assert {one.image for one in divide(renamed, 25)[1]} == {one.image for one in held_out}
    copies = whole + [replace(one, name=f"copy of {one.name}") for one in whole]
    train, validation = divide(copies, 25)
    assert len(validation) == 20
    assert not {one.image for one in train} & {one.image for one in validation}
    assert divide(whole, 0) == (whole, [])
    assert len(divide(whole, 0.1)[1]) == 2  # one alone would have nothing to be compared with


def test_the_fingerprint_changes_with_the_data_only():
    base = examples(10)
    same = dataset([replace(one, name=one.name * 2) for one in base])
    assert same.fingerprint == dataset(base).fingerprint
    for changed in (
        dataset(base[:9]),
        dataset([*base[:9], replace(base[9], captions=("new",))]),
        dataset([*base[:9], replace(base[9], image="new")]),
        dataset([*base[:9], replace(base[9], size=(8, 8))]),
        dataset(base[:8], base[8:]),
        dataset(reversed(base)),  # other names: other batches
        dataset([*base[:9], replace(base[9], repeats=2)]),
    ):
        assert changed.fingerprint != dataset(base).fingerprint


def test_the_description_names_no_files():
    data = dataset([*examples(8), replace(examples(1)[0], name="copy.png")], examples(2, (8, 8), "v"))
    assert data.description == (
        "set: 11 images, 22 captions (20 different); 9 for training, 2 for validation; "
        f"trained at 8x8 (2), 512x512 (9); fingerprint {data.fingerprint}"
    )
    assert "copy.png" in data.summary


def test_what_cannot_be_contrasted_is_refused():
    same_text = [
        replace(one, captions=(text,)) for one, text in zip(examples(3), ("A dog", "a dog.", " a dog"), strict=True)
    ]
    with pytest.raises(
        SoftREPAError, match=r'Dataset "set" has 3 different images and 1 different captions for training'
    ):
        dataset(same_text)
    same_image = [replace(one, image="x") for one in examples(3)]
    with pytest.raises(SoftREPAError, match="1 different images and 6 different captions for training"):
        dataset(same_image)
    with pytest.raises(SoftREPAError, match="1 different images and 2 different captions for validation"):
        dataset(examples(3), examples(1, prefix="v"))
    twins = [replace(one, captions=("a", "b")) for one in examples(4)]
    with pytest.raises(SoftREPAError, match="every image shares its captions"):
        dataset(twins).batch(2)


@pytest.mark.parametrize("batch_size", [1, 6])
def test_a_batch_size_that_cannot_be(batch_size):
    with pytest.raises(SoftREPAError, match=rf"batch_size is {batch_size}, expected 2 to 5: Dataset \"set\""):
        dataset(examples(5)).batch(batch_size)


def test_the_dataset_needs_no_pillow():
    modules = "softrepa.data.dataset, softrepa.data.latent_lists, softrepa.data.captions"
    code = f"import sys; sys.modules['PIL'] = None\nimport {modules}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True)


# a folder as a whole


@pytest.fixture
def photos(tmp_path):
    root = tmp_path / "photos"
    for i in range(12):
        picture(root / f"{i:02}.png", (300 if i < 9 else 200, 200), (i, 2 * i, 3 * i))
        write(root / f"{i:02}.txt", f"picture {i}")
    return root


def read(root, resolution=128, bucketing=False, validation_percent=0.0):
    return read_folder(root, "photos", resolution, bucketing, validation_percent, root.parent / "index.json")


def summary(found):
    return Dataset("photos", found.train, found.validation, Counting(), found.notes).summary


def test_the_summary_tells_what_is_there_and_what_is_not(photos):
    picture(photos / "small.jpg", (50, 60))
    write(photos / "small.txt", "Picture 3.")
    (photos / "copy.png").write_bytes((photos / "05.png").read_bytes())
    write(photos / "copy.txt", "the same again")
    (photos / "cut.png").write_bytes((photos / "05.png").read_bytes()[:200])
    write(photos / "cut.txt", "half a file")
    write(photos / "fake.jpg", "no image at all")
    write(photos / "fake.txt", "a text")
    Image.new("RGB", (9, 9)).save(photos / "moving.gif", save_all=True, append_images=[Image.new("RGB", (9, 9), "red")])
    write(photos / "moving.txt", "a film")
    picture(photos / "bare.png")
    assert summary(read(photos)).splitlines() == [
        "14 images, 14 captions (13 different)",
        "trained at 128x128 (14)",
        "left out 4 (no caption: bare.png; image file is truncated: cut.png; "
        "no image that can be opened: fake.jpg; several frames or pages: moving.gif)",
        "originals from 50x60 to 300x200",
        "1 are enlarged: small.jpg",
        '1 captions of several images, which never meet in a batch: "picture 3" (2 images)',
        "1 images in several copies: 05.png = copy.png",
    ]


def test_buckets_of_a_folder(photos):
    found = read(photos, bucketing=True)
    assert Counter(one.size for one in found.train) == {(160, 96): 12}  # the three squares are too few for a bucket
    for i in range(12, 20):
        picture(photos / f"{i}.png", (200, 200), (i, 0, 0))
        write(photos / f"{i}.txt", f"picture {i}")
    found = read(photos, bucketing=True)
    assert Counter(one.size for one in found.train) == {(160, 96): 9, (128, 128): 11}
    assert "trained at 128x128 (11), 160x96 (9)" in summary(found)
    assert found.pixels(found.train[0]).shape == (96, 160, 3)


def test_files_are_read_once_and_changes_are_noticed(photos, monkeypatch):
    inspected = []
    real = folder.upright_size
    monkeypatch.setattr(folder, "upright_size", lambda *args, **rest: inspected.append(args) or real(*args, **rest))
    first = read(photos)
    assert len(inspected) == 12
    again = read(photos)
    assert len(inspected) == 12
    assert [one.image for one in again.train] == [one.image for one in first.train]
    picture(photos / "03.png", (64, 64), "yellow")
    changed = read(photos)
    assert len(inspected) == 13
    differing = [a.name for a, b in zip(first.train, changed.train, strict=True) if a.image != b.image]
    assert differing == ["03.png"]
    for entry in ("null", "[]", '[[], "", [1], 2, 3]', '[[], "x", ["1", 2], "", ""]'):
        broken_files = f'{{"files": {{"03.png": {entry}}}}}'
        (photos.parent / "index.json").write_text(broken_files)
        assert read(photos).train == changed.train
    for broken in ("{broken", "null", "[]", '{"files": null}', "[" * 100_000):
        (photos.parent / "index.json").write_text(broken)
        assert read(photos).train == changed.train


@pytest.mark.parametrize(
    "entry",
    [
        *({"size": size} for size in ([0, 0], [64, 0], [-5, 3], [10**400, 3], [2**31 + 1, 3], [True, True])),
        {"identity": "\ud800"},
        {"digest": "../../elsewhere"},
    ],
)
def test_an_index_of_wrong_values_is_as_none(photos, entry):
    expected = read(photos)
    index = photos.parent / "index.json"
    files = json.loads(index.read_text())["files"]
    mark, *values = files["03.png"]
    changed = dict(zip(("identity", "size", "problem", "digest"), values, strict=True)) | entry
    index.write_text(json.dumps({"files": files | {"03.png": [mark, *changed.values()]}}))
    found = read(photos)
    assert found.train == expected.train
    assert found.notes == expected.notes
    assert [found.known_digest(one) for one in found.train] == [expected.known_digest(one) for one in expected.train]


def test_two_files_exchanged_are_noticed(photos):
    one, other = (large(photos / name, colour) for name, colour in (("a.bmp", (1, 2, 3)), ("b.bmp", (4, 5, 6))))
    date = one.stat().st_mtime_ns
    os.utime(other, ns=(date, date))
    assert one.stat().st_size == other.stat().st_size
    before = {example.name: example.image for example in read(photos).train}
    for source, target in ((one, photos / "x"), (other, one), (photos / "x", other)):
        source.rename(target)
    assert [path.stat().st_mtime_ns for path in (one, other)] == [date, date]
    after = {example.name: example.image for example in read(photos).train}
    assert before["a.bmp"] != before["b.bmp"]
    assert (after["a.bmp"], after["b.bmp"]) == (before["b.bmp"], before["a.bmp"])


def large(path, colour=(5, 6, 7), mark=(0, 0)):
    """1.5 MB, not compressed."""
    image = Image.new("RGB", (800, 640), colour)
    image.putpixel(mark, (255, 255, 255))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, "BMP")
    write(path.with_suffix(".txt"), f"large {path.stem}")
    return path


def test_of_large_files_a_part_is_read_and_the_whole_when_it_is_needed(photos, monkeypatch):
    paths = [large(photos / f"large {i}.bmp", (i, i, i)) for i in range(3)]
    whole = []
    real = WholeFile.read
    monkeypatch.setattr(WholeFile, "read", lambda source, most: whole.append(source.path.name) or real(source, most))
    found = read(photos, validation_percent=20.0)
    found.index.write()
    assert not [name for name in whole if name.endswith(".bmp")]
    one = next(example for example in found.train + found.validation if example.name == "large 0.bmp")
    assert found.known_digest(one) == ""
    assert found.digest(one) == found.digest(one) == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert whole.count("large 0.bmp") == 1
    found.finish()
    again = read(photos)
    assert again.known_digest(one) == found.digest(one)
    assert again.pixels(one).shape == (128, 128, 3)


def test_the_identity_of_a_large_file_is_of_all_its_parts(photos):
    place = large(photos / "a.bmp")
    (photos / "copy.bmp").write_bytes(place.read_bytes())
    write(photos / "copy.txt", "the same")
    for row in range(0, 640, 60):
        large(photos / f"b{row}.bmp", mark=(400, row))
    kinds = {one.name: one.image for one in read(photos).train}
    assert kinds["a.bmp"] == kinds["copy.bmp"]
    content = (photos / "03.png").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    assert kinds["03.png"] == digest
    assert digests(content) == (digest, digest)
    large(photos / "a.bmp", (9, 9, 9))
    assert {one.name: one.image for one in read(photos).train}["a.bmp"] != kinds["a.bmp"]


def test_a_large_file_that_is_damaged_behind_its_head(photos):
    path = large(photos / "cut.bmp")
    content = path.read_bytes()[:-100_000]
    path.write_bytes(content)
    found = read(photos)
    one = next(example for example in found.train if example.name == "cut.bmp")
    with pytest.raises(folder.UnusableImageError, match="cut.bmp cannot be used any more .*truncated"):
        found.pixels(one)
    assert found.is_outdated
    found.finish()
    assert "image file is truncated: cut.bmp" in summary(read(photos))


def test_several_lines_are_told(photos):
    for i in range(3):
        write(photos / f"{i:02}.txt", f"A room {i}.\n- Mood: calm")
    told = "3 text files have several lines, each of them a caption: set caption_lines to whole if they are one text"
    assert told in summary(read(photos)).splitlines()
    found = read_folder(photos, "photos", 128, False, 0.0, photos.parent / "index.json", caption_lines="whole")
    assert "caption_lines" not in summary(found)
    assert found.train[0].captions == ("A room 0.\n- Mood: calm",)


def test_repeats_of_a_folder(photos):
    picture(photos / "10_red ball/a.png")
    found = read(photos)
    assert {one.name: one.repeats for one in found.train if one.repeats > 1} == {"10_red ball/a.png": 10}
    assert "22 images in a pass, by the repeats that folders are named with" in summary(found)


def test_the_summary_tells_of_captions_that_are_names_of_folders(photos):
    for name in ("100_FUJI/a.png", "100_FUJI/b.png", "3_blue box/c.png", "3_blue box/d.png"):
        picture(photos / name, colour=(len(name), ord(name[-5]), 0))
    write(photos / "3_blue box/d.txt", "its own")
    assert (
        '3 have the name of their folder as caption: "FUJI" (drawn 100 times), "blue box" (drawn 3 times)'
        in summary(read(photos)).splitlines()
    )


def test_a_summary_is_short_whatever_is_in_it(photos):
    for i in range(12):
        write(photos / f"{i:02}.txt", f"picture {i // 2} " + "x" * 9_000)
    for i in range(300):
        write(photos / f"table {i}.jsonl", [{"width": 1}] * 3)
    told = summary(read(photos))
    assert "and 292 more reasons" in told
    assert len(told) < 3_000


def test_an_index_that_cannot_be_written_is_no_reason_to_stop(photos, caplog):
    index = photos / "00.png" / "index.json"  # below a file
    assert len(read_folder(photos, "photos", 128, False, 0.0, index).train) == 12
    assert "cannot be written" in caplog.text


def test_reading_that_is_stopped_remembers_what_it_read(photos, monkeypatch):
    class Stop(BaseException):
        pass

    def tick(done, total):
        assert total == 12 or (done, total) == (0, 0)
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        read_folder(photos, "photos", 128, False, 0.0, photos.parent / "index.json", tick)
    inspected = []
    monkeypatch.setattr(folder, "upright_size", lambda *args, **rest: inspected.append(args) or (300, 200))
    read(photos)
    assert len(inspected) == 7


def test_files_are_looked_at_by_several_threads_and_kept_in_order(photos, monkeypatch):
    both, real = threading.Barrier(2), folder.upright_size
    sizes = {name: file.size for name, (_, file) in read(photos).index.files.items()}

    def look(*arguments, **named):
        both.wait(60)  # of one thread alone it would be broken
        return real(*arguments, **named)

    for name in sizes:
        os.utime(photos / name, (1, 1))
    monkeypatch.setattr(folder, "IN_A_ROW", 1)
    monkeypatch.setattr(folder, "MOST_THREADS", 2)
    monkeypatch.setattr(folder.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(folder, "upright_size", look)
    found = {name: file.size for name, (_, file) in read(photos).index.files.items()}
    assert list(found.items()) == list(sizes.items())


def test_listing_can_be_stopped(photos):
    """The collector rests meanwhile, and is back however it ends."""

    class Stop(BaseException):
        pass

    write(photos / "more.jsonl", [{"file_name": "00.png", "text": f"caption {i}"} for i in range(1000)])
    calls = []

    def tick(done, total):
        calls.append(total)
        assert not gc.isenabled()
        if len(calls) == 500:
            raise Stop

    with pytest.raises(Stop):
        read_folder(photos, "photos", 128, False, 0.0, photos.parent / "index.json", tick)
    assert set(calls) == {0}
    assert gc.isenabled()


def test_an_image_that_goes_away_later(photos):
    found = read(photos)
    (photos / "00.png").unlink()
    picture(photos / "01.png", (64, 64), "yellow")
    for name, reason in (("00.png", "No such file or directory"), ("01.png", "its content has changed")):
        example = next(one for one in found.train if one.name == name)
        with pytest.raises(SoftREPAError) as caught:
            found.pixels(example)
        assert str(caught.value).startswith(f'Dataset "photos": {name} cannot be used any more ({reason}), expected')


def test_a_folder_without_captions_says_what_was_looked_for(tmp_path):
    picture(tmp_path / "photos" / "1.png")
    looked_for = "a.txt, a.caption, a.jpg.txt or a.json beside a.jpg"
    with pytest.raises(SoftREPAError, match="has no captioned image") as caught:
        read(tmp_path / "photos")
    assert str(caught.value).startswith(
        f'folder "photos" has no captioned image (left out 1 (no caption: 1.png)), looked for {looked_for}; '
    )
    for title in (*(layout.title for layout in TABLES), "10_caption", "*.tar"):
        assert title in str(caught.value)


# ComfyUI's own training lists


def conditioning(value, tokens=77, width=8, **extra):
    return [torch.full((1, tokens, width), float(value)), {"pooled_output": torch.full((1, 4), float(value))} | extra]


def latents(*values, side=8):
    return {"samples": torch.stack([torch.full((4, side, side), float(value)) for value in values])}


EMPTY = [[conditioning(0)]]


@pytest.mark.parametrize(
    ("images", "conds"),
    [
        ([latents(1), latents(2), latents(3)], [[conditioning(1)], [conditioning(2)], [conditioning(3)]]),
        (
            [latents(1, 2), latents(3, 4, side=6)],
            [[conditioning(1), conditioning(2)], [conditioning(3), conditioning(4)]],
        ),
        ([latents(1, 2, 3)], [[conditioning(1)], [conditioning(2)], [conditioning(3)]]),
    ],
)
def test_lists_of_core(images, conds):
    data = dataset_of_lists(images, conds, EMPTY)
    assert torch.equal(data.empty["cross_attn"], torch.zeros(1, 77, 8))
    for _ in range(10):
        batch = data.batch(2)
        for latent, cond in zip(batch.latents, batch.conds, strict=True):
            assert latent.unique() == cond["cross_attn"].unique() == cond["pooled_output"].unique()


def test_equal_conditionings_count_as_equal_captions():
    data = dataset_of_lists(
        [latents(1, 2, 3, 4)], [[conditioning(1), conditioning(1), conditioning(2)], [conditioning(2)]], EMPTY
    )
    assert data.different_captions == 2
    for _ in range(20):
        values = [cond["cross_attn"][0, 0, 0].item() for cond in data.batch(2).conds]
        assert sorted(values) == [1, 2]
    with pytest.raises(SoftREPAError, match="1 different captions"):
        dataset_of_lists([latents(1, 2)], [[conditioning(1), conditioning(1)]], EMPTY)


def test_all_that_a_text_encoder_gives_is_kept():
    """Captions that differ in nothing but the ids that Anima's adapter reads are two."""
    mask = torch.ones(1, 8, 8)
    conds = [conditioning(1, t5xxl_ids=torch.tensor([[number]]), start_percent=0.0, mask=mask) for number in (3, 4)]
    data = dataset_of_lists([latents(1, 2)], [conds], [[conditioning(0, t5xxl_ids=torch.tensor([[1]]))]])
    assert data.empty["rest"].keys() == {"t5xxl_ids"}
    assert sorted(cond["rest"]["t5xxl_ids"].item() for cond in data.batch(2).conds) == [3, 4]
    assert all(cond["rest"].keys() == {"t5xxl_ids"} for cond in data.batch(2).conds)


def test_latents_of_a_video_vae_have_the_sizes_of_their_pictures():
    def still(height, width):
        return {"samples": torch.randn(2, 4, 1, height, width)}

    conds = [[conditioning(number)] for number in range(4)]
    data = dataset_of_lists([still(8, 12), still(8, 6)], conds, EMPTY)
    assert "trained at 48x64 (2), 96x64 (2)" in data.summary
    for _ in range(6):
        assert data.batch(2).latents.shape[2:4] == (1, 8)


def test_an_image_without_partner_of_its_size_is_left_out():
    data = dataset_of_lists([latents(1, 2), latents(3, side=6)], [[conditioning(i)] for i in (1, 2, 3)], EMPTY)
    assert len(data) == 2
    assert "left out 1 (no other image of the same size)" in data.summary


@pytest.mark.parametrize(
    ("images", "conds", "empty", "message"),
    [
        ([latents(1, 2)], [[conditioning(1)]], EMPTY, "conditioning has 1 entries, expected 2, one for each image"),
        (
            [latents(1, 2)],
            [[conditioning(1), conditioning(2)]],
            EMPTY * 2,
            "empty_conditioning has 2 entries, expected one",
        ),
        (
            [latents(1, 2)],
            [[conditioning(1), conditioning(2, width=6)]],
            EMPTY,
            "conditioning has an entry of width 6, expected 8, the width of empty_conditioning",
        ),
        (
            [{"samples": torch.zeros(1, 16, 3, 8, 8)}],
            [],
            EMPTY,
            r"latents have one of shape \[1, 16, 3, 8, 8\], expected",
        ),
        (
            [latents(1, 2)],
            [[conditioning(1), [torch.zeros(2, 77, 8), {}]]],
            EMPTY,
            r"conditioning has an entry of shape \[2, 77, 8\], expected \[1, tokens, width\]",
        ),
        ([latents(1, 2)], [[conditioning(1, hooks=object()), conditioning(2)]], EMPTY, "conditioning carries hooks"),
    ],
)
def test_lists_that_are_refused(images, conds, empty, message):
    with pytest.raises(SoftREPAError, match=message):
        dataset_of_lists(images, conds, empty)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 0}, "batch_size 0"),  # from it batches would be made for ever
        ({"batch_size": "x"}, "batch_size x"),
        ({"index": -50}, "index -50"),
        ({"epoch": True}, "epoch True"),
        ({"seed": None}, "seed None"),
    ],
)
def test_a_position_that_nobody_wrote_is_refused(change, named):
    data = dataset(examples(5)).started(0)
    data.batch(2)
    with pytest.raises(SoftREPAError, match=f"the position of a checkpoint has {named}, expected a whole number"):
        data.restore(data.state() | change)
