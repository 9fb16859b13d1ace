"""Runs the tests in the prepared environment (tools/environment.py), beside a real ComfyUI.

python3 -m tests.run [--comfyui VERSION] [--python PATH] [--frontend VERSION] [--every-family] [pytest arguments]

All tests run on three processes, a file on one of them, for many wait for a browser; with arguments pytest decides.
"""

import argparse
import os
import subprocess
import sys

from tools import environment

EVERY_FAMILY = "SOFTREPA_EVERY_FAMILY"
"""Set: what runs on one family of each kind runs on all (`of_families.py`)."""
EVERYTHING = [
    "--numprocesses=3",
    "--dist=loadfile",
    "--no-loadscope-reorder",
    "--verbose",
    "--durations=30",
]  # long files come first by name


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tests.run", add_help=False)
    environment.add_arguments(parser)
    parser.add_argument("--frontend", metavar="VERSION", help="of ComfyUI's frontend, or newest, in place of its own")
    parser.add_argument("--every-family", action="store_true", help="what runs on one family of each kind runs on all")
    arguments, pytest_arguments = parser.parse_known_args()
    prepared = environment.prepare_or_exit(arguments.comfyui, arguments.python)
    if subprocess.run([prepared.python, "-c", "import pytest"], capture_output=True).returncode:
        sys.exit(f"{prepared.python} has no pytest: install requirements-dev.txt there.")
    if arguments.every_family:
        os.environ[EVERY_FAMILY] = "1"
    if arguments.frontend:
        os.environ[environment.FRONTEND_VARIABLE] = environment.frontend_or_exit(arguments.frontend)
    sys.exit(environment.run_module("pytest", pytest_arguments or EVERYTHING, prepared))


if __name__ == "__main__":
    main()
