"""The contrastive step that the reference's figures are for: its batch and its tokens, by family."""

from comfyui_softrepa.softrepa.tokens import SoftTokens
from softrepa_tests.learning import TEXT
from softrepa_tests.tiny_models import CHANNELS, WIDTH, seeded

TIMESTEP = {"sd15": 400, "sdxl": 400, "sd3": 250}
FAMILIES = ("sd15", "sdxl", "sd3")


def batch(family: str):
    """Latents, shared noise and conds of the golden step."""
    tag = f"{family}train"
    latents = seeded((3, CHANNELS[family], 8, 8), f"{tag}/latent", 1.0)
    noise = seeded((1, CHANNELS[family], 8, 8), f"{tag}/noise", 1.0)
    context = seeded((3, 77, WIDTH[family]), f"{tag}/ctx", 1.0)
    pooled = {"sd15": None, "sdxl": seeded((3, 1280), f"{tag}/pooled", 1.0), "sd3": seeded((3, 2048), f"{tag}/y", 1.0)}
    conds = [{"cross_attn": context[j : j + 1]} for j in range(3)]
    if pooled[family] is not None:
        for j, cond in enumerate(conds):
            cond["pooled_output"] = pooled[family][j : j + 1]
    return latents, noise, conds


def short_batch(family: str):
    """The same images with texts of a few tokens, which take less time."""
    latents, noise, conds = batch(family)
    return latents, noise, [cond | {"cross_attn": cond["cross_attn"][:, :TEXT]} for cond in conds]


def golden_tokens(family: str) -> SoftTokens:
    shapes = {"sd15": ((4, 768), 768), "sdxl": ((4, 2048), 2048), "sd3": ((5, 4, 384), 1920)}
    shape, width = shapes[family]
    table = seeded((100, width), f"{family}/table", 0.5)
    blocks = 5 if family == "sd3" else ("down", "mid")
    return SoftTokens.of(seeded(shape, f"{family}/tokens", 0.5), family, blocks, time_table=table)
