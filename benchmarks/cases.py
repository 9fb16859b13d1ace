"""Models of real shapes with random weights, what is fed to them, and the ComfyUI that the benchmarks time them in."""

import argparse
import os
import platform
import sys
from dataclasses import dataclass

from tools import environment

TEXT_WIDTH = {"sd15": 768, "sdxl": 2048, "sd3": 4096}
POOLED_WIDTH = {"sdxl": 1280, "sd3": 2048}


@dataclass(frozen=True)
class Case:
    """A model to time. `size` is the latent's side, `text` the prompt's length in tokens."""

    title: str
    family: str
    model: dict
    size: int
    text: int


def unet(channels: int, mult: list[int], depth: list[int], middle: int, **more) -> dict:
    """A UNet configuration with two residual blocks a level and a transformer depth per block."""
    return {
        "image_size": 32,
        "in_channels": 4,
        "out_channels": 4,
        "model_channels": channels,
        "num_res_blocks": [2] * len(mult),
        "channel_mult": mult,
        "transformer_depth": [d for d in depth for _ in range(2)],
        "transformer_depth_output": [d for d in depth for _ in range(3)],
        "transformer_depth_middle": middle,
        "use_spatial_transformer": True,
        "legacy": False,
        "use_temporal_attention": False,
        **more,
    }


def sd15(channels: int) -> dict:
    return unet(channels, [1, 2, 4, 4], [1, 1, 1, 0], 1, context_dim=768, num_heads=8, num_head_channels=-1)


def sdxl(channels: int) -> dict:
    heads = {"num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True}
    labels = {"adm_in_channels": 2816, "num_classes": "sequential"}
    return unet(channels, [1, 2, 4], [0, 2, 10], 10, context_dim=2048, **heads, **labels)


def sd3(width: int, blocks: int) -> dict:
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 4096, "out_features": width}}
    sizes = {"patch_size": 2, "num_patches": 192 * 192, "pos_embed_max_size": 192, "adm_in_channels": 2048}
    channels = {"in_channels": 16, "out_channels": 16}
    return {"depth": width // 64, "num_blocks": blocks, "context_embedder_config": embedder, **sizes, **channels}


def build(case: Case, device, dtype, compute=None):
    """A MODEL with small random weights stored in `dtype` and, where given, cast to `compute` for every operation."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models as supported
    import torch

    classes = {
        "sd15": (supported.SD15, comfy.model_base.BaseModel),
        "sdxl": (supported.SDXL, comfy.model_base.SDXL),
        "sd3": (supported.SD3, comfy.model_base.SD3),
    }
    config = classes[case.family][0](dict(case.model))
    config.unet_config.update(case.model)
    config.set_inference_dtype(dtype, compute)
    with torch.inference_mode():
        model = classes[case.family][1](config, device=device).to(device)
        for weight in model.diffusion_model.state_dict().values():
            weight.copy_(torch.randn(weight.shape, device=device) * 0.02)
    return comfy.model_patcher.ModelPatcher(model, device, device)


def soft_tokens(case: Case, model):
    """Tokens as published for the family: four, with a time table, in its usual blocks."""
    import torch

    from softrepa.families import FAMILIES
    from softrepa.tokens import SoftTokens

    family = FAMILIES[case.family]
    width = family.context_width or model.model.diffusion_model.hidden_size
    layers, blocks = family.recipe.layers, family.usual_blocks(family.recipe.layers)
    tokens = torch.randn(family.shape(layers, 4, width))
    return SoftTokens(tokens, family, blocks, time_table=torch.randn(100, layers * width))


def random_text(case: Case, generator=None) -> tuple:
    """A prompt's encoding (1, N, d), and the pooled output where the family has one, as ComfyUI's dict beside it."""
    import torch

    context = torch.randn(1, case.text, TEXT_WIDTH[case.family], generator=generator)
    if case.family not in POOLED_WIDTH:
        return context, {}
    return context, {"pooled_output": torch.randn(1, POOLED_WIDTH[case.family], generator=generator)}


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; no GPU here"


def enter(module: str, arguments: argparse.Namespace):
    """Makes ComfyUI importable, in the prepared Python (see environment.py); the device to measure on."""
    environment.enter(module, arguments.comfyui, arguments.python)
    sys.path.insert(0, os.environ["COMFYUI_PATH"])

    import torch
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
    return torch.device("cpu" if args.cpu else "cuda")
