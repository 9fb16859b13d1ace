"""Folders of captioned images: what is read, what is refused, and which batches are drawn."""

import json
import os
import random
import re
import subprocess
import sys
import unicodedata
from collections import Counter
from dataclasses import replace

import pytest
import torch
from comfyui_softrepa.softrepa import buckets, folder, images
from comfyui_softrepa.softrepa.batches import Example, Sampler, caption_key, compatible_batches, epoch_batches
from comfyui_softrepa.softrepa.cache import Cache
from comfyui_softrepa.softrepa.captions import list_folder
from comfyui_softrepa.softrepa.dataset import Dataset, divide
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.folder import read_folder
from comfyui_softrepa.softrepa.latent_lists import dataset_of_lists
from PIL import Image
from softrepa_tests.conftest import ROOT


def picture(path, size=(40, 30), colour=(200, 30, 30), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def reasons(listing):
    return {one.name: one.reason for one in listing.rejected}


# captions


def test_text_files_beside_images(tmp_path):
    for name in ("b.jpg", "a/c.PNG", "a/d.webp", "bare.png", ".hidden/x.png"):
        picture(tmp_path / name)
    write(tmp_path / "b.txt", "\ufeffone\n\n  two \none\n")
    write(tmp_path / "b.caption", "three\ntwo")
    write(tmp_path / "a/c.txt", "see")
    write(tmp_path / "a/d.txt", " \n")
    write(tmp_path / "lonely.txt", "nobody")
    (tmp_path / "bare.caption").write_bytes(b"caf\xe9")
    listing = list_folder(tmp_path)
    assert list(listing.paths) == ["a/c.PNG", "b.jpg"]
    assert listing.captions["b.jpg"] == ["three", "two", "one"]  # .caption comes before .txt; both count, none twice
    assert reasons(listing) == {
        "a/d.txt": "empty",
        "a/d.webp": "no caption",
        "lonely.txt": "no image of this name",
        "bare.caption": "not UTF-8",
        "bare.png": "no caption",
    }


def test_names_with_accents_match_however_they_are_composed(tmp_path):
    apart, together = (unicodedata.normalize(form, "été 夏") for form in ("NFD", "NFC"))
    assert apart != together
    picture(tmp_path / f"{apart}.png")
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": f"{together}.png", "text": "summer"}))
    listing = list_folder(tmp_path)
    assert listing.captions == {f"{together}.png": ["summer"]}
    assert listing.paths[f"{together}.png"].exists()


def test_jsonl_of_hugging_face_and_kohya(tmp_path):
    for name in ("train/1.png", "train/2.png", "train/sub/3.png", "same.png", "train/sub/same.png"):
        picture(tmp_path / name)
    rows = [
        {"file_name": "1.png", "text": ["first", "uno"], "width": 5},
        {"image_path": "C:\\sets\\mine\\2.png", "caption": "second"},
        {"image_path": "/home/else/3.png", "caption": "third"},
        {"file_name": "../same.png", "text": "above"},
        {"file_name": "elsewhere/same.png", "text": "two files of this name"},
        {"file_name": "../../../etc/passwd", "text": "outside"},
        {"text": "no file"},
        {"file_name": "1.png", "text": 7},
        {"file_name": "1.png"},
    ]
    write(tmp_path / "train/metadata.jsonl", "\n".join([json.dumps(row) for row in rows[:4]] + ["{not json"]))
    write(tmp_path / "train/more.jsonl", "\n".join(json.dumps(row) for row in rows[4:]))
    listing = list_folder(tmp_path)
    assert listing.captions == {
        "train/1.png": ["first", "uno"],
        "train/2.png": ["second"],
        "train/sub/3.png": ["third"],
        "same.png": ["above"],
    }
    found = [(one.name, one.reason) for one in listing.rejected]
    assert found == [
        ("train/metadata.jsonl", "line 5 is not JSON"),
        ("elsewhere/same.png", "named in train/more.jsonl, but no file here, or several"),
        ("../../../etc/passwd", "named in train/more.jsonl, but no file here, or several"),
        ("train/more.jsonl", "line 3 has no file_name or image_path"),
        ("train/more.jsonl", "line 4 has captions that are no text"),
        ("1.png", "no caption in train/more.jsonl"),
        ("train/sub/same.png", "no caption"),
    ]


def test_captions_json_and_coco(tmp_path):
    for name in ("set/1.png", "set/2.png", "val/000007.jpg", "val/000008.jpg"):
        picture(tmp_path / name)
    write(tmp_path / "set/captions.json", json.dumps({"1.png": "one", "2": {"caption": ["two", "zwei"]}, "3.png": "x"}))
    coco = {
        "images": [{"id": 1, "file_name": "000007.jpg"}, {"id": 2, "file_name": "000008.jpg"}],
        "annotations": [{"image_id": i, "caption": f"caption {i}{j}\n"} for j in "ab" for i in (1, 2)],
    }
    write(tmp_path / "annotations/captions_val.json", json.dumps(coco))
    write(tmp_path / "captions_broken.json", json.dumps({"annotations": [{"image_id": 1}], "images": []}))
    write(tmp_path / "settings.json", "not even json, and none of our business")
    listing = list_folder(tmp_path)
    assert listing.captions == {
        "set/1.png": ["one"],
        "set/2.png": ["two", "zwei"],
        "val/000007.jpg": ["caption 1a", "caption 1b"],
        "val/000008.jpg": ["caption 2a", "caption 2b"],
    }
    assert reasons(listing) == {
        "3.png": "named in set/captions.json, but no file here, or several",
        "captions_broken.json": "not COCO captions (KeyError: 1)",
    }


def test_parquet_without_pyarrow_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert reasons(list_folder(tmp_path))["metadata.parquet"] == "pyarrow is not installed"


def test_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    picture(tmp_path / "1.png")
    table = pa.table({"file_name": ["1.png", "2.png"], "text": [["one", "uno"], ["two"]], "score": [1, 2]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really PAR1")
    listing = list_folder(tmp_path)
    assert listing.captions == {"1.png": ["one", "uno"]}
    assert reasons(listing)["broken.parquet"].startswith("not a parquet file")


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
    assert images.upright_size(data) == (20, 40)
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


# the dataset


class Counting:
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
    code = "import sys; sys.modules['PIL'] = None\nimport softrepa.dataset, softrepa.latent_lists, softrepa.captions"
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
    assert re.sub(r" \(\d+ bytes not processed\)", "", summary(read(photos))).splitlines() == [
        "14 images, 14 captions (13 different)",
        "trained at 128x128 (14)",
        '1 captions of several images, which never meet in a batch: "picture 3" (2 images)',
        "1 images in several copies: 05.png = copy.png",
        "originals from 50x60 to 300x200",
        "1 are enlarged: small.jpg",
        "left out 4 (no caption: bare.png; image file is truncated: cut.png; "
        "no image that can be opened: fake.jpg; 2 frames or pages: moving.gif)",
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
    monkeypatch.setattr(folder, "upright_size", lambda data: inspected.append(len(data)) or real(data))
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
    (photos.parent / "index.json").write_text("{broken")
    assert read(photos).train == changed.train


def test_reading_that_is_stopped_remembers_what_it_read(photos, monkeypatch):
    class Stop(BaseException):
        pass

    def tick(done, total):
        assert total == 12
        if done == 5:
            raise Stop

    with pytest.raises(Stop):
        read_folder(photos, "photos", 128, False, 0.0, photos.parent / "index.json", tick)
    inspected = []
    monkeypatch.setattr(folder, "upright_size", lambda data: inspected.append(data) or (300, 200))
    read(photos)
    assert len(inspected) == 7


def test_an_image_that_goes_away_later(photos):
    found = read(photos)
    (photos / "00.png").unlink()
    picture(photos / "01.png", (64, 64), "yellow")
    for name, reason in (("00.png", "No such file or directory"), ("01.png", "its content has changed")):
        example = next(one for one in found.train if one.name == name)
        with pytest.raises(SoftREPAError) as caught:
            found.pixels(example)
        assert str(caught.value).startswith(f'Dataset "photos": {name} cannot be used any more ({reason}), expected')


def test_a_folder_without_captions(tmp_path):
    picture(tmp_path / "photos" / "1.png")
    with pytest.raises(SoftREPAError, match=r'folder "photos" has no captioned image \(no caption: 1.png\), expected'):
        read(tmp_path / "photos")


# the cache


def entry(size=1000):
    return {"x": torch.arange(size, dtype=torch.float32)}


def test_the_cache_keeps_its_limit_and_drops_the_oldest(tmp_path):
    cache = Cache(tmp_path, limit=20_000)
    cache.make_room(12_600, keep=set())
    for number, key in enumerate(("a/1", "a/2", "b/3")):
        assert cache.write(key, entry())
        os.utime(cache.path(key), (number, number))
    cache.make_room(9_000, keep={"a/1"})
    assert [cache.has(key) for key in ("a/1", "a/2", "b/3")] == [True, False, True]
    written = [cache.write(f"c/{i}", entry()) for i in range(5)]
    assert written == [True, True, False, False, False]
    assert sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()) <= 20_000


def test_a_smaller_limit_counts_once_something_is_written(tmp_path):
    cache = Cache(tmp_path, limit=10**6)
    cache.make_room(10**5, keep=set())
    for i in range(10):
        cache.write(str(i), entry())
    small = Cache(tmp_path, limit=5_000)
    small.make_room(0, keep=set())
    assert sum(small.has(str(i)) for i in range(10)) == 10
    Cache(tmp_path, limit=0).make_room(4_500, keep=set())
    assert sum(small.has(str(i)) for i in range(10)) == 10
    small.make_room(9_000, keep=set())
    assert not any(small.has(str(i)) for i in range(10))
    assert [small.write(f"new {i}", entry()) for i in range(2)] == [True, False]


def test_a_dataset_larger_than_the_limit_keeps_what_it_has(tmp_path):
    cache = Cache(tmp_path, limit=9_000)
    cache.make_room(9_000, keep=set())
    assert [cache.write(str(i), entry()) for i in range(3)] == [True, True, False]
    cache.make_room(4_500, keep={"0", "1", "2"})
    assert [cache.has(str(i)) for i in range(3)] == [True, True, False]
    assert not cache.write("2", entry())


def test_damaged_entries_are_as_absent(tmp_path):
    cache = Cache(tmp_path, limit=10**6)
    cache.make_room(10**5, keep=set())
    cache.write("k", entry())
    assert torch.equal(cache.read("k")["x"], entry()["x"])
    cache.make_room(0, keep={"k"})
    cache.path("k").write_bytes(cache.path("k").read_bytes()[:-10])
    assert cache.read("k") is None
    assert not cache.has("k")
    assert cache.write("k", entry())
    assert torch.equal(cache.read("k")["x"], entry()["x"])
    assert cache.read("never") is None
    assert not list(tmp_path.rglob("*.tmp"))


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
