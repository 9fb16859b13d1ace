"""The patched MODEL reproduces the reference implementation, through ComfyUI's own sampling path."""

from pathlib import Path

import comfy.samplers
import pytest
import torch
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.tokens import SoftTokens
from safetensors.torch import load_file
from softrepa_tests.sampling import Record, relative_error
from softrepa_tests.tiny_models import CHANNELS, GOLDEN_LENGTH, WIDTH, seeded

DATA = Path(__file__).parent.parent / "data"
TOLERANCE = 1e-5


def unet_tokens(family: str, blocks: tuple[str, ...], table: bool = True) -> SoftTokens:
    width = WIDTH[family]
    return SoftTokens.of(
        seeded((4, width), f"{family}/tokens", 0.5),
        family,
        blocks,
        time_table=seeded((100, width), f"{family}/table", 0.5) if table else None,
    )


GOLDENS = {
    "sd15_down": lambda: unet_tokens("sd15", ("down",)),
    "sd15_down_mid": lambda: unet_tokens("sd15", ("down", "mid")),
    "sd15_static_all": lambda: unet_tokens("sd15", ("down", "mid", "up"), table=False),
    "sdxl_down": lambda: unet_tokens("sdxl", ("down",)),
    "sdxl_down_mid": lambda: unet_tokens("sdxl", ("down", "mid")),
    "sdxl_static_all": lambda: unet_tokens("sdxl", ("down", "mid", "up"), table=False),
    "sd3_context": lambda: SoftTokens.of(
        seeded((5, 4, 384), "sd3/tokens", 0.5), "sd3", 5, time_table=seeded((100, 1920), "sd3/table", 0.5)
    ),
    "sd3_text_width_static": lambda: SoftTokens.of(seeded((3, 2, 4096), "sd3/tokens4096", 0.5), "sd3", 3),
}


def raw_outputs(model, family: str, timestep: float) -> torch.Tensor:
    """The network's raw output for the golden inputs at `timestep`, while ComfyUI samples."""
    tag = f"{family}tiny"
    x = seeded((2, CHANNELS[family], 8, 8), f"{tag}/x", 1.0)
    extra = {}
    if family == "sd3":
        extra["pooled_output"] = seeded((2, 2048), f"{tag}/y", 1.0)
    if family == "sdxl":
        extra["pooled_output"] = seeded((2, 1280), f"{tag}/pooled", 1.0)
        extra |= {"width": 1024, "height": 1024, "target_width": 1024, "target_height": 1024}
    context = seeded((2, GOLDEN_LENGTH[family], WIDTH[family]), f"{tag}/ctx", 1.0)
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[context, extra]], [[context, extra]])
    guider.set_cfg(1.0)

    sampling = model.get_model_object("model_sampling")
    if family == "sd3":
        sigma = torch.tensor(timestep / 1000)
        scaled = x
    else:
        sigma = sampling.sigmas[int(timestep)]
        scaled = x * (sigma**2 + 1) ** 0.5  # so that the network sees x itself
    seen = []
    forward_hook = model.model.diffusion_model.register_forward_hook(lambda module, args, output: seen.append(output))
    try:
        sampler = Record()
        guider.sample(scaled, torch.zeros_like(x), sampler, torch.stack([sigma, sigma * 0]), disable_pbar=True)
    finally:
        forward_hook.remove()
    assert len(seen) == 1
    return seen[0]


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(golden_models, name):
    family = name.split("_")[0]
    patched = apply_tokens(golden_models[family], GOLDENS[name]())
    expected = load_file(DATA / f"{name}.safetensors")
    assert expected
    for key, value in expected.items():
        kind, timestep = key.split("_")
        model = patched if kind == "soft" else golden_models[family]
        assert relative_error(raw_outputs(model, family, float(timestep)), value) <= TOLERANCE, key


def test_tokens_change_the_golden_output():
    """The tolerance can fail: with and without tokens differ by far more than it."""
    for name in GOLDENS:
        data = load_file(DATA / f"{name}.safetensors")
        for key in (key for key in data if key.startswith("soft_")):
            assert relative_error(data[key], data[key.replace("soft", "base")]) > 100 * TOLERANCE
