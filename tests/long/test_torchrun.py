"""Training and scoring by real processes that torchrun starts, each beside a ComfyUI of its own, on the CPU by gloo."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy.training import devices
from softrepa_tests.conftest import ROOT
from softrepa_tests.folders import picture, write

from tools.environment import steady_threads
from tools.standins import stand_in

CAPTIONS = ("a red square", "a blue circle", "two cats", "a house by the sea", "an empty street", "green hills")
STEPS = 6
ENDLESS = 100_000
SECONDS = 600
"""Until a command counts as hanging."""


@pytest.fixture(autouse=True)
def inference():
    """Nothing runs in this process."""


@dataclass(frozen=True)
class Place:
    """ComfyUI's folders for these commands, and what they train by."""

    base: Path

    def config(self, prefix: str, **inputs) -> Path:
        given = {"checkpoint": str(stand_in("sd3").checkpoint), "folder": "pictures", "resolution": 64}
        given |= {"steps": STEPS, "batch_size": 3, "learning_rate": 1e-2, "seed": 0, "temperature": 2.0}
        given |= {"micro_batch": 1, "checkpointing": False, "checkpoint_every": 1, "filename_prefix": prefix}
        path = self.base / f"{prefix}.json"
        path.write_text(json.dumps(given | inputs))
        return path

    def start(self, count: int, *arguments) -> subprocess.Popen:
        started = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"] if count > 1 else []
        words = [sys.executable, *started, "-m", "softrepa", *map(str, arguments)]
        words += ["--comfyui", os.environ["COMFYUI_PATH"], "--", "--base-directory", str(self.base), "--cpu"]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(words, cwd=ROOT, env=steady_threads(), text=True, **pipes)

    def run(self, count: int, *arguments) -> tuple[str, str]:
        """What it printed and what it said."""
        process = self.start(count, *arguments)
        out, said = process.communicate(timeout=SECONDS)
        assert process.returncode == 0, said
        return out, said

    def tokens(self, prefix: str):
        (path,) = (self.base / "models" / "softrepa").glob(f"{prefix}_*.safetensors")
        return token_files.load(path)

    def wait_for_steps(self, prefix: str, process: subprocess.Popen, more_than: int = 0) -> int:
        """Until some are saved."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end and process.poll() is None:
            if list((self.base / "models" / "softrepa").glob(f"{prefix}_*.safetensors")):
                steps = int(self.tokens(prefix).metadata["steps"])
                if steps > more_than:
                    return steps
            time.sleep(0.05)
        process.kill()
        raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    base = tmp_path_factory.mktemp("torchrun")
    for index, caption in enumerate(CAPTIONS):
        picture(base / "input" / "pictures" / f"{index}.png", (64, 64), (40 * index, 90, 9))
        write(base / "input" / "pictures" / f"{index}.txt", caption)
    (base / "models").mkdir()
    return Place(base)


@pytest.fixture(scope="module")
def whole(place):
    """Trained by one process, and where its file is."""
    out, said = place.run(1, "train", place.config("whole"))
    assert "reading and encoding 12/12, 0:00:00 left" in said
    assert "step 1/6, loss" in said
    return place.tokens("whole"), Path(out.strip())


def same(tokens, expected) -> None:
    for name in ("tokens", "time_table"):
        value = getattr(expected, name)
        assert (getattr(tokens, name) - value).abs().max() <= 1e-5 * value.abs().max(), name


def test_two_processes_train_what_one_does_and_one_of_them_speaks(place, whole):
    out, said = place.run(2, "train", place.config("two"))
    same(place.tokens("two"), whole[0])
    assert [Path(line).name for line in out.splitlines()] == ["two_00001.safetensors"]
    assert said.count(f"step {STEPS}/{STEPS}") == 1
    assert said.count("6 images, 6 captions") == 1
    assert said.startswith("starting PyTorch and ComfyUI\nloading ")
    logs = place.base / "output" / "softrepa_training" / "two_00001"
    assert len((logs / "steps.csv").read_text().splitlines()) == STEPS + 1


def test_stopped_and_killed_and_gone_on_with_by_other_numbers(place, whole, monkeypatch):
    """The last time by the command that a node names where there are several GPUs."""
    config = place.config("parts", steps=ENDLESS)
    stopped = place.start(2, "train", config)
    place.wait_for_steps("parts", stopped)
    stopped.send_signal(signal.SIGINT)
    _, said = stopped.communicate(timeout=60)
    assert "stopped after step" in said
    first = int(place.tokens("parts").metadata["steps"])

    killed = place.start(3, "train", config, "--resume")
    place.wait_for_steps("parts", killed, first)
    workers = [one for one in psutil.Process(killed.pid).children() if "softrepa" in one.cmdline()]
    assert len(workers) == 3
    workers[2].kill()
    _, said = killed.communicate(timeout=60)
    assert killed.returncode != 0
    assert not any(one.is_running() for one in workers)
    second = int(place.tokens("parts").metadata["steps"])
    assert second > first

    (file,) = (place.base / "models" / "softrepa").glob("parts_*.safetensors")
    monkeypatch.setattr(devices, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 2)))
    words = shlex.split(devices.idle_devices(file).partition(f"in {devices.PACK}: ")[2])
    words[words.index("NAME")] = str(stand_in("sd3").checkpoint)
    assert words[:4] == ["python", "-m", "torch.distributed.run", "--standalone"]
    words[0] = sys.executable
    words += ["--comfyui", os.environ["COMFYUI_PATH"], "--", "--base-directory", str(place.base), "--cpu"]
    last = subprocess.Popen(words, cwd=devices.PACK, env=steady_threads(), stderr=subprocess.PIPE, text=True)
    assert any(f"/{ENDLESS}, loss" in line for line in last.stderr)
    last.send_signal(signal.SIGTERM)
    last.communicate(timeout=60)
    third = int(place.tokens("parts").metadata["steps"])
    assert third > second

    place.run(1, "train", place.config("unbroken", steps=third))
    same(place.tokens("parts"), place.tokens("unbroken"))


def test_scores(place, whole):
    options = ("--batch-size", "3", "--batches", "1", "--timesteps", "300,700", "--tokens", whole[1])
    one, several = (json.loads(place.run(count, "score", place.config("score"), *options)[0]) for count in (1, 2))
    assert several["images"] == one["images"] == 3
    assert several["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert several["by_timestep"]["information"] == pytest.approx(one["by_timestep"]["information"], rel=1e-5)


def test_what_all_find_is_said_once(place):
    process = place.start(2, "train", place.base / "nothing.json")
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert said.count("error: CONFIG") == 1
