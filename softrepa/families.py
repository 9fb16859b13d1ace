"""What differs between the model families: one frozen table, and how files and blocks are named in it."""

from dataclasses import dataclass

from .errors import SoftREPAError, shown

TEXT_WIDTH = 4096
"""Width of SD3's text encoding; soft tokens of this width go through the model's own context embedder."""

UNET_BLOCKS = ("down", "mid", "up")
"""Cross-attention blocks of a UNet, in forward order."""

LONGEST_COUNT = 4
"""Digits of a number of blocks."""

Blocks = tuple[str, ...] | int
"""Where tokens act: UNet block names, or the number of leading joint blocks of an MMDiT."""


INIT_STD = 0.02
"""Standard deviation of new time tables, and of new tokens where they do not start from the text encoder."""


@dataclass(frozen=True)
class Recipe:
    """How the reference trains a family."""

    n_tokens: int
    layers: int
    has_time_table: bool
    starts_from_bos: bool
    denoising_weight: float


@dataclass(frozen=True)
class Family:
    """One row of the table. `context_width` is None where each model of the family has its own width."""

    name: str
    title: str
    is_unet: bool
    context_width: int | None
    published_blocks: tuple[str, ...]
    recipe: Recipe


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd15",
            "SD1.5",
            is_unet=True,
            context_width=768,
            published_blocks=("down",),
            recipe=Recipe(4, 1, has_time_table=True, starts_from_bos=True, denoising_weight=10.0),
        ),
        Family(
            "sdxl",
            "SDXL",
            is_unet=True,
            context_width=2048,
            published_blocks=("down", "mid"),
            recipe=Recipe(4, 1, has_time_table=False, starts_from_bos=False, denoising_weight=10.0),
        ),
        Family(
            "sd3",
            "SD3",
            is_unet=False,
            context_width=None,
            published_blocks=(),
            recipe=Recipe(4, 5, has_time_table=True, starts_from_bos=False, denoising_weight=0.0),
        ),
    )
}


def family_named(name: str, label: str) -> Family:
    """The row called `name`; `label` is who asks, for the error."""
    if name not in FAMILIES:
        raise SoftREPAError(f'{label}: family is "{shown(name)}", expected one of {", ".join(FAMILIES)}.')
    return FAMILIES[name]


def family_of_shape(shape: tuple[int, ...], label: str) -> Family:
    """The family that a (m, d) or (L, m, d) token tensor without metadata belongs to."""
    if len(shape) == 3:
        return FAMILIES["sd3"]
    for family in FAMILIES.values():
        if len(shape) == 2 and shape[1] == family.context_width:
            return family
    raise SoftREPAError(
        f"{label}: tokens have shape {list(shape)}, "
        "expected [m, 768] (SD1.5), [m, 2048] (SDXL) or [layers, m, width] (SD3)."
    )


def parse_blocks(text: str, family: Family, label: str) -> Blocks:
    """Reads "down,mid" (UNet) or "5" (MMDiT)."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if family.is_unet:
        if names and all(name in UNET_BLOCKS for name in names):
            return tuple(name for name in UNET_BLOCKS if name in names)
        expected = f"a comma list of {', '.join(UNET_BLOCKS)}"
    else:
        if len(names) == 1 and names[0].isdecimal() and len(names[0]) <= LONGEST_COUNT and int(names[0]) > 0:
            return int(names[0])
        expected = "the number of joint blocks, 1 or more"
    raise SoftREPAError(f'{label}: blocks is "{shown(text)}", expected {expected} ({family.title}).')


def format_blocks(blocks: Blocks) -> str:
    """The inverse of `parse_blocks`."""
    return str(blocks) if isinstance(blocks, int) else ",".join(blocks)
