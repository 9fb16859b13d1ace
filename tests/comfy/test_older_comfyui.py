"""The same pack on ComfyUI 0.3.75, a year older: the reference's outputs, the samplers, the nodes and training."""

import os
import re
import subprocess
import sys

from softrepa_tests.conftest import ROOT

VERSION = "0.3.75"


def test_goldens_patching_nodes_and_training():
    fetch = f"from tools.environment import fetch_comfyui; print(fetch_comfyui('{VERSION}'))"
    answer = subprocess.run([sys.executable, "-c", fetch], cwd=ROOT, capture_output=True, text=True, check=True)
    files = [f"tests/comfy/test_{name}.py" for name in ("goldens", "patching", "nodes")]
    files.append("tests/comfy/test_training.py::test_a_run_leaves_tokens_a_file_and_its_configuration")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *files],
        cwd=ROOT,
        env=os.environ | {"COMFYUI_PATH": answer.stdout.strip().splitlines()[-1]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:]
    assert re.search(r"^\d+ passed in", run.stdout, re.MULTILINE), run.stdout[-500:]
