"""Stand-in checkpoints: seeded random weights in the real single-file formats that ComfyUI's stock loaders accept.

Small where the formats allow it: one SD1.5 UNet level, six SD3 joint blocks, VAEs in the TAESD layout. CLIP-L has only
one size, so most of each file is a text encoder. They sample patterns, not pictures: the networks are random but for
a path that cancels the noise they are given, and the VAEs blur.
"""

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from . import standin_shapes as shapes
from .environment import cache_folder
from .lock import exclusive

SOURCES = (Path(__file__), Path(shapes.__file__))
BLUR = torch.tensor([[1.0, 2.0, 1.0], [2.0, 4.0, 2.0], [1.0, 2.0, 1.0]]) / 16
CENTRE = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])


@dataclass(frozen=True)
class StandIn:
    checkpoint: Path
    tokens: Path


def stand_in(family: str) -> StandIn:
    """The family's checkpoint and token file, written once into a cache folder named after the code that makes them."""
    made_by = hashlib.sha256(b"".join(path.read_bytes() for path in SOURCES)).hexdigest()[:12]
    folder = cache_folder() / f"standins-{made_by}"
    files = StandIn(*(folder / kind / f"standin_{family}.safetensors" for kind in ("checkpoints", "softrepa")))
    if not (files.checkpoint.exists() and files.tokens.exists()):
        with exclusive(folder / "lock"):
            if not files.checkpoint.exists():
                write(files.checkpoint, CHECKPOINTS[family]())
            if not files.tokens.exists():
                write(files.tokens, *TOKENS[family]())
    return files


def write(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata)
    part.replace(path)


def draw(name: str, shape: tuple[int, ...], std: float = 1.0) -> Tensor:
    """Normal values from a generator seeded with the tensor's own name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def random_weights(tensors: shapes.Shapes) -> dict[str, Tensor]:
    """Matrices and convolutions that keep the variance; convolutions mix channels and blur."""
    weights = {}
    for name, shape in tensors:
        if len(shape) == 1:
            weights[name] = torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
        elif len(shape) == 4 and shape[-1] == 3:
            weights[name] = draw(name, (*shape[:2], 1, 1), shape[1] ** -0.5) * BLUR
        else:
            weights[name] = draw(name, shape, math.prod(shape[1:]) ** -0.5)
    return weights


def unet(name: str) -> dict[str, Tensor]:
    """Predicts the noise as its own input, normalised, plus a random pattern.

    The first ten channels (one group of the last norm) carry the input as +x and -x past everything else:
    silu(x) - silu(-x) = x.
    """
    weights = random_weights(shapes.unet(name))
    pairs = torch.eye(4).repeat_interleave(2, dim=0)
    pairs[1::2] *= -1
    entry, out = weights[f"{name}.input_blocks.0.0.weight"], weights[f"{name}.out.2.weight"]
    entry[:10] = 0
    entry[:8] = pairs[:, :, None, None] * CENTRE
    out *= 0.08
    out[:, :10] = 0
    out[:, :8] = pairs.T[:, :, None, None] * CENTRE * 0.8**0.5  # eight channels of ten carry the variance of the group
    last = f"{name}.output_blocks.1"
    weights[f"{last}.0.skip_connection.weight"][:10] = torch.eye(640)[320:330, :, None, None]
    weights[f"{last}.0.out_layers.3.weight"][:10] = 0
    weights[f"{last}.1.proj_out.weight"][:10] = 0
    return weights


def mmdit(name: str) -> dict[str, Tensor]:
    """Predicts a multiple of its own input, which the first 64 channels carry through, plus a random pattern."""
    weights = random_weights(shapes.mmdit(name))
    width = 64 * shapes.MMDIT_DEPTH
    weights[f"{name}.pos_embed"] = sincos_positions(64, width)
    embed, out = weights[f"{name}.x_embedder.proj.weight"], weights[f"{name}.final_layer.linear.weight"]
    patch = torch.eye(64).reshape(64, 16, 2, 2)  # in channel, row, column order; out in row, column, channel order
    embed[:64] = patch
    weights[f"{name}.pos_embed"][:, :, :64] = 0
    out *= 0.4
    out[:] = out[:16].repeat(4, 1)  # the same in the four places of a patch
    for shift_or_scale in (0, width):
        weights[f"{name}.final_layer.adaLN_modulation.1.weight"][shift_or_scale : shift_or_scale + 64] = 0
    out[:, :64] = patch.permute(2, 3, 1, 0).reshape(64, 64) * 3
    for i in range(shapes.MMDIT_DEPTH):
        for part in ("attn.proj", "mlp.fc2"):
            weights[f"{name}.joint_blocks.{i}.x_block.{part}.weight"][:64] = 0
        for stream in ("x_block", "context_block"):
            qkv = weights[f"{name}.joint_blocks.{i}.{stream}.attn.qkv.weight"]
            qkv[: 2 * width] *= 1.5  # sharper attention and larger text values: a few tokens make a visible difference
            if stream == "context_block":
                qkv[2 * width :] *= 4
    return weights


def sincos_positions(side: int, width: int) -> Tensor:
    """SD3's table of 2-D sines and cosines, without its constant part and with shorter waves: a lively pattern."""
    position = torch.arange(side)[:, None] / 1.5
    angles = position / 100 ** (torch.arange(width // 4) / (width // 4))
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    column, row = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    table = torch.cat([column, row], dim=-1).reshape(1, side * side, width)
    return table - table.mean(dim=1, keepdim=True)


def tiny_vae(name: str, scale: float, shift: float, channels: int) -> dict[str, Tensor]:
    """A linear map between colours and latents that blurs on every change of size; its blocks do next to nothing."""
    weights = {key: tensor * 0.01 for key, tensor in random_weights(shapes.tiny_vae(name, channels)).items()}
    encoder, decoder = f"{name}.taesd_encoder", f"{name}.taesd_decoder"
    to_colour = torch.linalg.qr(draw(f"{name}.colours", (channels, 3))).Q.T * 0.1 * channels**0.5
    for resize in (f"{encoder}.2", f"{encoder}.6", f"{encoder}.10", f"{decoder}.7", f"{decoder}.12", f"{decoder}.17"):
        weights[f"{resize}.weight"] = torch.eye(64)[:, :, None, None] * BLUR
    weights[f"{encoder}.0.weight"] = torch.eye(64)[:, :3, None, None] * CENTRE
    weights[f"{encoder}.14.weight"][:, :3] = to_colour.pinverse()[:, :, None, None] * CENTRE
    weights[f"{encoder}.14.bias"] = -0.5 * to_colour.pinverse().sum(1)
    weights[f"{decoder}.1.weight"] = torch.eye(32).repeat(2, 1)[:, :channels, None, None] * CENTRE
    weights[f"{decoder}.1.weight"][32:] *= -1  # ReLUs follow: both signs of every latent channel
    weights[f"{decoder}.19.weight"][:, :channels] = to_colour[:, :, None, None] * CENTRE
    weights[f"{decoder}.19.weight"][:, 32 : 32 + channels] = -to_colour[:, :, None, None] * CENTRE
    weights[f"{decoder}.19.bias"] += 0.5
    return weights | {f"{name}.vae_scale": torch.tensor(scale), f"{name}.vae_shift": torch.tensor(shift)}


def half(*parts: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.half() for part in parts for name, tensor in part.items()}


def checkpoint_sd15() -> dict[str, Tensor]:
    clip = random_weights(shapes.clip_l("cond_stage_model", projection=False))
    return half(unet("model.diffusion_model"), clip, tiny_vae("first_stage_model", 0.18215, 0.0, 4))


def checkpoint_sd3() -> dict[str, Tensor]:
    clip = random_weights(shapes.clip_l("text_encoders.clip_l", projection=True))
    return half(mmdit("model.diffusion_model"), clip, tiny_vae("first_stage_model", 1.5305, 0.0609, 16))


def tokens_sd15() -> tuple[dict[str, Tensor], dict[str, str]]:
    return token_file("sd15", "down,mid", (4, 768), (100, 768))


def tokens_sd3() -> tuple[dict[str, Tensor], dict[str, str]]:
    layers, width = 5, 64 * shapes.MMDIT_DEPTH
    return token_file("sd3", str(layers), (layers, 4, width), (100, layers * width))


def token_file(
    family: str, blocks: str, shape: tuple[int, ...], time_shape: tuple[int, int]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors = {
        "tokens": draw(f"{family}.tokens", shape, 2.0),
        "time_table": draw(f"{family}.time_table", time_shape, 0.1),
    }
    return tensors, {"format": "softrepa", "format_version": "1", "family": family, "blocks": blocks}


CHECKPOINTS = {"sd15": checkpoint_sd15, "sd3": checkpoint_sd3}
TOKENS = {"sd15": tokens_sd15, "sd3": tokens_sd3}
