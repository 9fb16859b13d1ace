"""Makes torchvision and torchaudio importable beside a CPU-only PyTorch.

The published wheels are CUDA builds, and their native libraries do not load without CUDA. ComfyUI only needs the
Python parts. Nothing here runs unless PyTorch was built without CUDA and the import really fails.
"""

import subprocess
from pathlib import Path

HOOK = "softrepa_cpu_torchvision"
HOOK_SOURCE = '''\
"""Declares the native operators that torchvision registers Python code for, when torchvision is first imported."""

import importlib.machinery
import sys


class DeclareOperators:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torchvision":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        if spec is not None:
            execute = spec.loader.exec_module

            def declare_and_execute(module):
                cls.declare()
                execute(module)

            spec.loader.exec_module = declare_and_execute
        return spec

    @classmethod
    def declare(cls):
        import torch

        cls.library = torch.library.Library("torchvision", "DEF")
        cls.library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        cls.library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


sys.meta_path.insert(0, DeclareOperators)
'''


def repair(python: Path) -> None:
    """Repair the environment of `python`, where it needs it."""
    if answer(python, "import torch; print(torch.version.cuda)") != "None":
        return
    platlib = answer(python, "import sysconfig; print(sysconfig.get_path('platlib'))")
    assert platlib is not None  # every Python has one
    packages = Path(platlib)
    if answer(python, "import torchvision") is None:
        (packages / f"{HOOK}.py").write_text(HOOK_SOURCE, encoding="utf-8")
        (packages / f"{HOOK}.pth").write_text(f"import {HOOK}\n", encoding="utf-8")
    if answer(python, "import torchaudio") is None:
        for library in (packages / "torchaudio" / "lib").glob("*.so"):
            library.unlink()  # torchaudio then reports its extension as absent instead of failing to load it


def answer(python: Path, code: str) -> str | None:
    """What `code` prints, or None when it fails."""
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else None
