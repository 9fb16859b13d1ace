"""The pictures of an evaluation, one at a time and each on disk before the next."""

import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import comfy.model_management as memory
import comfy.sample
import comfy.sd
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...comparing.records import Record, is_drawn, write_picture
from ...data.latent_lists import PIXELS
from ...errors import SoftREPAError, shown
from ...evaluation.inputs import EvaluateInputs
from ...progress_line import time_left

AHEAD = 16
"""Prompts that are encoded at once: the text encoder and the network change places in memory once for so many."""


class Encoder:
    """Prompts as CLIP Text Encode gives them, but a bracket in a caption is a bracket. Those to come are encoded ahead.

    `texts` are in the order in which they will be asked for.
    """

    def __init__(self, clip: comfy.sd.CLIP, texts: Iterable[str]):
        self.clip = clip
        self.texts = list(dict.fromkeys(texts))
        self.places = {text: place for place, text in enumerate(self.texts)}
        self.encoded: dict[str, list] = {}

    def __call__(self, text: str) -> list:
        if text not in self.encoded:
            start = self.places[text]
            self.encoded = {one: self.encode(one) for one in self.texts[start : start + AHEAD]}
        return self.encoded[text]

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text, disable_weights=True), show_pbar=False)


def zeroed(conditioning: list) -> list:
    """As ConditioningZeroOut does."""
    return [
        [torch.zeros_like(cross), {**rest, "pooled_output": torch.zeros_like(rest["pooled_output"])}]
        for cross, rest in conditioning
    ]


class Painter:
    """Draws as KSampler and VAE Decode do; the same noise for a seed whatever the arm."""

    def __init__(self, inputs: EvaluateInputs, clip: comfy.sd.CLIP, vae: comfy.sd.VAE, records: Sequence[Record]):
        self.inputs, self.vae = inputs, vae
        self.encode = Encoder(clip, (one.text for one in records))
        negative = self.encode.encode(inputs.negative_prompt)
        self.negative = zeroed(negative) if inputs.zero_negative else negative

    def draw(self, model: ModelPatcher, one: Record) -> Tensor:
        """(H, W, 3) of 0 to 1."""
        inputs = self.inputs
        channels = model.get_model_object("latent_format").latent_channels
        latent = torch.zeros(1, channels, inputs.height // PIXELS, inputs.width // PIXELS)
        samples = comfy.sample.sample(
            *(model, comfy.sample.prepare_noise(latent, one.seed), inputs.steps, inputs.cfg),
            *(inputs.sampler_name, inputs.scheduler, self.encode(one.text), self.negative, latent),
            disable_pbar=True,
            seed=one.seed,
        )
        return decoded(self.vae, samples)


def decoded(vae: comfy.sd.VAE, samples: Tensor) -> Tensor:
    """(H, W, 3) of 0 to 1."""
    pixels = vae.decode(samples).float().clamp(0, 1)
    return pixels.reshape(-1, *pixels.shape[-3:])[0].cpu()


def draw_missing(
    folder: Path, records: Sequence[Record], draw: Callable[[Record], Tensor], tell: Callable[[str], None]
) -> None:
    """Draws what is not on disk yet. Stopped, it goes on where it was."""
    missing = [one for one in records if not is_drawn(folder, one)]
    tell(f"{len(records) - len(missing):,} of {len(records):,} pictures are there, {len(missing):,} to draw")
    started = time.monotonic()
    for done, one in enumerate(missing, 1):
        memory.throw_exception_if_processing_interrupted()
        pixels = draw(one)
        if not pixels.isfinite().all():
            raise SoftREPAError(
                f'{shown(one.arm)} draws NaN or infinite values for "{shown(one.text, 80)}", expected a picture; run '
                "with -- --fp32-vae or another precision."
            )
        write_picture(folder, one, pixels.numpy())
        left = (time.monotonic() - started) / done * (len(missing) - done)
        tell(f"{done:,} of {len(missing):,} pictures drawn, {time_left(left)} left")
