"""What differs between the model families: one frozen table, and how files and blocks are named in it."""

from dataclasses import dataclass

from .errors import SoftREPAError, shown

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
    """One row of the table.

    models: the models of the family as people call them; stream: what tokens join, and so which adapter serves it:
    the "context" of cross-attentions, which share one bank of rows, the text in "joint" blocks, or the "sequence" that
    attention sees as keys and values, one bank a block.
    text_width: of the text encoding, as the text encoder gives it; None where each model has its own. context_width:
    of the text where tokens join it, None where each model has its own width. embedded_width: of the rows that go
    through the network's own embedder of text first; None where none do.
    published_blocks: where the published files act; empty where they say it themselves. recipe: by default SD3's, for
    nobody has published another for a transformer.
    """

    name: str
    title: str
    models: tuple[str, ...]
    stream: str
    text_width: int | None
    context_width: int | None = None
    embedded_width: int | None = None
    published_blocks: tuple[str, ...] = ()
    recipe: Recipe = Recipe(4, 5, has_time_table=True, starts_from_bos=False, denoising_weight=0.0)

    @property
    def is_layered(self) -> bool:
        """Whether every place has a bank of rows of its own."""
        return self.stream != "context"

    def usual_blocks(self, layers: int) -> Blocks:
        """Where tokens act by the recipe, in a model of so many layers."""
        return self.published_blocks or min(self.recipe.layers, layers)

    def shape(self, layers: int, count: int, width: int) -> tuple[int, ...]:
        """Of the tokens in a file: (m, d), or (L, m, d) where there are layers."""
        return (layers, count, width) if self.is_layered else (count, width)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether tokens of this family may have a shape."""
        return len(shape) == len(self.shape(1, 1, 1)) and self.context_width in (None, shape[-1])

    @property
    def shape_text(self) -> str:
        """The shape that tokens must have, for errors."""
        return "[layers, m, width]" if self.is_layered else f"[m, {self.context_width}]"

    def size_text(self, layers: int, width: int) -> str:
        """How errors and summaries call tokens of this size."""
        return f"{layers} layers x {width}" if self.is_layered else f"context width {width}"


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "sd15",
            "SD1.5",
            models=("SD1.5",),
            stream="context",
            text_width=768,
            context_width=768,
            published_blocks=("down",),
            recipe=Recipe(4, 1, has_time_table=True, starts_from_bos=True, denoising_weight=10.0),
        ),
        Family(
            "sdxl",
            "SDXL",
            models=("SDXL",),
            stream="context",
            text_width=2048,
            context_width=2048,
            published_blocks=("down", "mid"),
            recipe=Recipe(4, 1, has_time_table=False, starts_from_bos=False, denoising_weight=10.0),
        ),
        Family(
            "sd3",
            "SD3",
            models=("SD3", "SD3.5"),
            stream="joint",
            text_width=4096,
            embedded_width=4096,
        ),
        Family("lumina2", "Lumina 2", models=("Lumina 2",), stream="sequence", text_width=2304),
        Family("zimage", "Z-Image", models=("Z-Image",), stream="sequence", text_width=2560),
        Family("flux", "Flux 1", models=("Flux 1",), stream="sequence", text_width=4096),
        Family("chroma", "Chroma", models=("Chroma",), stream="sequence", text_width=4096),
        Family("qwenimage", "Qwen-Image", models=("Qwen-Image",), stream="sequence", text_width=3584),
        Family("flux2", "Flux 2", models=("Flux 2",), stream="sequence", text_width=None),
        Family("krea2", "Krea 2", models=("Krea 2",), stream="sequence", text_width=30720),
        Family("hunyuanimage", "HunyuanImage", models=("HunyuanImage",), stream="sequence", text_width=3584),
        Family("anima", "Anima", models=("Anima",), stream="sequence", text_width=1024),
    )
}

PUBLISHED = ("sd15", "sdxl", "sd3")
"""Whose published files say nothing of themselves; the files of all others name their family."""

PADDED = FAMILIES["anima"]
"""Whose attention sees the text filled up with zeros: the tokens that anima_lora trains take the place of some."""


def family_named(name: str, label: str) -> Family:
    """The row called `name`; `label` is who asks, for the error."""
    if name not in FAMILIES:
        raise SoftREPAError(f'{label}: family is "{shown(name)}", expected one of {", ".join(FAMILIES)}.')
    return FAMILIES[name]


def family_of_shape(shape: tuple[int, ...], label: str) -> Family:
    """The family that a (m, d) or (L, m, d) token tensor without metadata belongs to."""
    families = [FAMILIES[name] for name in PUBLISHED]
    for family in families:
        if family.fits(shape):
            return family
    *others, last = (f"{family.shape_text} ({family.title})" for family in families)
    raise SoftREPAError(f"{label}: tokens have shape {list(shape)}, expected {', '.join(others)} or {last}.")


def parse_blocks(text: str, family: Family, label: str) -> Blocks:
    """Reads "down,mid" (UNet) or "5" (MMDiT)."""
    names = tuple(part.strip() for part in text.split(",") if part.strip())
    if not family.is_layered:
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


def depth(blocks: Blocks) -> int:
    """How many banks of rows `blocks` take."""
    return blocks if isinstance(blocks, int) else 1


def where(blocks: Blocks) -> str:
    """Blocks as a person reads them."""
    return f"first {blocks} blocks" if isinstance(blocks, int) else format_blocks(blocks)
