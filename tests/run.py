"""Runs the tests in the prepared environment (tools/environment.py), beside a real ComfyUI.

python3 -m tests.run [--comfyui VERSION] [--python PATH] [pytest arguments]

All tests run on two processes, a file on one of them; with arguments pytest decides.
"""

import argparse
import subprocess
import sys

from tools import environment

EVERYTHING = [
    "--numprocesses=2",
    "--dist=loadfile",
    "--no-loadscope-reorder",
    "--verbose",
    "--durations=30",
]  # long files come first by name


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tests.run", add_help=False)
    environment.add_arguments(parser)
    arguments, pytest_arguments = parser.parse_known_args()
    prepared = environment.prepare_or_exit(arguments.comfyui, arguments.python)
    if subprocess.run([prepared.python, "-c", "import pytest"], capture_output=True).returncode:
        sys.exit(f"{prepared.python} has no pytest: install requirements-dev.txt there.")
    sys.exit(environment.run_module("pytest", pytest_arguments or EVERYTHING, prepared))


if __name__ == "__main__":
    main()
