"""An image or a caption through ComfyUI's VAE or CLIP.

Latents are stored as the VAE gives them (float32, the posterior's mean): the model's `process_latent_in` is the
trainer's. Text is stored in float16, and an encoding made on the spot is rounded the same way, so that a run does not
depend on what was cached; only the empty caption, which tokens may start from, is kept as it is.
"""

import comfy.sd
import torch
from torch import Tensor

from ...data.dataset import Cond
from ...data.latent_lists import are_stills, cond_of
from ...errors import SoftREPAError, shown

REST = "rest/"
"""Before the names of what an encoder gives besides, in an entry of the cache."""


def encode_image(vae: comfy.sd.VAE, pixels: Tensor, name: str) -> Tensor:
    """(C, h, w), or (C, 1, h, w) by a video VAE, of pixels (H, W, 3); `name` is the image's, for errors.

    Raises SoftREPAError for no still image.
    """
    with torch.inference_mode():
        latent = vae.encode(pixels.unsqueeze(0))
    if not are_stills(latent):
        raise SoftREPAError(
            f"vae gives latents of shape {list(latent.shape)}, expected those of still images, "
            "[1, channels, height, width]."
        )
    if not latent.isfinite().all():
        raise SoftREPAError(
            f"vae gives NaN or infinite values for {shown(name)}, expected numbers; run ComfyUI with --fp32-vae."
        )
    return ordinary(latent[0])


def encode_caption(clip: comfy.sd.CLIP, caption: str) -> Cond:
    """Brackets in a caption are brackets, no weights."""
    with torch.inference_mode():
        entries = clip.encode_from_tokens_scheduled(clip.tokenize(caption, disable_weights=True), show_pbar=False)
    if len(entries) != 1:
        raise SoftREPAError(f"clip gives {len(entries)} encodings by a schedule, expected one; leave hooks out.")
    cond = cond_of(entries[0], "clip")
    pooled = cond["pooled_output"]
    found: Cond = {
        "cross_attn": ordinary(cond["cross_attn"]),
        "pooled_output": None if pooled is None else ordinary(pooled),
    }
    rest = {name: one for name, one in entries[0][1].items() if isinstance(one, Tensor) and name not in found}
    if rest:
        found["rest"] = {name: copied(one) for name, one in rest.items()}
    return found


def stored_text(cond: Cond) -> dict[str, Tensor]:
    """A caption's encoding as the cache holds it: half as large where float16 has room for its numbers."""
    half = cond["cross_attn"].half()
    stored = {"cross_attn": half if half.isfinite().all() else cond["cross_attn"]}
    if cond["pooled_output"] is not None:
        stored["pooled_output"] = cond["pooled_output"]
    return stored | {f"{REST}{name}": tensor for name, tensor in cond.get("rest", {}).items()}


def text_of(stored: dict[str, Tensor]) -> Cond:
    """The inverse of `stored_text`."""
    cond: Cond = {"cross_attn": stored["cross_attn"].float(), "pooled_output": stored.get("pooled_output")}
    rest = {name.removeprefix(REST): tensor for name, tensor in stored.items() if name.startswith(REST)}
    if rest:
        cond["rest"] = rest
    return cond


def ordinary(tensor: Tensor) -> Tensor:
    """A float32 copy on the CPU that autograd may save."""
    return copied(tensor).float()


def copied(tensor: Tensor) -> Tensor:
    """A copy on the CPU without inference mark, of the same type: ids stay whole numbers."""
    with torch.inference_mode(False):
        return tensor.cpu().clone()
