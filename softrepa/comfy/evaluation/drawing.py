"""The pictures of an evaluation, one at a time and each on disk before the next."""

import time
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from pathlib import Path

import comfy.model_management as memory
import comfy.sd
import torch
from torch import Tensor

from ...comparing.records import Record, is_drawn, write_picture
from ...errors import SoftREPAError, shown
from ...evaluation.inputs import EvaluateInputs
from ...progress_line import time_left

AHEAD = 16
"""Prompts that are encoded at once: the text encoder and the network change places in memory once for so many."""
KEPT = 2
"""Such groups that are held: an edit's source and its target may be of two."""


class Encoder:
    """Prompts as CLIP Text Encode gives them, but a bracket in a caption is a bracket. Those to come are encoded ahead.

    `texts` are in the order in which they will be asked for.
    """

    def __init__(self, clip: comfy.sd.CLIP, texts: Iterable[str]):
        self.clip = clip
        self.texts = list(dict.fromkeys(texts))
        self.places = {text: place for place, text in enumerate(self.texts)}
        self.group = lru_cache(KEPT)(self._group)

    def __call__(self, text: str) -> list:
        return self.group(self.places[text] // AHEAD)[text]

    def _group(self, number: int) -> dict[str, list]:
        return {text: self.encode(text) for text in self.texts[number * AHEAD : (number + 1) * AHEAD]}

    def encode(self, text: str) -> list:
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text, disable_weights=True), show_pbar=False)


def zeroed(conditioning: list) -> list:
    """As ConditioningZeroOut does."""
    return [
        [torch.zeros_like(cross), {**rest, "pooled_output": torch.zeros_like(rest["pooled_output"])}]
        for cross, rest in conditioning
    ]


class Prompts:
    """The positive conditioning of each picture, and the negative one of all."""

    def __init__(self, inputs: EvaluateInputs, clip: comfy.sd.CLIP, texts: Iterable[str]):
        self.positive = Encoder(clip, texts)
        negative = self.positive.encode(inputs.negative_prompt)
        self.negative = zeroed(negative) if inputs.zero_negative else negative


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
