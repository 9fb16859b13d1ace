"""A real ComfyUI on a real card. These tests are run by name: `python3 -m tests.run tests/gpu`."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.exit("tests/gpu needs a CUDA device", returncode=2)

from softrepa_tests.comfy.conftest import comfy_folders, inference, models, token_folder  # noqa: F401

torch.backends.cudnn.allow_tf32 = False  # ten bits of a convolution's factors would hide what is compared here
