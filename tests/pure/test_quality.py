"""Lint, format and types of the repository as it is."""

import subprocess
import sys

from softrepa_tests.conftest import ROOT
from softrepa_tests.repository import files


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def python_files() -> list[str]:
    return [str(path) for path in files("*.py")]


def test_lint():
    run("ruff", "check", "--no-cache", *python_files())


def test_format():
    run("ruff", "format", "--no-cache", "--check", "--diff", *python_files())


def test_types():
    run("mypy")
