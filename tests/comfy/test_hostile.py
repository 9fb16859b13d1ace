"""Folders, names and prompts that are broken: the pack still loads, says what is wrong, and goes on."""

import asyncio
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import server
import torch
from comfyui_softrepa.nodes import schema
from comfyui_softrepa.nodes.tokens import LoadTokens, SaveTokens
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy import folders
from comfyui_softrepa.softrepa.comfy.data.assembly import dataset_of_folder
from comfyui_softrepa.softrepa.comfy.training import run as training
from comfyui_softrepa.softrepa.data.inputs import DatasetInputs
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training.trainer import Trainer
from softrepa_tests.conftest import ROOT
from softrepa_tests.learning import train
from softrepa_tests.token_sets import tokens_for

import nodes

LINUX = sys.platform.startswith("linux")


def choices() -> list[str]:
    return LoadTokens.INPUT_TYPES()["required"]["tokens_name"][1]["options"]


# The model folder


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty models folder, and a folder of extra_model_paths.yaml with one file in it."""
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path / "models"))
    (tmp_path / "models").mkdir()
    token_files.save(tokens_for("sd15"), tmp_path / "extra" / "one.safetensors")
    extra = ([str(tmp_path / "extra")], set())
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "softrepa", extra)
    return tmp_path / "models" / "softrepa"


def dangling(home, _) -> None:
    home.symlink_to(home.parent / "unplugged")


def a_file(home, _) -> None:
    home.write_bytes(b"")


def unreadable(home, monkeypatch) -> None:
    """As it is for who may not read it; the tests may run as somebody who may."""
    home.mkdir()
    scandir = os.scandir

    def refused(path="."):
        if os.fspath(path) == str(home):
            raise PermissionError(13, "Permission denied", str(home))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    monkeypatch.setattr(os, "listdir", refused)


def read_only(home, monkeypatch) -> None:
    mkdir = type(home).mkdir

    def refused(path, *options, **more):
        if path == home:
            raise OSError(30, "Read-only file system", str(home))
        return mkdir(path, *options, **more)

    monkeypatch.setattr(type(home), "mkdir", refused)
    monkeypatch.setattr(os, "makedirs", refused)


@pytest.mark.parametrize("broken", [dangling, a_file, unreadable, read_only])
def test_the_nodes_stay_whatever_the_model_folder_is(elsewhere, monkeypatch, broken):
    broken(elsewhere, monkeypatch)
    assert asyncio.run(nodes.load_custom_node(str(ROOT)))
    assert choices() == ["one.safetensors"]
    assert LoadTokens.validate_inputs(tokens_name="one.safetensors") is True
    if broken is not read_only:
        assert f"models/softrepa ({elsewhere}: " in LoadTokens.validate_inputs(tokens_name="two.safetensors")
    if broken is not unreadable:
        with pytest.raises(SoftREPAError, match=r"softrepa.* could not be written \(.*\), expected a folder with room"):
            SaveTokens.execute(tokens_for("sd15"), "mine")


def test_links_in_circles_are_followed_once(token_folder):
    token_files.save(tokens_for("sd15"), token_folder / "deep" / "one.safetensors")
    for name in ("a", "b"):
        (token_folder / "deep" / name).symlink_to(token_folder)
    assert choices() == [str(Path("deep", "one.safetensors"))]


# Names


@pytest.mark.skipif(not LINUX, reason="other systems have no such names")
def test_a_file_with_a_name_in_latin_1(models, token_folder, caplog):
    token_files.save(tokens_for("sdxl"), token_folder / "caf\udce9.safetensors")
    (name,) = choices()
    assert LoadTokens.validate_inputs(tokens_name=name) is True
    assert torch.equal(LoadTokens.execute(models["sdxl"], name).args[1].tokens, tokens_for("sdxl").tokens)
    for text in (caplog.text, LoadTokens.validate_inputs(tokens_name="\udcff")):
        text.encode("utf-8")


@pytest.mark.parametrize(
    "prefix", ["caf\udce9", "a\nb", "\x1b[31m", "🙂" * 51, "é" * 101, "x" * 200 + "/y", "\ud800/y"]
)
def test_prefixes_that_are_no_names(models, token_folder, prefix):
    for use in (lambda: SaveTokens.execute(tokens_for("sd15"), prefix), lambda: short(models, prefix, resume=True)):
        with pytest.raises(SoftREPAError, match="filename_prefix is .* expected a name of at most 100 char") as caught:
            use()
        str(caught.value).encode("utf-8")
    assert list(token_folder.rglob("*")) == []


@pytest.mark.parametrize("prefix", ["🙂" * 50, "漢字" * 33, "ü" * 100, "x" * 100 + "/" + "y" * 100])
def test_prefixes_as_long_as_a_name_can_be(models, token_folder, prefix):
    path = short(models, prefix)
    assert token_files.load(path).metadata["steps"] == "1"
    assert short(models, prefix, steps=2, resume=True) == path


def test_a_file_where_a_folder_is_wanted(token_folder):
    (token_folder / "file").write_bytes(b"")
    with pytest.raises(SoftREPAError, match="file.* could not be written"):
        SaveTokens.execute(tokens_for("sd15"), "file/one")


def test_texts_for_the_browser_can_be_sent(monkeypatch):
    sent = []
    stub = SimpleNamespace(send_progress_text=lambda text, node: sent.append(text.encode("utf-8")))
    monkeypatch.setattr(server.PromptServer, "instance", stub, raising=False)
    node = SimpleNamespace(hidden=SimpleNamespace(unique_id="1", dynprompt=None))
    schema.show_on_node(node, "2 images left out: caf\udce9.png\nand 全角　空白")
    assert sent == ["2 images left out: caf\\udce9.png  \nand 全角　空白".encode()]  # two spaces keep lines apart


@pytest.mark.parametrize("option", ["validation_percent", "cache_gb"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
def test_numbers_that_are_none(tmp_path, option, value):
    numbers = {"validation_percent": 0.0, "cache_gb": 1.0} | {option: value}
    with pytest.raises(SoftREPAError, match=f"{option} is {value}, expected 0 to "):
        dataset_of_folder(tmp_path, "pictures", None, None, DatasetInputs(64, False, **numbers))


@pytest.mark.parametrize(
    "option", ["learning_rate", "temperature", "denoising_weight", "gradient_clip", "ema_decay", "preview_cfg"]
)
def test_settings_that_are_no_numbers(models, token_folder, option):
    with pytest.raises(SoftREPAError, match=f"{option} is nan, expected"):
        short(models, "run", **{option: float("nan")})


# Runs


def short(models, prefix: str, **options):
    return train(models, "sd3", **{"steps": 1, "filename_prefix": prefix} | options)[3]


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_run_that_is_being_written_is_not_resumed(models, token_folder, monkeypatch, is_resumed):
    if is_resumed:
        short(models, "run", steps=2)
    step, tried, refused = Trainer.step, [], []

    def another(self, micro_batch):
        if self.step_index == 3 and not tried:
            tried.append(None)
            with pytest.raises(SoftREPAError) as caught:
                short(models, "run", steps=9, resume=True)
            refused.append(str(caught.value))
        return step(self, micro_batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", another)
        path = short(models, "run", steps=4, checkpoint_every=1, resume=is_resumed)
    (message,) = refused
    assert message.startswith("resume: run_00001.checkpoint.safetensors is being written by another run at this moment")
    assert token_files.load(path).metadata["steps"] == "4"
    assert short(models, "run", steps=5, resume=True) == path
    assert list(folders.state_path(folders.home() / "run").parent.rglob(folders.LOCK)) == []


def test_what_another_run_has_added_meanwhile_is_gone_on_from(models, token_folder, monkeypatch):
    """Between reading a checkpoint and claiming it."""
    same_run, step, done = training.same_run, Trainer.step, []

    def meanwhile(candidates, settings):
        found = same_run(candidates, settings)
        monkeypatch.setattr(training, "same_run", same_run)
        short(models, "run", steps=3, resume=True)
        done.clear()
        return found

    def counted(self, micro_batch):
        done.append(self.step_index)
        return step(self, micro_batch)

    short(models, "run", steps=1)
    monkeypatch.setattr(Trainer, "step", counted)
    monkeypatch.setattr(training, "same_run", meanwhile)
    resumed = train(models, "sd3", steps=4, filename_prefix="run", resume=True)
    assert (resumed[2], done) == (4, [3])
    assert resumed[1] == train(models, "sd3", steps=4, filename_prefix="whole")[1]


def test_folders_without_locks_are_written_and_it_is_said(models, token_folder, monkeypatch, caplog):
    from comfyui_softrepa.softrepa import locks

    def unsupported(file):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(locks, "try_lock", unsupported)
    short(models, "run")
    assert "knows no locks" in caplog.text
    assert token_files.load(short(models, "run", steps=2, resume=True)).metadata["steps"] == "2"


def test_a_refused_run_leaves_nothing(models, token_folder, comfy_folders):
    with pytest.raises(SoftREPAError, match="expected at least batch_size"):
        short(models, "run", batch_size=99)
    assert list((comfy_folders / "output" / folders.RUNS).rglob("*")) == []


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "linked", ["", "sub", "sub/run_00001", "sub/run_00001.checkpoint.safetensors", "sub/run_00001/steps.csv"]
)
def test_no_link_leads_out_of_the_output_folder(models, token_folder, comfy_folders, tmp_path, linked, resume):
    runs, outside = comfy_folders / "output" / folders.RUNS, tmp_path / "outside"
    path = token_files.load(short(models, "sub/run")).name
    assert path == "run_00001.safetensors"
    place = runs / linked
    place.rename(outside)
    before = {file: file.stat().st_mtime_ns for file in (outside, *outside.rglob("*"))}
    place.symlink_to(outside)
    if linked.startswith("sub/run") and not resume:  # another number is free
        assert short(models, "sub/run").endswith("run_00002.safetensors")
    else:
        with pytest.raises(SoftREPAError, match=r"leads to .*outside.*, expected a place in ComfyUI's output folder"):
            short(models, "sub/run", steps=2, resume=resume)
    assert {file: file.stat().st_mtime_ns for file in (outside, *outside.rglob("*"))} == before
    place.unlink()
