"""The diffusion model: ComfyUI's own MMDiT, 192 wide, as training uses it.

ComfyUI derives everything from the width: 192 means 3 heads and 3 joint blocks.
"""

import math

import torch
import torch.nn.functional as F

from softrepa.smallworld.autoencoder import CHANNELS
from softrepa.smallworld.checkpoint import GRID, HEADS, WIDTH, position_embedding
from softrepa.smallworld.text import WIDTH as TEXT_WIDTH
from softrepa.smallworld.text import FastEncoder

INSIDE = ("joint_blocks", "context_embedder", "y_embedder")
"""What holds the matrices that are trained by orthogonal updates."""


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


def padding_bias(context: torch.Tensor, noisy: torch.Tensor, text: FastEncoder) -> torch.Tensor:
    """Of attention's logits (1, 1, 1, N): the last row of the text counts as often as its padding is repeated."""
    bias = torch.zeros(1, 1, 1, context.shape[1] + noisy.shape[-1] * noisy.shape[-2] // 4, device=noisy.device)
    bias[..., context.shape[1] - 1] = math.log(text.repeats)
    return bias


class Velocity:
    """The model on captions, with padding given once: float-equal to ComfyUI's 77 tokens, at a third of the cost."""

    def __init__(self, model: torch.nn.Module, text: FastEncoder):
        self.model, self.text = model, text

    def __call__(self, noisy: torch.Tensor, sigma: torch.Tensor, encoded: tuple[torch.Tensor, torch.Tensor]):
        context, pooled = encoded
        bias = padding_bias(context, noisy, self.text)

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
