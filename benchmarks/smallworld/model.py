"""The diffusion model: ComfyUI's own MMDiT, 192 wide, as training uses it and as a checkpoint stores it.

ComfyUI derives everything from the width: 192 means 3 heads and 3 joint blocks.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

from .autoencoder import CHANNELS
from .text import WIDTH as TEXT_WIDTH
from .text import FastEncoder

HEADS = 3
WIDTH = 64 * HEADS
GRID = 8  # position embeddings reach to 128 pixels
FULL_CONTEXT, FULL_POOLED = 4096, 2048  # what SD3's layers take; all but the first 768 inputs are CLIP-G's and T5's


def position_embedding() -> torch.Tensor:
    """SD3's fixed table: sine and cosine of the column, then of the row; (1, 64, 192)."""
    omega = 10000.0 ** -(np.arange(WIDTH // 4) / (WIDTH / 4))
    angles = np.arange(GRID)[:, None] * omega
    line = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    row, column = np.divmod(np.arange(GRID * GRID), GRID)
    return torch.from_numpy(np.concatenate([line[column], line[row]], axis=1).astype(np.float32))[None]


def make_model() -> torch.nn.Module:
    """A fresh MMDiT with DiT's initialisation: every block starts as the identity."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper, RMSNorm

    model = OpenAISignatureMMDITWrapper(
        input_size=None,
        patch_size=2,
        in_channels=CHANNELS,
        depth=HEADS,
        adm_in_channels=TEXT_WIDTH,
        context_embedder_config={
            "target": "torch.nn.Linear",
            "params": {"in_features": TEXT_WIDTH, "out_features": WIDTH},
        },
        num_patches=GRID * GRID,
        pos_embed_max_size=GRID,
        qk_norm="rms",
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    model.pos_embed.copy_(position_embedding())
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            torch.nn.init.ones_(module.weight)
        if not isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        if "adaLN" in name or name == "final_layer.linear":
            torch.nn.init.zeros_(module.weight)
        elif name.startswith("t_embedder"):
            torch.nn.init.normal_(module.weight, std=0.02)
        else:
            torch.nn.init.xavier_uniform_(module.weight.flatten(1))
        torch.nn.init.zeros_(module.bias)
    return model


class Velocity:
    """The model on captions, with padding given once: float-equal to ComfyUI's 77 tokens, at a third of the cost."""

    def __init__(self, model: torch.nn.Module, text: FastEncoder):
        self.model, self.text = model, text

    def __call__(self, noisy: torch.Tensor, sigma: torch.Tensor, encoded: tuple[torch.Tensor, torch.Tensor]):
        context, pooled = encoded
        bias = torch.zeros(1, 1, 1, context.shape[1] + noisy.shape[-1] * noisy.shape[-2] // 4, device=noisy.device)
        bias[..., context.shape[1] - 1] = math.log(self.text.repeats)

        def attention(_, q, k, v, heads, **options):
            q, k, v = (t.reshape(*t.shape[:2], heads, 64).transpose(1, 2) for t in (q, k, v))
            return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)

        return self.model(
            noisy,
            sigma * 1000,
            context=context,
            y=pooled,
            transformer_options={"optimized_attention_override": attention},
        )


def checkpoint_tensors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trained weights under SD3's names and shapes: zero columns for the text encoders that are not there."""
    sd = dict(weights)
    for key, full in (("context_embedder.weight", FULL_CONTEXT), ("y_embedder.mlp.0.weight", FULL_POOLED)):
        sd[key] = F.pad(sd[key], (0, full - sd[key].shape[1]))
    return sd | {"pos_embed": position_embedding()}
