"""Makes the pack importable as `comfyui_softrepa`, this folder as `softrepa_tests`, and a real ComfyUI beside them."""

import os
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {
    "comfyui_softrepa": ROOT,
    "softrepa": ROOT / "softrepa",  # as the tools and benchmarks import it
    "softrepa_tests": ROOT / "tests",
    "benchmarks": ROOT / "benchmarks",
    "tools": ROOT / "tools",
}


def _put_on_path() -> None:
    """The repository root off sys.path (its `nodes` would shadow ComfyUI's), ComfyUI on it."""
    here = {"", str(ROOT), str(Path.cwd())}
    sys.path[:] = [entry for entry in sys.path if entry not in here]
    for name, folder in PACKAGES.items():
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package
    if "COMFYUI_PATH" in os.environ:
        sys.path.insert(0, os.environ["COMFYUI_PATH"])


_put_on_path()


@pytest.fixture
def no_network(monkeypatch):
    """Fails any attempt to open a connection outside this machine."""
    import socket

    connect = socket.socket.connect

    def guarded(self, address):
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"connection to {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)
