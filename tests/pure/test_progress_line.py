"""What a command says while it works: on one line of a terminal, on lines of their own elsewhere."""

import os
import subprocess
import sys

import pytest
from comfyui_softrepa.softrepa import progress_line
from softrepa_tests.conftest import ROOT


@pytest.fixture
def clock(monkeypatch):
    seconds = [100.0]
    monkeypatch.setattr(progress_line.time, "monotonic", lambda: seconds[0])
    return seconds


def count(line, clock) -> None:
    for done in range(5):
        line.counted("encoding", done, 4)
        clock[0] += 0.5


def test_lines_once_a_second_and_the_last(capsys, clock):
    with progress_line.ProgressLine() as line:
        count(line, clock)
        line.counted("encoding", 1, 2)  # something else
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "encoding 0/4",
        "encoding 2/4, 0:00:01 left",
        "encoding 4/4, 0:00:00 left",
        "encoding 1/2, 0:00:00 left",
    ]


def test_a_bar_on_a_terminal(capsys, clock, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_line.ProgressLine() as line:
        count(line, clock)
    said = capsys.readouterr().err
    assert "\r\x1b[2Kencoding [##########..........] 2/4, 0:00:01 left" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("rank", "says"), [(None, True), ("0", True), ("1", False)])
def test_the_first_sign_comes_before_pytorch(tmp_path, rank, says):
    (tmp_path / "torch.py").write_text('raise ModuleNotFoundError("none", name="torch")')
    variables = os.environ | {"PYTHONPATH": str(tmp_path)} | ({} if rank is None else {"RANK": rank})
    command = [sys.executable, "-m", "softrepa", "train", "config.json"]
    said = subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True).stderr
    assert said.startswith("starting PyTorch and ComfyUI\n") == says
    assert "has no torch" in said
