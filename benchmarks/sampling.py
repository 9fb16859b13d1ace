"""What soft tokens cost: time of a sampling step with them over one without, and of the plain model twice.

    python3 -m benchmarks.sampling

Real model sizes with random weights on a GPU, small sizes on a CPU. The runs alternate, so that a machine whose speed
drifts slows both; each figure is the median of the ratios round by round.
"""

import argparse
import os
import platform
import statistics
import sys
import time
from dataclasses import dataclass

from . import environment

STEPS = 4


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


GPU_CASES = (
    Case("SD1.5 512 px", "sd15", sd15(320), 64, 77),
    Case("SDXL 1024 px", "sdxl", sdxl(320), 128, 77),
    Case("SD3 512 px", "sd3", sd3(1536, 24), 64, 154),
    Case("SD3 1024 px", "sd3", sd3(1536, 24), 128, 154),
    Case("SD3 1024 px, 589 text tokens", "sd3", sd3(1536, 24), 128, 589),
)
CPU_CASES = (
    Case("SD1.5 / 5, 256 px", "sd15", sd15(64), 32, 77),
    Case("SDXL / 5, 256 px", "sdxl", sdxl(64), 32, 77),
    Case("SD3 / 3, 8 blocks, 512 px", "sd3", sd3(512, 8), 64, 154),
)


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
    layers = 1 if family.is_unet else 5
    tokens = torch.randn(4, width) if family.is_unet else torch.randn(layers, 4, width)
    blocks = family.published_blocks if family.is_unet else layers
    return SoftTokens(tokens, family, blocks, time_table=torch.randn(100, layers * width))


def seconds_a_step(case: Case, model) -> float:
    """Guided Euler sampling, batch 1: one forward of two samples a step."""
    import comfy.samplers
    import torch

    pooled = {"sd15": None, "sdxl": 1280, "sd3": 2048}[case.family]
    text = {"sd15": 768, "sdxl": 2048, "sd3": 4096}[case.family]
    extra = {} if pooled is None else {"pooled_output": torch.zeros(1, pooled)}
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[torch.randn(1, case.text, text), extra]], [[torch.randn(1, case.text, text), extra]])
    guider.set_cfg(4.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    noise = torch.randn(1, case.model["in_channels"], case.size, case.size)
    marks = []

    def mark(*_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    euler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        guider.sample(noise, torch.zeros_like(noise), euler, sigmas, callback=mark, disable_pbar=True, seed=0)
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def measure(case: Case, rounds: int, device, dtype) -> None:
    from softrepa.comfy.patching import apply_tokens

    model = build(case, device, dtype)
    tokens = soft_tokens(case, model)
    variants = {
        "plain again": model.clone(),
        "strength 1": apply_tokens(model, tokens),
        "strength 0.5": apply_tokens(model, tokens, strength=0.5),
        "strength 0": apply_tokens(model, tokens, strength=0.0),
    }
    for variant in (model, *variants.values()):
        seconds_a_step(case, variant)
    plain, ratios = [], {name: [] for name in variants}
    for _ in range(rounds):
        plain.append(seconds_a_step(case, model))
        for name, variant in variants.items():
            ratios[name].append(seconds_a_step(case, variant) / plain[-1])
    figures = "".join(f"{statistics.median(ratios[name]):>14.3f}" for name in variants)
    print(f"{case.title:30}{1000 * statistics.median(plain):>10.1f} ms{figures}", flush=True)


def machine() -> str:
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    return f"CPU {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; no GPU here"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each variant is timed")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose title contains this")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    environment.enter("benchmarks.sampling", arguments.comfyui, arguments.python)
    sys.path.insert(0, os.environ["COMFYUI_PATH"])

    import torch
    from comfy.cli_args import args

    has_gpu = torch.cuda.is_available()
    args.cpu = not has_gpu
    device, dtype = (torch.device("cuda"), torch.float16) if has_gpu else (torch.device("cpu"), torch.float32)
    print(f"Time per step over that of the plain model: {machine()}, {dtype}, {arguments.rounds} rounds")
    print(f"{'':30}{'plain':>13}{'plain again':>14}{'strength 1':>14}{'strength 0.5':>14}{'strength 0':>14}")
    for case in GPU_CASES if has_gpu else CPU_CASES:
        if arguments.only in case.title:
            measure(case, arguments.rounds, device, dtype)


if __name__ == "__main__":
    main()
