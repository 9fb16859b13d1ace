"""Images and captions through ComfyUI's VAE and CLIP.

Latents are stored as the VAE gives them (the posterior's mean): the model's `process_latent_in` is the trainer's. Text
is stored in 16 bits, and an encoding made on the spot is rounded the same way, so that a run does not depend on what
was cached; only the empty caption, which tokens may start from, is kept as it is.

Several go through an encoder at once. Matrix products of another shape round differently in the last bits, so a call
always has the same shape: what is missing in the last one is filled up with repeats.
"""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from numbers import Integral

import comfy.sd
import torch
from comfy.sd1_clip import SDClipModel
from torch import Tensor

from ...data.dataset import Cond
from ...data.latent_lists import are_stills, cond_of
from ...errors import SoftREPAError, shown

REST = "rest/"
"""Before the names of what an encoder gives besides, in an entry of the cache."""

AT_ONCE = 8
"""Images, or rows of tokens, in a call of an encoder."""
MOST_TOKENS, MOST_PIXELS = 2**10, 2**19
"""In such a call, of more than one."""


def images_at_once(vae: comfy.sd.VAE, size: tuple[int, int]) -> int:
    """How many images of a size (width, height) go through the VAE in a call; a video VAE takes several for frames."""
    return 1 if is_of_video(vae) else max(1, min(AT_ONCE, MOST_PIXELS // (size[0] * size[1])))


def is_of_video(vae: comfy.sd.VAE) -> bool:
    """Whether its latents have frames, of which a still has one."""
    return getattr(vae, "latent_dim", 2) == 3


def encode_images(vae: comfy.sd.VAE, pixels: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """(C, h, w) of each of `images_at_once` images at most, (H, W, 3) of one size; (C, 1, h, w) by a video VAE.

    `names` are theirs, for errors. Raises SoftREPAError for latents that are not of still images, and for those that
    are no numbers.
    """
    height, width, _ = pixels[0].shape
    filled = [*pixels, *[pixels[-1]] * (images_at_once(vae, (width, height)) - len(pixels))]
    return _latents(vae, filled, names)[: len(pixels)]


def encode_image(vae: comfy.sd.VAE, pixels: Tensor, name: str) -> Tensor:
    """As `encode_images`, of one image that goes through the VAE alone."""
    return _latents(vae, [pixels], [name])[0]


def _latents(vae: comfy.sd.VAE, pixels: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """Of all of one call; of repeats at the end there are no names."""
    with torch.inference_mode():
        latents = vae.encode(torch.stack(list(pixels)))
    if not are_stills(latents) or len(latents) != len(pixels):
        raise SoftREPAError(
            f"vae gives latents of shape {list(latents.shape)}, expected those of still images, "
            f"[{len(pixels)}, channels, height, width]."
        )
    for latent, name in zip(latents, names, strict=False):
        if not latent.isfinite().all():
            raise SoftREPAError(
                f"vae gives NaN or infinite values for {shown(name)}, expected numbers; run ComfyUI with --fp32-vae."
            )
    return [copied(latent) for latent in latents]


def decoded_still(vae: comfy.sd.VAE, samples: Tensor) -> Tensor:
    """(H, W, 3) of 0 to 1, float32 on the CPU, of the first latent; of a video VAE, which gives frames, the first."""
    pixels = vae.decode(samples)
    return pixels.reshape(-1, *pixels.shape[-3:])[0].float().clamp(0, 1).cpu()


def encode_caption(clip: comfy.sd.CLIP, caption: str) -> Cond:
    """As ComfyUI's nodes encode it, alone."""
    with torch.inference_mode():
        return _encoded(clip, _tokens(clip, caption))


def encode_captions(clip: comfy.sd.CLIP, captions: Sequence[str]) -> list[Cond]:
    """The encoding of each, with several rows of tokens in a call of an encoder's network.

    What ComfyUI does around that is its own code, caption by caption.
    """
    tokens = [_tokens(clip, caption) for caption in captions]
    with torch.inference_mode(), _rows_together(clip.cond_stage_model, tokens, _tokens(clip, "")):
        return [_encoded(clip, one) for one in tokens]


def _tokens(clip: comfy.sd.CLIP, caption: str) -> dict:
    """Brackets in a caption are brackets, no weights."""
    return clip.tokenize(caption, disable_weights=True)


def _encoded(clip: comfy.sd.CLIP, tokens: dict) -> Cond:
    entries = clip.encode_from_tokens_scheduled(tokens, show_pbar=False)
    if len(entries) != 1:
        raise SoftREPAError(f"clip gives {len(entries)} encodings by a schedule, expected one; leave hooks out.")
    cond = cond_of(entries[0], "clip")
    pooled = cond["pooled_output"]
    found: Cond = {
        "cross_attn": ordinary(cond["cross_attn"]),
        "pooled_output": None if pooled is None else ordinary(pooled),
    }
    if "rest" in cond:
        found["rest"] = {name: copied(one) for name, one in cond["rest"].items()}
    return found


@contextmanager
def _rows_together(model: torch.nn.Module, captions: list[dict], empty: dict):
    """While it lasts, a text encoder that is asked for rows of tokens encodes those of all captions.

    `captions` and `empty`, the caption "", are what the tokenizer gave: rows of (token, weight, ...) by the name of an
    encoder.
    """
    parts = []
    for child, part in model.named_children():
        name = child.removeprefix("clip_")
        if name in empty and isinstance(part, SDClipModel):
            rows = [_plain([token for token, *_ in row]) for one in captions for row in one[name]]
            part.encode = _Together(part.encode, rows, usual=len(empty[name][0]))
            parts.append(part)
    try:
        yield
    finally:
        for part in parts:
            del part.encode  # that of its class is back


class _Together:
    """`SDClipModel.encode` on rows of tokens that are known ahead.

    Rows of the `usual` length share a call; longer ones, of which few have one length, go alone.
    """

    def __init__(self, encode: Callable, rows: list[tuple], usual: int):
        self.encode, self.usual = encode, usual
        self.rows = [row for row in dict.fromkeys(rows) if row]
        self.known: dict[tuple, list] = {}

    def __call__(self, rows: list[list]):
        asked = [_plain(row) for row in rows]
        if not all(row in self.known for row in asked):
            self._encode_all()
        if not all(row in self.known for row in asked):
            return self.encode(rows)  # with a textual inversion
        output, pooled, *extra = zip(*(self.known[row] for row in asked), strict=True)
        return (
            _joined(output),
            _joined(pooled),
            *({name: _joined([one[name] for one in parts]) for name in parts[0]} for parts in extra),
        )

    def _encode_all(self) -> None:
        for length in sorted(set(map(len, self.rows))):
            rows = [row for row in self.rows if len(row) == length]
            count = max(1, min(AT_ONCE, MOST_TOKENS // length)) if length == self.usual else 1
            for start in range(0, len(rows), count):
                some = rows[start : start + count]
                found = self.encode([list(row) for row in [*some, *[some[-1]] * (count - len(some))]])
                for number, row in enumerate(some):
                    self.known[row] = [_row_of(part, number) for part in found]
        self.rows = []


def _plain(row: list) -> tuple[int, ...]:
    """A row that is known by its tokens; empty where some are vectors."""
    return tuple(row) if all(isinstance(token, Integral) for token in row) else ()


def _row_of(part, number: int):
    """Of what an encoder gives for several rows, on the CPU."""
    if isinstance(part, dict):
        return {name: _row_of(value, number) for name, value in part.items()}
    return part[number : number + 1].cpu() if isinstance(part, Tensor) else part


def _joined(parts: Sequence):
    return torch.cat(list(parts)) if isinstance(parts[0], Tensor) else parts[0]


def stored_text(cond: Cond) -> dict[str, Tensor]:
    """A caption's encoding as the cache holds it.

    In bfloat16 where the encoder computes in it, otherwise in float16 where that has room for its numbers.
    """
    context = cond["cross_attn"]
    half = context.bfloat16()
    if not torch.equal(half.float(), context):
        half = context.half()
    stored = {"cross_attn": half if half.isfinite().all() else context}
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
