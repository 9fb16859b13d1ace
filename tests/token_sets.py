"""Token sets that fit the tiny models."""

from comfyui_softrepa.softrepa.families import FAMILIES
from comfyui_softrepa.softrepa.tokens import SoftTokens
from softrepa_tests.tiny_models import HIDDEN, WIDTH, seeded


def tokens_for(family: str, seed: str = "a", banks: bool = False, blocks=None, static: bool = False) -> SoftTokens:
    """Four tokens with a time table; 5 layers for SD3, 3 for other transformers, down + mid for UNets."""
    if FAMILIES[family].is_layered:
        layers, width = 5 if family == "sd3" else 3, HIDDEN[family]
        shape, table, usual = (layers, 4, width), (100, layers * width), layers
    else:
        shape, table, usual = (4, WIDTH[family]), (100, WIDTH[family]), ("down", "mid")
    return SoftTokens.of(
        seeded(shape, f"{seed}/tokens", 0.5),
        family,
        blocks or usual,
        time_table=None if static else seeded(table, f"{seed}/table", 0.5),
        negative_tokens=seeded(shape, f"{seed}/negative", 0.5) if banks else None,
        name=seed,
    )
