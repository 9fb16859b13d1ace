"""Lint, format and types of the repository as it is."""

import shutil
import subprocess
import sys
from pathlib import Path

from softrepa_tests.conftest import ROOT
from softrepa_tests.repository import files


def run(*command: str, folder: Path = ROOT) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def python_files() -> list[str]:
    return [str(path) for path in files("*.py")]


def test_lint():
    run("ruff", "check", "--no-cache", *python_files())


def test_format():
    run("ruff", "format", "--no-cache", "--check", "--diff", *python_files())


def test_types():
    run("mypy")


def test_types_of_the_nodes(tmp_path):
    """They import the method from above their own folder, as a package of any name does in ComfyUI."""
    package = tmp_path / "pack"
    for path in python_files():
        if Path(path).parts[0] in ("softrepa", "nodes", "__init__.py"):
            (package / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, package / path)
    config, cache = ROOT / "pyproject.toml", ROOT / ".mypy_cache"
    run("mypy", "--config-file", str(config), "--cache-dir", str(cache), "--package", "pack.nodes", folder=tmp_path)
