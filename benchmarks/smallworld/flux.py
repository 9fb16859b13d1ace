"""The same world in a second architecture: ComfyUI's own Flux, 128 wide, with two double and four single blocks.

ComfyUI derives everything from the width: a head takes 128, so there is one. The text encoder, the autoencoder and the
pictures are those of the first model. There is no distilled guidance: what embeds it is zero, and prompts are drawn
with cfg 2 as there.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from softrepa.smallworld import autoencoder, checkpoint
from softrepa.smallworld.text import WIDTH as TEXT_WIDTH
from softrepa.smallworld.text import FastEncoder

from .fitting import save_atomically
from .model import padding_bias

FILE = Path(__file__).with_name("flux.safetensors")
CHECKPOINT_NAME = "smallworld-flux.safetensors"
SCALE, SHIFT = 0.3611, 0.1159  # ComfyUI's Flux latent format: model = (latent - SHIFT) * SCALE

WIDTH = 128
DOUBLE, SINGLE = 2, 4
INSIDE = ("double_blocks", "single_blocks", "txt_in", "vector_in")
"""What holds the matrices that are trained by orthogonal updates."""


def make_model() -> torch.nn.Module:
    """A fresh Flux with DiT's initialisation: every block starts as the identity."""
    import comfy.ops
    from comfy.ldm.flux.model import Flux

    model = Flux(
        in_channels=autoencoder.CHANNELS,
        out_channels=autoencoder.CHANNELS,
        vec_in_dim=TEXT_WIDTH,
        context_in_dim=TEXT_WIDTH,
        hidden_size=WIDTH,
        mlp_ratio=4.0,
        num_heads=1,
        depth=DOUBLE,
        depth_single_blocks=SINGLE,
        axes_dim=[16, 56, 56],
        theta=10000,
        patch_size=2,
        qkv_bias=True,
        guidance_embed=True,
        txt_ids_dims=[],
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    for name, module in model.named_modules():
        if name.endswith(("query_norm", "key_norm")):
            torch.nn.init.ones_(module.weight)
        if not isinstance(module, torch.nn.Linear):
            continue
        if any(part in name for part in ("mod.lin", "modulation", "final_layer", "guidance_in")):
            torch.nn.init.zeros_(module.weight)
        elif name.startswith("time_in"):
            torch.nn.init.normal_(module.weight, std=0.02)
        else:
            torch.nn.init.xavier_uniform_(module.weight)
        torch.nn.init.zeros_(module.bias)
    model.guidance_in.requires_grad_(False)
    return model


class Velocity:
    """The model on captions, with padding given once: float-equal to ComfyUI's 77 tokens, at a third of the cost."""

    def __init__(self, model: torch.nn.Module, text: FastEncoder):
        self.model, self.text = model, text

    def __call__(self, noisy: torch.Tensor, sigma: torch.Tensor, encoded: tuple[torch.Tensor, torch.Tensor]):
        from softrepa.comfy.training.recomputation import OutOfPlace, plain_operations

        context, pooled = encoded
        bias = padding_bias(context, noisy, self.text)

        def attention(_, q, k, v, heads, **options):
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

        # ComfyUI's blocks add to their inputs in place, and its fused rotation has no backward
        with plain_operations(), OutOfPlace():
            return self.model(
                noisy, sigma, context=context, y=pooled,
                transformer_options={"optimized_attention_override": attention},
            )  # fmt: skip


def write(path: Path, weights: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """What training made: 8 bits a weight."""
    save_atomically(checkpoint.quantise(weights), path, metadata)


def read(path: Path = FILE) -> dict[str, torch.Tensor]:
    """The weights, float32 and under training's names."""
    return checkpoint.dequantise(load_file(path))


def write_checkpoint(path: Path, made: Path = FILE) -> Path:
    """The network and the autoencoder (22 MB) for `CheckpointLoaderSimple`; the CLIP is the first model's."""
    weights = read(made)
    weights["txt_in.weight"] = F.pad(weights["txt_in.weight"], (0, checkpoint.FULL_CONTEXT - TEXT_WIDTH))
    first = checkpoint.read_shipped()
    vae = autoencoder.checkpoint_tensors(first["encoder"], first["decoder"])
    # both networks see the same latents: what lies between differs by what ComfyUI does to those of each
    scale = autoencoder.VAE_SCALE / autoencoder.SCALE * SCALE
    vae |= {"vae_scale": torch.tensor(scale), "vae_shift": torch.tensor(SHIFT)}
    groups = {"model.diffusion_model.": weights, "vae.": vae}
    save_atomically({prefix + key: value for prefix, values in groups.items() for key, value in values.items()}, path)
    return path
