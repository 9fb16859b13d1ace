"""Which family a ComfyUI MODEL belongs to, and what of it must agree with a token file."""

from dataclasses import dataclass

import torch
from comfy.ldm.modules.diffusionmodules.mmdit import MMDiT
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher

from ..errors import SoftREPAError
from ..families import FAMILIES, Blocks, Family, parse_blocks
from ..latent_lists import PIXELS
from ..tokens import SoftTokens


@dataclass(frozen=True)
class ModelShape:
    """`width` is that of the stream the tokens join; `layers` the joint blocks of an MMDiT, 0 for a UNet."""

    family: Family
    width: int
    layers: int = 0

    @property
    def text(self) -> str:
        if self.family.is_unet:
            return f"{self.family.title} (context width {self.width})"
        return f"{self.family.title} ({self.layers} joint blocks x {self.width})"


def model_shape(model: ModelPatcher) -> ModelShape:
    """Recognises the model by its network. Raises SoftREPAError for a family without soft tokens."""
    network = network_of(model)
    if isinstance(network, MMDiT):
        return ModelShape(FAMILIES["sd3"], network.hidden_size, len(network.joint_blocks))
    width = model.model.model_config.unet_config.get("context_dim")
    if isinstance(width, list):
        width = width[0]
    for family in FAMILIES.values():
        if isinstance(network, UNetModel) and family.is_unet and family.context_width == width:
            return ModelShape(family, width)
    found = type(model.model).__name__ + (f" (context width {width})" if width else "")
    raise SoftREPAError(f"Model is {found}, expected SD1.5, SDXL, SD3 or SD3.5.")


def network_of(model: ModelPatcher) -> torch.nn.Module:
    network = model.get_model_object("diffusion_model")
    return getattr(network, "_orig_mod", network)  # torch.compile wraps the module


def check_positions(name: str, model: ModelPatcher, width: int, height: int) -> None:
    """Refuses latents of more cells a side than the position table of an SD3 model reaches."""
    network = network_of(model)
    if not isinstance(network, MMDiT) or network.pos_embed is None:
        return
    most = network.pos_embed_max_size * network.patch_size
    if max(width, height) > most:
        raise SoftREPAError(
            f"{name} is {PIXELS * width} x {PIXELS * height} pixels, expected at most {PIXELS * most} a side: this "
            "model has no positions beyond."
        )


def check_fit(tokens: SoftTokens, shape: ModelShape) -> None:
    """Raises SoftREPAError unless `tokens` can act in a model of this shape."""
    belongs = tokens.family is shape.family
    if belongs and not shape.family.is_unet:
        belongs = tokens.layers <= shape.layers and tokens.hidden_width in (None, shape.width)
    if not belongs:
        raise SoftREPAError(
            f"{tokens.label} are for {tokens.family.name} ({tokens.shape_text}), but this model is {shape.text}."
        )


def chosen_blocks(tokens: SoftTokens, text: str) -> Blocks:
    """Blocks for the node option `text`: "auto" is what the file says; an MMDiT count cannot exceed its layers."""
    if text.strip().lower() == "auto":
        return tokens.blocks
    blocks = parse_blocks(text, tokens.family, tokens.label)
    if isinstance(blocks, int) and blocks > tokens.layers:
        raise SoftREPAError(f"{tokens.label}: blocks is {blocks}, expected at most the file's {tokens.layers} layers.")
    return blocks
