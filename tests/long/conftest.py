"""Checks that take minutes each, beside a real ComfyUI. They are run by name: `python3 -m tests.run tests/long`."""

from softrepa_tests.comfy.conftest import comfy_folders, inference, models  # noqa: F401
