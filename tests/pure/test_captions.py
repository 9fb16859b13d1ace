"""Which images a folder holds and which captions they get, in the layouts that people have."""

import errno
import io
import json
import os
import random
import subprocess
import sys
import tarfile
import threading
import unicodedata
from pathlib import Path

import pytest
from comfyui_softrepa.softrepa.data import sources, tables
from comfyui_softrepa.softrepa.data.captions import WHOLE, list_folder, repeats_of
from comfyui_softrepa.softrepa.data.left_out import LeftOut
from comfyui_softrepa.softrepa.data.tables import CAPTION_KEYS, FILE_KEYS
from PIL import Image
from softrepa_tests.conftest import ROOT
from softrepa_tests.folders import captions, picture, reasons, write


def test_text_files_beside_images(tmp_path):
    for name in ("b.jpg", "a/c.PNG", "a/d.webp", "bare.png", ".hidden/x.png"):
        picture(tmp_path / name)
    write(tmp_path / "b.txt", "\ufeffone\n\n  two \none\n")
    write(tmp_path / "b.caption", "three\ntwo")
    write(tmp_path / "a/c.txt", "see")
    write(tmp_path / "a/d.txt", " \n")
    write(tmp_path / "lonely.txt", "nobody")
    write(tmp_path / "bare.caption", b"caf\xe9")
    listing = list_folder(tmp_path)
    assert list(listing.sources) == ["a/c.PNG", "b.jpg"]
    assert listing.captions["b.jpg"] == ["three", "two", "one"]  # .caption comes before .txt; both count, none twice
    assert reasons(listing) == {
        "empty": ["a/d.txt"],
        "no image of this name": ["lonely.txt"],
        "not UTF-8": ["bare.caption"],
        "no caption": ["a/d.webp", "bare.png"],
    }


def test_names_with_accents_match_however_they_are_composed(tmp_path):
    apart, together = (unicodedata.normalize(form, "été 夏") for form in ("NFD", "NFC"))
    assert apart != together
    picture(tmp_path / f"{apart}.png")
    write(tmp_path / "metadata.jsonl", json.dumps({"file_name": f"{together}.png", "text": "summer"}))
    listing = list_folder(tmp_path)
    assert captions(listing) == {f"{together}.png": ["summer"]}
    assert listing.sources[f"{together}.png"].read(10**6)


def test_jsonl_of_hugging_face_and_kohya(tmp_path):
    for name in ("train/1.png", "train/2.png", "train/sub/3.png", "same.png", "train/sub/same.png"):
        picture(tmp_path / name)
    rows = [
        {"file_name": "1.png", "text": ["first", "uno"], "width": 5},
        {"image_path": "2.png", "caption": "second"},
        {"image_path": "sub\\3.png", "caption": "third"},
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
    assert captions(listing) == {
        "train/1.png": ["first", "uno"],
        "train/2.png": ["second"],
        "train/sub/3.png": ["third"],
        "same.png": ["above"],
    }
    assert reasons(listing) == {
        "not JSON in train/metadata.jsonl": ["line 5"],
        "no file, or several, for a row of train/more.jsonl": ["elsewhere/same.png", "../../../etc/passwd"],
        f"none of {', '.join(FILE_KEYS)} in train/more.jsonl": ["line 3"],
        "captions that are no text in train/more.jsonl": ["line 4"],
        "no caption in train/more.jsonl": ["1.png"],
        "no caption": ["train/sub/same.png"],
    }


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
    listing = list_folder(tmp_path)
    assert captions(listing) == {
        "set/1.png": ["one"],
        "set/2.png": ["two", "zwei"],
        "val/000007.jpg": ["caption 1a", "caption 1b"],
        "val/000008.jpg": ["caption 2a", "caption 2b"],
    }
    assert reasons(listing) == {
        "no file, or several, for a row of set/captions.json": ["3.png"],
        "no image, or several, of this annotation's image_id in captions_broken.json": ["annotation 1"],
    }


def test_parquet_without_pyarrow_is_named(tmp_path, monkeypatch):
    picture(tmp_path / "1.png")
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert reasons(list_folder(tmp_path))["pyarrow is not installed"] == ["metadata.parquet"]


def test_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    picture(tmp_path / "1.png")
    table = pa.table({"file_name": ["1.png", "2.png"], "text": [["one", "uno"], ["two"]], "score": [1, 2]})
    parquet.write_table(table, tmp_path / "metadata.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really PAR1")
    listing = list_folder(tmp_path)
    assert captions(listing) == {"1.png": ["one", "uno"]}
    assert any(
        why.startswith("not a parquet file") and names == ["broken.parquet"] for why, names in reasons(listing).items()
    )


# a row and the file it means


def test_a_file_that_is_gone_gives_its_captions_to_no_other(tmp_path):
    for name in ("cats/001.png", "cats/002.png", "dogs/002.png"):
        picture(tmp_path / name)
    names = ("cats/001.png", "cats/002.png", "dogs/001.png", "dogs/002.png")
    write(tmp_path / "metadata.jsonl", [{"file_name": name, "text": f"about {name}"} for name in names])
    listing = list_folder(tmp_path)
    assert captions(listing) == {name: [f"about {name}"] for name in ("cats/001.png", "cats/002.png", "dogs/002.png")}
    assert listing.left_out.counts == {"no file, or several, for a row of metadata.jsonl": 1}


@pytest.mark.parametrize("gone", ["birds/001.png", "001.png", "/disk/of/others/001.png"])
def test_a_file_that_another_row_names_exactly_is_its_own(tmp_path, gone):
    picture(tmp_path / "cats/001.png")
    write(tmp_path / "metadata.jsonl", [{"file_name": "cats/001.png", "text": "a cat"}])
    write(tmp_path / "more.jsonl", [{"file_name": gone, "text": "a bird"}])
    assert captions(list_folder(tmp_path)) == {"cats/001.png": ["a cat"]}


def test_an_emptied_folder_is_still_a_folder(tmp_path):
    picture(tmp_path / "cats/001.png")
    (tmp_path / "dogs").mkdir()
    write(tmp_path / "metadata.jsonl", [{"file_name": "/disk/of/others/dogs/001.png", "text": "a dog"}])
    assert captions(list_folder(tmp_path)) == {}


def test_two_rows_for_one_file_name_no_other(tmp_path):
    picture(tmp_path / "set/cats/001.png")
    picture(tmp_path / "set/cats/002.png")
    rows = [("/a/cats/001.png", "one"), ("/b/cats/001.png", "two"), ("/a/cats/002.png", "x"), ("/a/cats/002.png", "y")]
    write(tmp_path / "metadata.jsonl", [{"file_name": name, "text": text} for name, text in rows])
    assert captions(list_folder(tmp_path)) == {"set/cats/002.png": ["x", "y"]}


def test_names_beside_a_table_are_not_looked_for_elsewhere(tmp_path):
    picture(tmp_path / "train/1.png")
    picture(tmp_path / "other/2.png")
    write(tmp_path / "train/metadata.jsonl", [{"file_name": f"{i}.png", "text": f"train {i}"} for i in (1, 2)])
    assert captions(list_folder(tmp_path)) == {"train/1.png": ["train 1"]}


def test_the_longest_end_of_a_path_counts(tmp_path):
    picture(tmp_path / "mine/cats/1.png")
    picture(tmp_path / "mine/dogs/1.png")
    rows = [{"image_path": f"D:\\sets\\{kind}\\1.png", "caption": f"a {kind[:-1]}"} for kind in ("cats", "dogs")]
    write(tmp_path / "meta.jsonl", rows)
    assert captions(list_folder(tmp_path)) == {"mine/cats/1.png": ["a cat"], "mine/dogs/1.png": ["a dog"]}
    write(tmp_path / "meta.jsonl", [{"file_name": str(tmp_path / "mine/cats/1.png"), "text": "whole path"}])
    assert captions(list_folder(tmp_path)) == {"mine/cats/1.png": ["whole path"]}


def rows_for(**texts) -> list:
    return [{"file_name": name, "text": text} for name, text in texts.items()]


CAPTIONED = {
    "a text beside": {"cats/images/001.txt": "a cat"},
    "a folder of captions": {"cats/captions/001.txt": "a cat"},
    "JSON beside": {"cats/images/001.json": '{"caption": "a cat"}'},
    "nothing": {},
}


@pytest.mark.parametrize("files", CAPTIONED.values(), ids=CAPTIONED)
@pytest.mark.parametrize("table", ["metadata.jsonl", "captions_all.json"])
@pytest.mark.parametrize("gone", ["001.png", "images/001.png", "/data/dogs/001.png", "/data/dogs/images/001.png"])
def test_no_caption_crosses_from_one_set_into_another(tmp_path, files, table, gone):
    picture(tmp_path / "cats/images/001.png")
    for name, content in files.items():
        write(tmp_path / name, content)
    is_jsonl = table.endswith(".jsonl")
    write(tmp_path / "dogs" / table, rows_for(**{gone: "a DOG"}) if is_jsonl else json.dumps({gone: "a DOG"}))
    listing = list_folder(tmp_path)
    assert captions(listing) == ({"cats/images/001.png": ["a cat"]} if files else {})
    assert reasons(listing)[f"no file, or several, for a row of dogs/{table}"] == [gone]


def test_a_table_some_of_whose_files_are_here_means_no_others(tmp_path):
    for name in ("cats/images/001.png", "dogs/images/002.png", "images/003.png"):
        picture(tmp_path / name)
    names = ("images/001.png", "images/002.png", "/x/images/003.png")
    write(tmp_path / "dogs/metadata.jsonl", rows_for(**{name: f"dog {name}" for name in names}))
    assert captions(list_folder(tmp_path)) == {"dogs/images/002.png": ["dog images/002.png"]}


@pytest.mark.parametrize("name", ["/data/dogs/001.png", "z/001.png"])
def test_a_row_of_another_folder_name_means_no_picture(tmp_path, name):
    picture(tmp_path / "cats/001.png")
    write(tmp_path / "meta_cap.json", json.dumps({name: "a DOG"}))
    write(tmp_path / "y/metadata.jsonl", rows_for(**{name: "a DOG"}))
    assert captions(list_folder(tmp_path)) == {}


def test_a_folder_that_the_row_names_is_looked_into_alone(tmp_path):
    picture(tmp_path / "images/001.png")
    (tmp_path / "lists/images").mkdir(parents=True)
    write(tmp_path / "lists/metadata.jsonl", rows_for(**{"images/001.png": "another"}))
    assert captions(list_folder(tmp_path)) == {}
    picture(tmp_path / "mine/b/001.png")
    (tmp_path / "mine/a/b").mkdir(parents=True)
    write(tmp_path / "mine/meta.jsonl", rows_for(**{"/data/a/b/001.png": "another"}))
    assert captions(list_folder(tmp_path)) == {}


def test_a_picture_that_its_folder_captions_is_not_guessed(tmp_path):
    picture(tmp_path / "10_red ball/001.png")
    write(tmp_path / "captions.txt", "001.png#0\ta dog\n")
    assert captions(list_folder(tmp_path)) == {"10_red ball/001.png": ["red ball"]}


def test_paths_of_another_machine_that_keep_their_folder(tmp_path):
    root = tmp_path / "photos"
    for name in ("0.png", "cats/1.png", "train/2.png"):
        picture(root / name)
    write(root / "meta_cap.json", json.dumps({"/x/photos/0.png": "here", "C:\\x\\cats\\1": "below"}))
    write(root / "lists/two.jsonl", rows_for(**{"/coco/train/2.png": "beside the table's folder"}))
    assert captions(list_folder(root)) == {
        "0.png": ["here"],
        "cats/1.png": ["below"],
        "train/2.png": ["beside the table's folder"],
    }


def test_paths_of_another_machine_are_refused_where_the_folder_was_renamed(tmp_path):
    picture(tmp_path / "renamed/0.png")
    write(tmp_path / "renamed/meta_cap.json", json.dumps({"/x/photos/0.png": "here?"}))
    assert captions(list_folder(tmp_path)) == {}


@pytest.mark.parametrize(
    ("images", "tables", "expected"),
    [
        (["cats/1.png"], {"a.jsonl": ["cats/1.png"], "lists/b.jsonl": ["cats/1.png"]}, {"cats/1.png": "a.jsonl"}),
        (["1.png", "mine/cats/2.png"], {"a.jsonl": ["1.png", "/x/cats/2.png"]}, {"1.png": "a.jsonl"}),
        (["images/1.png"], {"lists/a.jsonl": ["deep/images/1.png"]}, {}),
        (["set/images/1.png"], {"a.jsonl": ["images/1.png"]}, {}),
        (["images/1.png", "data/2.png"], {"data/a.jsonl": ["images/1.png"]}, {}),
    ],
    ids=["named exactly elsewhere", "another row is exact", "half a path", "below another folder", "not alone"],
)
def test_rows_that_may_mean_another_picture_are_refused(tmp_path, images, tables, expected):
    for name in images:
        picture(tmp_path / name)
    for table, names in tables.items():
        write(tmp_path / table, rows_for(**dict.fromkeys(names, table)))
    assert captions(list_folder(tmp_path)) == {name: [table] for name, table in expected.items()}


def test_a_path_from_the_top_of_a_disk_is_none_from_the_top_of_the_folder(tmp_path):
    for name in ("lists/1.png", "x/2.png"):
        picture(tmp_path / name)
    write(tmp_path / "lists/meta.jsonl", rows_for(**{"/x/2.png": "of another disk"}))
    assert captions(list_folder(tmp_path)) == {}


def test_names_from_the_folder_above_the_table(tmp_path):
    for name in ("images/1.png", "data/2.png", "set/images/3.png"):
        picture(tmp_path / name)
    write(tmp_path / "lists/one.jsonl", rows_for(**{"images/1.png": "from above"}))
    write(tmp_path / "data/metadata.jsonl", rows_for(**{"data/2.png": "with its own folder"}))
    write(tmp_path / "metadata.jsonl", rows_for(**{"images/3.png": "below another folder: refused"}))
    assert captions(list_folder(tmp_path)) == {"images/1.png": ["from above"], "data/2.png": ["with its own folder"]}


@pytest.mark.parametrize("table", ["captions.txt", "text/Flickr8k.token.txt", "results.csv"])
def test_flickr_names_files_of_a_folder_beside_it(tmp_path, table):
    picture(tmp_path / "Images/1.jpg")
    is_token = table.endswith("token.txt")
    write(tmp_path / table, "1.jpg#0\ta dog\n" if is_token else "image_name,caption\n1.jpg,a dog\n")
    assert captions(list_folder(tmp_path)) == {"Images/1.jpg": ["a dog"]}
    picture((tmp_path / table).parent / "2.jpg")  # now its pictures stand beside it
    assert captions(list_folder(tmp_path)) == {}


def coco(images, notes) -> str:
    return json.dumps(
        {
            "images": [{"id": number, "file_name": name} for number, name in images],
            "annotations": [{"image_id": number, "caption": caption} for number, caption in notes],
        }
    )


def test_two_tables_that_mean_different_files_of_one_name(tmp_path):
    picture(tmp_path / "train/1.jpg")
    picture(tmp_path / "train/2.jpg")
    write(tmp_path / "annotations/captions_train.json", coco([(1, "1.jpg"), (2, "2.jpg")], [(1, "one"), (2, "two")]))
    write(tmp_path / "annotations/captions_val.json", coco([(1, "1.jpg")], [(1, "VAL one")]))
    listing = list_folder(tmp_path)
    assert captions(listing) == {"train/2.jpg": ["two"]}
    assert reasons(listing)["no file, or several, for a row of annotations/captions_val.json"] == ["1.jpg"]


def test_ids_of_two_coco_images_mean_none(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.jpg")
    images = [(1, "0.jpg"), (True, "1.jpg"), (2, "2.jpg"), (2, "3.jpg"), *[(3, "3.jpg")] * 2, (4, "0.jpg"), (4, 5)]
    notes = [(1, "zero"), (True, "TRUE"), (2, "two or three"), (3, "three"), (4, "a broken image")]
    write(tmp_path / "captions_val.json", coco(images, notes))
    listing = list_folder(tmp_path)
    assert captions(listing) == {"0.jpg": ["zero"], "3.jpg": ["three"]}
    assert listing.left_out.counts["no image, or several, of this annotation's image_id in captions_val.json"] == 3


def test_a_name_with_suffix_means_no_longer_name(tmp_path):
    picture(tmp_path / "a.jpg.png")
    picture(tmp_path / "b.png")
    write(tmp_path / "metadata.jsonl", rows_for(**{"a.jpg": "of a file that is gone", "b": "without suffix"}))
    assert captions(list_folder(tmp_path)) == {"b.png": ["without suffix"]}
    picture(tmp_path / "a.jpg")
    write(tmp_path / "a.jpg.txt", "of the whole name")
    (tmp_path / "metadata.jsonl").unlink()
    assert captions(list_folder(tmp_path)) == {"a.jpg": ["of the whole name"]}


# files that cannot be told apart, or not be looked at


def test_names_that_differ_in_how_accents_are_composed_are_left_out(tmp_path, monkeypatch):
    apart, together = (unicodedata.normalize(form, "é") for form in ("NFD", "NFC"))
    for name in (f"{apart}.png", f"{together}.png", f"{apart}x/1.png", f"{together}x/2.png", "fine.png"):
        path = picture(tmp_path / name)
        write(path.with_suffix(".txt"), f"of {name}")
    if len(list(tmp_path.glob("*.png"))) < 3:  # a file system that takes the two for one
        return
    listing = list_folder(tmp_path)
    assert captions(listing) == {"fine.png": ["of fine.png"]}
    assert listing.left_out.counts == {"its name looks like another's, with accents composed and apart": 8}


def test_files_and_folders_that_may_not_be_looked_at(tmp_path, monkeypatch):
    picture(tmp_path / "1.png")
    write(tmp_path / "1.txt", "a dog")
    picture(tmp_path / "closed/2.png")
    picture(tmp_path / "blind/3.png")
    stat, scandir = Path.stat, os.scandir

    def denied_stat(path, **options):
        if path.parent.name == "blind":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return stat(path, **options)

    def denied_scandir(path):
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(Path, "stat", denied_stat)
    monkeypatch.setattr(os, "scandir", denied_scandir)
    listing = list_folder(tmp_path)
    assert captions(listing) == {"1.png": ["a dog"]}
    assert reasons(listing) == {
        "Permission denied": ["closed"],
        "no regular file that may be looked at": ["blind/3.png"],
    }


# what is told


def test_a_table_that_nobody_understands_is_one_line(tmp_path):
    for i in range(3):
        picture(tmp_path / f"images/{i}.png")
        write(tmp_path / f"images/{i}.txt", f"scene {i}")
    write(tmp_path / "log.jsonl", [{"image": f"images/{i}.png", "note": "x"} for i in range(10_000)])
    write(tmp_path / "more.jsonl", [{"width": i} for i in range(10_000)])
    listing = list_folder(tmp_path)
    assert captions(listing) == {f"images/{i}.png": [f"scene {i}"] for i in range(3)}
    told = listing.left_out.told()
    assert told.startswith("left out 20000 (")
    assert "no caption in log.jsonl (10000): images/0.png, images/1.png, ..." in told
    assert "(10000): line 1, line 2, ..." in told
    assert len(told) < 400


def test_what_is_told_is_bounded_however_much_is_wrong():
    left_out = LeftOut()
    for number in range(1000):
        left_out.add("n" * 10_000, f"{number} " + "r" * 10_000)
    assert len(left_out.told()) < 2000
    assert "and 992 more reasons" in left_out.told()
    assert left_out.counts.total() == 1000


def test_one_stray_row_refuses_no_coco_file(tmp_path):
    for i in range(2):
        picture(tmp_path / f"{i}.jpg")
    notes = [(0, "a dog"), (1, "a cat"), (1, None), (7, "of nobody"), ([], "no id"), (None, "none")]
    coco = {
        "images": [*({"id": i, "file_name": f"{i}.jpg"} for i in range(2)), {"file_name": "1.jpg"}, 5],
        "annotations": [*({"image_id": i, "caption": caption} for i, caption in notes), "text"],
    }
    write(tmp_path / "captions_val.json", json.dumps(coco))
    listing = list_folder(tmp_path)
    assert captions(listing) == {"0.jpg": ["a dog"], "1.jpg": ["a cat"]}
    assert listing.left_out.counts == {
        "captions that are no text in captions_val.json": 1,
        "no image, or several, of this annotation's image_id in captions_val.json": 4,
    }
    write(tmp_path / "captions_val.json", json.dumps({"annotations": [], "images": 3}))
    assert reasons(list_folder(tmp_path))["COCO annotations without a list of images"] == ["captions_val.json"]


# text files


def test_encodings(tmp_path):
    for name, data in (
        ("little", "\ufeffa dog".encode("utf-16-le")),
        ("big", "\ufeffa dog".encode("utf-16-be")),
        ("bom8", "a dog".encode("utf-8-sig")),
        ("bare", "a dog".encode("utf-16-le")),
        ("wide", "a dog".encode("utf-32")),
        ("half", "\ufeffa dog".encode("utf-16-le")[:-1]),
    ):
        picture(tmp_path / f"{name}.png")
        write(tmp_path / f"{name}.txt", data)
    listing = list_folder(tmp_path)
    assert captions(listing) == {f"{name}.png": ["a dog"] for name in ("big", "bom8", "little")}
    assert reasons(listing) == {
        "no text (it has NUL bytes, as UTF-16 without a byte-order mark)": ["bare.txt"],
        "no text (it has NUL characters)": ["wide.txt"],
        "not UTF-16": ["half.txt"],
        "no caption": ["bare.png", "half.png"],
    }


def test_lines_end_where_files_end_them(tmp_path):
    picture(tmp_path / "1.png")
    write(tmp_path / "1.txt", "one\u2028still one\r\ntwo\u0085still two\n\nthree\x0bstill three\n")
    listing = list_folder(tmp_path)
    assert captions(listing) == {"1.png": ["one\u2028still one", "two\u0085still two", "three\x0bstill three"]}
    assert listing.several_lines == 1


def test_a_text_can_be_one_caption(tmp_path):
    picture(tmp_path / "1.png")
    picture(tmp_path / "2.png")
    write(tmp_path / "1.txt", "A room.\r\n\r\n- Mood: calm\n")
    write(tmp_path / "2.txt", "a dog")
    write(tmp_path / "metadata.jsonl", [{"file_name": "2.png", "text": "from a table"}])
    listing = list_folder(tmp_path, WHOLE)
    assert captions(listing) == {"1.png": ["A room.\n\n- Mood: calm"], "2.png": ["a dog", "from a table"]}
    assert listing.several_lines == 0


def test_a_caption_of_a_megabyte_is_a_mistake(tmp_path):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    write(tmp_path / "0.txt", "a dog " * 200_000)
    write(tmp_path / "1.txt", "a dog " * 2_000)
    write(tmp_path / "2.jsonl", [{"file_name": "2.png", "text": "a dog " * 2_000}, {"file_name": "2.png", "text": "a"}])
    listing = list_folder(tmp_path)
    assert captions(listing) == {"2.png": ["a"]}
    assert reasons(listing) == {
        "cannot be read (1,200,000 bytes, expected at most 262,144)": ["0.txt"],
        "a caption of more than 10,000 characters": ["1.txt"],
        "a caption of more than 10,000 characters in 2.jsonl": ["line 1"],
        "no caption": ["0.png", "1.png"],
    }


def test_captions_and_names_that_no_file_can_hold(tmp_path):
    picture(tmp_path / "1.png")
    write(
        tmp_path / "metadata.jsonl", '{"file_name": "1.png", "text": "\\udcff"}\n{"file_name": "\\udcff", "text": "x"}'
    )
    write(tmp_path / "captions.json", "[" * 100_000)
    listing = list_folder(tmp_path)
    assert captions(listing) == {}
    assert reasons(listing)["captions that are no text in metadata.jsonl"] == ["line 1"]
    assert reasons(listing)["not JSON"] == ["captions.json"]
    listing.left_out.told().encode()


def test_pipes_and_devices_are_passed_over(tmp_path):
    if not hasattr(os, "mkfifo"):  # on Windows no folder holds any
        return
    picture(tmp_path / "1.png")
    write(tmp_path / "1.txt", "a dog")
    for name in ("2.png", "2.txt", "metadata.jsonl", "shard.tar", "more.parquet", "captions.json"):
        os.mkfifo(tmp_path / name)
    (tmp_path / "endless.txt").symlink_to("/dev/zero")
    (tmp_path / "endless.png").symlink_to("/dev/zero")
    listing = list_within_a_minute(tmp_path)
    assert captions(listing) == {"1.png": ["a dog"]}
    assert listing.left_out.counts == {"no regular file that may be looked at": 8}


def list_within_a_minute(root):
    """None where it hangs."""
    found = [None]
    thread = threading.Thread(target=lambda: found.append(list_folder(root)), daemon=True)
    thread.start()
    thread.join(60)
    return found[-1]


# further layouts


def test_files_beside_an_image(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.jpg")
    write(tmp_path / "0.jpg.txt", "of the whole name")
    write(tmp_path / "1.json", json.dumps({"caption": "of an object", "width": 3}))
    write(tmp_path / "2.json", json.dumps({"tags": ["1girl", "red hat"], "text": None}))
    write(tmp_path / "3.json", json.dumps({"shapes": []}))
    write(tmp_path / "4.json", "{broken")
    listing = list_folder(tmp_path)
    assert captions(listing) == {"0.jpg": ["of the whole name"], "1.jpg": ["of an object"], "2.jpg": ["1girl, red hat"]}
    assert reasons(listing) == {"not JSON": ["4.json"], "no caption": ["3.jpg", "4.jpg"]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"text": "", "caption": "real"}, ["real"]),
        ({"tags": ["red", "hat"], "text": ""}, ["red, hat"]),
        ({"text": [" "], "captions": ["one", "two"]}, ["one", "two"]),
        ({"caption": "first", "prompt": "second"}, ["first"]),
    ],
)
def test_an_empty_text_hides_no_caption(tmp_path, content, expected):
    picture(tmp_path / "0.png")
    picture(tmp_path / "1.png")
    write(tmp_path / "0.json", json.dumps(content))
    write(tmp_path / "metadata.jsonl", [{"file_name": "1.png", **content}])
    assert captions(list_folder(tmp_path)) == {"0.png": expected, "1.png": expected}


def test_json_of_other_names_is_reported(tmp_path):
    for name in ("metadata.json", "dataset.json", "annotations.json", "a.json"):
        write(tmp_path / name, "{}")
    reason = "no image of this name, and no name of a table (captions*.json, meta_*.json)"
    assert list_folder(tmp_path).left_out.counts == {reason: 4}


def test_a_reason_comes_before_what_may_be_cut_off(tmp_path):
    name = "n" * 200
    write(tmp_path / f"{name}.jsonl", [{"file_name": "gone.png", "text": "x"}, {"file_name": "a.png", "text": 7}])
    write(tmp_path / f"{name}.csv", "picture;" + "words;" * 100 + "\n")
    told = list_folder(tmp_path).left_out.told()
    assert 'columns "picture;words;' in told
    for reason in ("no file, or several, for a row of nnn", "captions that are no text in nnn"):
        assert reason in told
    assert "expected one for files and one for captions (file_name, text): nnn" in told


def test_captions_in_a_folder_beside_the_images(tmp_path):
    picture(tmp_path / "set/images/a/1.jpg")
    picture(tmp_path / "set/images/b/1.jpg")
    write(tmp_path / "set/captions/a/1.txt", "of a")
    write(tmp_path / "set/captions/b/1.txt", "of b")
    write(tmp_path / "set/captions/c/1.txt", "of nobody")
    listing = list_folder(tmp_path)
    assert captions(listing) == {"set/images/a/1.jpg": ["of a"], "set/images/b/1.jpg": ["of b"]}
    assert reasons(listing) == {"no image of this name": ["set/captions/c/1.txt"]}


def test_the_last_folder_of_captions_is_the_one(tmp_path):
    picture(tmp_path / "captions/images/1.jpg")
    write(tmp_path / "captions/captions/1.txt", "a dog")
    assert captions(list_folder(tmp_path)) == {"captions/images/1.jpg": ["a dog"]}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.csv", 'file_name,text\n0.png,"a dog, asleep"\n1.png,a cat\n'),
        ("metadata.csv", '\ufefffile_name;width;prompt\r\n0.png;3;a dog, asleep\r\n\r\n1.png;4;"a cat"\r\n'),
        ("list.tsv", "caption\tfilename\na dog, asleep\t0.png\na cat\t1.png\n"),
        ("old.csv", "image,caption\r0.png,a dog, asleep\r1.png,a cat\r"),
        ("captions.txt", "image,caption\n0.png,a dog, asleep\n1.png,a cat\n"),
        ("results.csv", "image_name| comment_number| caption\n0.png| 0| a dog, asleep\n1.png| 0| a cat\n"),
        ("results.csv", "image_name| comment_number| comment\n0.png| 0| a dog, asleep\n1.png| 0| a cat\n"),
        ("excel.csv", "sep=;\r\nfile_path;text\r\n0.png;a dog, asleep\r\n1.png;a cat\r\n"),
        ("metadata.jsonl", '{"filepath": "0.png", "text": "a dog, asleep"}\n{"file_path": "1.png", "text": "a cat"}'),
        ("Flickr8k.token.txt", "0.png#0\ta dog, asleep\n1.png#4\ta cat\n"),
        ("captions.txt", "0.png#0\ta dog, asleep\n1.png#0\ta cat\n"),
        ("meta_cap.json", '{"0.png": {"caption": "a dog, asleep", "tags": "t"}, "1": {"tags": "a cat"}}'),
        ("metadata.jsonl", '{"file_name": "0.png", "prompt": "a dog, asleep"}\n{"file_name": "1", "caption": "a cat"}'),
    ],
)
def test_tables(tmp_path, name, content):
    for i in range(2):
        picture(tmp_path / f"{i}.png")
    write(tmp_path / name, content)
    listing = list_folder(tmp_path)
    assert captions(listing) == {"0.png": ["a dog, asleep"], "1.png": ["a cat"]}
    assert reasons(listing) == {}


def test_rows_that_do_not_fit_are_counted(tmp_path):
    picture(tmp_path / "0.png")
    write(tmp_path / "a.csv", "text,file_name\na dog,0.png\na, dog,0.png\nshort\n" + "x" * 20_000 + ",0.png\n")
    write(tmp_path / "b.csv", "name,words\n0.png,a dog\n")
    write(tmp_path / "captions.txt", "0.png#0\tone\n0.png two\n")
    write(tmp_path / "c.csv", "file_name,text\n0.png,fine\n0.png," + "x" * 200_000)
    listing = list_folder(tmp_path)
    assert captions(listing) == {"0.png": ["a dog", "fine", "one"]}
    assert reasons(listing) == {
        "more or fewer cells than in the first line in a.csv": ["line 3", "line 4"],
        "a caption of more than 10,000 characters in a.csv": ["line 5"],
        'columns "name,words", expected one for files and one for captions (file_name, text)': ["b.csv"],
        "a cell of more than 131,072 characters in c.csv": ["line 3"],
        "no name.jpg#0 with a tab behind it in captions.txt": ["line 2"],
    }


@pytest.mark.parametrize(
    ("content", "expected", "bad"),
    [
        ('0.png,"a dog\n1.png,a cat\n2.png,a bird\n', {1: "a cat", 2: "a bird"}, ["line 2"]),
        ('0.png,"a dog\n1.png,"a cat"\n2.png,a bird\n', {1: "a cat", 2: "a bird"}, ["line 2"]),
        ('0.png,"a dog\n1.png,a cat\n2.png,"\n', {1: "a cat"}, ["line 2", "line 4"]),
        ('0.png,a dog\n1.png,"a" cat\n2.png,a bird\n', {0: "a dog", 2: "a bird"}, ["line 3"]),
        ('0.png,"a dog,\nasleep, calm"\n1.png,"a ""cat"""\n', {0: "a dog,\nasleep, calm", 1: 'a "cat"'}, None),
        ('0.png,"a dog\n' + "1.png,a cat\n" * 20_000, {1: "a cat"}, ["line 2"]),
    ],
)
def test_a_quote_that_nobody_closed_swallows_no_row(tmp_path, content, expected, bad):
    for i in range(3):
        picture(tmp_path / f"{i}.png")
    write(tmp_path / "metadata.csv", f"file_name,text\n{content}")
    listing = list_folder(tmp_path)
    assert captions(listing) == {f"{i}.png": [text] for i, text in expected.items()}
    reason = "a quote that is not closed, or stands inside of a cell in metadata.csv"
    assert reasons(listing).get(reason) == bad


def test_quotes_between_tabs_are_text_unless_they_pair(tmp_path):
    for i in range(4):
        picture(tmp_path / f"{i}.png")
    rows = ('"a dog', '"Up" it says', '"a cat\nasleep"', '"a bird"')
    write(tmp_path / "list.tsv", "file_name\ttext\n" + "".join(f"{i}.png\t{row}\n" for i, row in enumerate(rows)))
    listing = list_folder(tmp_path)
    assert [listing.captions[f"{i}.png"] for i in range(4)] == [
        ['"a dog'],
        ['"Up" it says'],
        ["a cat\nasleep"],
        ["a bird"],
    ]
    assert reasons(listing) == {}


def test_folders_named_with_repeats_and_a_caption(tmp_path):
    for name in ("10_red ball/a.jpg", "10_red ball/b.jpg", "2_blue box/c.jpg", "2019_summer/d.jpg", "001_bird/e.jpg"):
        picture(tmp_path / name)
    write(tmp_path / "10_red ball/b.txt", "its own")
    listing = list_folder(tmp_path)
    assert captions(listing) == {
        "10_red ball/a.jpg": ["red ball"],
        "10_red ball/b.jpg": ["its own"],
        "2_blue box/c.jpg": ["blue box"],
    }
    assert reasons(listing) == {"no caption": ["001_bird/e.jpg", "2019_summer/d.jpg"]}  # numbers and years
    assert [repeats_of(tmp_path, name)[0] for name in listing.sources] == [10, 10, 2]
    assert captions(list_folder(tmp_path / "2_blue box")) == {"c.jpg": ["blue box"]}


# shards


def png(colour, size=(40, 30)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def shard(path, members: dict[str, bytes]):
    with tarfile.open(path, "w") as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


def test_webdataset_shards(tmp_path):
    images = {f"00{i}": png((i, 0, 0)) for i in range(4)}
    shard(
        tmp_path / "00000.tar",
        {
            "000.png": images["000"],
            "000.txt": b"of a text",
            "./001.png": images["001"],
            "./001.json": b'{"caption": "of an object"}',
            "sub/002.png": images["002"],
            "002.txt": b"of nobody",
            "._003.png": b"of a Mac",
            "003.png": images["003"],
            "metadata.csv": b"file_name,text\n003.png,of a table\n",
        },
    )
    listing = list_folder(tmp_path)
    assert captions(listing) == {
        "00000.tar/000.png": ["of a text"],
        "00000.tar/001.png": ["of an object"],
        "00000.tar/003.png": ["of a table"],
    }
    assert [source.read(10**6) for source in listing.sources.values()] == [images[f"00{i}"] for i in (0, 1, 3)]
    with pytest.raises(OSError, match="bytes, expected at most 10"):
        listing.sources["00000.tar/000.png"].read(10)


def members(*pairs):
    """A .tar's content, in which names may come twice."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in pairs:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return file.getvalue()


def test_of_two_members_of_one_name_the_last_counts(tmp_path):
    first = [("a.png", png("red")), ("a.txt", b"old")]
    write(tmp_path / "appended.tar", members(*first, ("./a.png", png("blue")), ("a.txt", b"new")))
    listing = list_folder(tmp_path)
    assert captions(listing) == {"appended.tar/a.png": ["new"]}
    assert listing.sources["appended.tar/a.png"].read(10**6) == png("blue")


def test_a_shard_that_is_cut_off_gives_no_half_of_a_caption(tmp_path):
    whole = members(("a.png", png("red")), ("a.txt", b"one"), ("b.png", png("blue")), ("b.txt", b"a long caption"))
    end = whole.index(b"a long caption") + len(b"a lo")
    write(tmp_path / "cut.tar", whole[:end])
    listing = list_folder(tmp_path)
    assert captions(listing) == {"cut.tar/a.png": ["one"]}
    assert reasons(listing)["a .tar that cannot be read to its end (a member is cut off)"] == ["cut.tar"]
    write(tmp_path / "cut.tar", whole[:520])
    with pytest.raises(OSError, match="it is cut off"):
        listing.sources["cut.tar/a.png"].read(10**6)


def test_keys_of_a_shard_end_at_the_first_dot(tmp_path):
    write(tmp_path / "s.tar", members(("k1.img.jpg", png("red")), ("k1.txt", b"one"), ("sub.d/k2.png", png("red"))))
    picture(tmp_path / "f.img.jpg")
    write(tmp_path / "f.txt", "not in a shard")
    listing = list_folder(tmp_path)
    assert captions(listing) == {"s.tar/k1.img.jpg": ["one"]}
    assert reasons(listing) == {"no image of this name": ["f.txt"], "no caption": ["f.img.jpg", "s.tar/sub.d/k2.png"]}


def test_hidden_members_are_no_pictures(tmp_path):
    hidden = [("._a.png", b"of a Mac"), ("._a.txt", b"of a Mac"), ("./sub/.b.png", png("red"))]
    write(tmp_path / "s.tar", members(*hidden, ("a.png", png("red")), ("a.txt", b"one")))
    listing = list_folder(tmp_path)
    assert captions(listing) == {"s.tar/a.png": ["one"]}
    assert reasons(listing) == {}


def test_what_img2dataset_writes_beside_a_shard_is_no_fault(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    write(tmp_path / "00000.tar", members(("0.jpg", png("red")), ("0.txt", b"one")))
    table = pa.table({"url": ["https://a"] * 3, "caption": ["one"] * 3, "key": ["0", "1", "2"]})
    parquet.write_table(table, tmp_path / "00000.parquet")
    assert reasons(list_folder(tmp_path)) == {}
    parquet.write_table(table, tmp_path / "alone.parquet")
    (reason,) = (why for why, names in reasons(list_folder(tmp_path)).items() if names == ["alone.parquet"])
    assert reason.startswith(f"no column {' or '.join(FILE_KEYS)}")


def test_damaged_shards(tmp_path):
    members = {f"{i}.{kind}": data for i in range(3) for kind, data in (("png", png("red")), ("txt", b"t%d" % i))}
    whole = shard(tmp_path / "whole.tar", members).read_bytes()
    write(tmp_path / "cut.tar", whole[:2000])
    third = whole.index(b"1.png")
    write(tmp_path / "header.tar", whole[:third] + b"garbage" * 80 + whole[third + 560 :])
    write(tmp_path / "none.tar", b"no tar at all" * 100)
    write(tmp_path / "packed.tar.gz", b"anything")
    write(tmp_path / "round.tar", header("first.png", 0) + header("back.png", -tarfile.BLOCKSIZE))  # to itself
    found = list_within_a_minute(tmp_path)
    assert captions(found) == {
        f"{name}.tar/{i}.png": [f"t{i}"]
        for name, i in (("whole", 0), ("whole", 1), ("whole", 2), ("cut", 0), ("header", 0))
    }
    told = {name: why for why, names in reasons(found).items() for name in names}
    assert {name.partition("/")[0] for name, why in told.items() if "cannot be read to its end" in why} == {
        "cut.tar",
        "header.tar",
        "none.tar",
        "round.tar",
    }
    assert told["packed.tar.gz"] == "a compressed archive, expected .tar"


def header(name: str, size: int) -> bytes:
    """Of a tar member whose length may be negative."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = (size % 2**96).to_bytes(12, "big")
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def test_parquet_with_the_images_inside(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    images = [png((i, 0, 0)) for i in range(5)]
    cells = [{"bytes": data, "path": None} for data in images[:4]] + [{"bytes": None, "path": "x.png"}]
    table = pa.table({"image": cells, "text": [f"picture {i}" for i in range(3)] + ["", "absent"]})
    parquet.write_table(table, tmp_path / "train.parquet", row_group_size=2)
    parquet.write_table(pa.table({"jpg": images[:1], "caption": ["plain"]}), tmp_path / "plain.parquet")
    listing = list_folder(tmp_path)
    assert captions(listing) == {
        "plain.parquet/0.000000": ["plain"],
        "train.parquet/0.000000": ["picture 0"],
        "train.parquet/0.000001": ["picture 1"],
        "train.parquet/1.000000": ["picture 2"],
        "train.parquet/2.000000": ["absent"],
    }
    sources = listing.sources
    assert [sources[f"train.parquet/{at}"].read(10**6) for at in ("1.000000", "0.000001")] == [images[2], images[1]]
    assert sources["plain.parquet/0.000000"].read(10**6) == images[0]
    with pytest.raises(OSError, match="no image in it"):
        sources["train.parquet/2.000000"].read(10**6)
    with pytest.raises(OSError, match="more than 10 bytes"):
        sources["train.parquet/0.000000"].read(10)


# bounds


def peak_of(folder) -> int:
    """Megabytes that a process has had at most, in which a folder is listed and every image read."""
    code = (
        "import sys; from pathlib import Path; from benchmarks.fuzz import peak_memory;"
        "from softrepa.data.captions import list_folder;"
        "before = peak_memory(); found = list_folder(Path(sys.argv[1]));"
        "sizes = {len(one.read(2**30)) for one in found.sources.values()};"
        "print((peak_memory() - before) // 10**6)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def test_equal_cells_of_a_parquet_file_are_held_once(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    for folder, name, cell in (("texts", "text", "x" * 100_000), ("captions", "text", "x" * 9_000)):
        count = 2**29 // len(cell)
        rows = {"file_name": [f"{i}.png" for i in range(count)], name: pa.array([cell] * count)}
        (tmp_path / folder).mkdir()
        parquet.write_table(pa.table(rows), tmp_path / folder / "m.parquet")
    (tmp_path / "images").mkdir()
    images = {"jpg": [b"\xff" * 10**6] * 600, "text": [f"picture {i}" for i in range(600)]}
    parquet.write_table(pa.table(images), tmp_path / "images" / "m.parquet")
    assert max(path.stat().st_size for path in tmp_path.rglob("*.parquet")) < 2 * 10**6
    assert peak_of(tmp_path / "texts") < 250
    assert peak_of(tmp_path / "images") < 250
    assert peak_of(tmp_path / "captions") < 500
    assert any(why.startswith("captions of more than") for why in reasons(list_folder(tmp_path / "captions")))


def test_parquet_files_that_unpack_to_too_much(tmp_path, monkeypatch):
    import pyarrow as pa
    from pyarrow import parquet

    rows = pa.table({"jpg": [random.Random(i).randbytes(1000) for i in range(20)], "text": ["a picture"] * 20})
    parquet.write_table(rows, tmp_path / "m.parquet")
    (first, *_) = list_folder(tmp_path).sources.values()
    assert len(first.read(1000)) == 1000
    for name, most, message in (
        ("MOST_ROW_GROUP", 5000, "a row group of"),
        ("MOST_VALUES", 10, "a row group of 20 values, expected at most 10"),
    ):
        with monkeypatch.context() as patch:
            sources.release()
            patch.setattr(sources, name, most)
            with pytest.raises(OSError, match=message):
                first.read(1000)
    parquet.write_table(
        pa.table({"jpg": [bytes(10**6)], "text": ["zeros"]}), tmp_path / "m.parquet", compression="zstd"
    )
    (zeros,) = list_folder(tmp_path).sources.values()
    monkeypatch.setattr(sources, "MOST_UNPACKED", 5000)
    with pytest.raises(OSError, match=r"a row group of [\d,]+ bytes in [\d,]+ of the file"):
        zeros.read(10**6)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (["x" * 200_000, "fine"], "a cell of more than 131,072 bytes"),
        ([["x"] * 101, ["fine"]], "a list of more than 100 captions"),
        ([1, 2], f"no text in a column {' or '.join(CAPTION_KEYS)}"),
    ],
)
def test_cells_of_a_parquet_file_that_are_no_captions(tmp_path, text, reason):
    import pyarrow as pa
    from pyarrow import parquet

    picture(tmp_path / "0.png")
    parquet.write_table(pa.table({"file_name": ["1.png", "0.png"], "text": text}), tmp_path / "m.parquet")
    assert reasons(list_folder(tmp_path))[reason] == ["m.parquet"]


def test_kinds_of_text_in_a_parquet_file(tmp_path):
    import pyarrow as pa
    from pyarrow import parquet

    picture(tmp_path / "0.png")
    kinds = (pa.string(), pa.large_string(), pa.list_(pa.string()), pa.large_list(pa.string()))
    for number, kind in enumerate((*kinds, pa.list_(pa.large_string()), pa.dictionary(pa.int8(), pa.string()))):
        text = f"text {number}"
        cells = pa.array([[text] if "list" in str(kind) else text, None], kind)
        names = pa.array(["0.png", "gone.png"]).dictionary_encode()
        parquet.write_table(pa.table({"image": names, "text": cells}), tmp_path / f"{number}.parquet")
    listing = list_folder(tmp_path)
    assert captions(listing) == {"0.png": [f"text {number}" for number in range(6)]}
    assert reasons(listing) == {f"no caption in {number}.parquet": ["gone.png"] for number in range(6)}


def test_tables_are_bounded(tmp_path, monkeypatch):
    picture(tmp_path / "0.png")
    write(tmp_path / "m.jsonl", [{"file_name": "0.png", "text": f"caption {i}"} for i in range(10)])
    write(tmp_path / "captions.json", "[" + "{}," * 100 + "{}]")
    for name, most, reason in (
        ("MOST_ROWS", 5, "more than 5 rows"),
        ("MOST_TEXT", 50, "captions of more than 50 characters in all"),
        ("MOST_MARKS", 150, "JSON of more than 150 values"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(tables, name, most)
            assert reason in reasons(list_folder(tmp_path))
