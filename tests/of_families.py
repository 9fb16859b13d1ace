"""Which families a test runs on: all of them, or one of each kind where the others differ by nothing that it tests."""

import os

import pytest
from comfyui_softrepa.softrepa.families import FAMILIES
from softrepa_tests.run import EVERY_FAMILY

TRANSFORMERS = [family.name for family in FAMILIES.values() if family.stream == "sequence"]
KINDS = {
    "flux": "joint and single blocks",
    "qwenimage": "joint blocks with masks",
    "zimage": "single stream with refiners",
    "anima": "cross-attention",
}

EVERY_TRANSFORMER = pytest.mark.parametrize("family", TRANSFORMERS)
EACH_KIND = pytest.mark.parametrize("family", TRANSFORMERS if EVERY_FAMILY in os.environ else KINDS)
UNET_AND_JOINT = pytest.mark.parametrize(
    "family", ("sd15", "sdxl", "sd3") if EVERY_FAMILY in os.environ else ("sd15", "sd3")
)
"""SDXL is a UNet as SD1.5."""
