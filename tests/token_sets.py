"""Token sets that fit the tiny models."""

from comfyui_softrepa.softrepa.tokens import SoftTokens
from softrepa_tests.tiny_models import seeded


def tokens_for(family: str, seed: str = "a", banks: bool = False, blocks=None, static: bool = False) -> SoftTokens:
    """Four tokens with a time table; 5 layers of width 384 for SD3, down + mid for the UNets."""
    shape, table = {
        "sd15": ((4, 768), (100, 768)),
        "sdxl": ((4, 2048), (100, 2048)),
        "sd3": ((5, 4, 384), (100, 1920)),
    }[family]
    return SoftTokens.of(
        seeded(shape, f"{seed}/tokens", 0.5),
        family,
        blocks or (5 if family == "sd3" else ("down", "mid")),
        time_table=None if static else seeded(table, f"{seed}/table", 0.5),
        negative_tokens=seeded(shape, f"{seed}/negative", 0.5) if banks else None,
        name=seed,
    )
