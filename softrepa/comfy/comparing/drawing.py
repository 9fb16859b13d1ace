"""The pictures of a comparison by ComfyUI's own samplers, one at a time and each on disk before the next."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.sample
import comfy.sd
import latent_preview
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from comfy.utils import ProgressBar

from ...comparing.inputs import CompareInputs
from ...comparing.plan import groups
from ...comparing.records import Record, is_drawn, write_picture
from ...data.latent_lists import PIXELS
from ...errors import SoftREPAError
from ...progress_line import time_left
from ..data.encoding import decoded_still

Told = Callable[[str], None]


@dataclass
class Painter:
    """Draws as KSampler and VAE Decode do; only the models of the arms differ."""

    models: Mapping[str, ModelPatcher]
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    inputs: CompareInputs

    def encode(self, text: str):
        """As CLIP Text Encode does."""
        return self.clip.encode_from_tokens_scheduled(self.clip.tokenize(text))

    def empty_latent(self, model: ModelPatcher) -> torch.Tensor:
        """As an Empty Latent node and KSampler make it for this model."""
        shape = (1, 4, self.inputs.height // PIXELS, self.inputs.width // PIXELS)
        return comfy.sample.fix_empty_latent_channels(model, torch.zeros(shape))

    def draw(self, arm: str, positive, negative, seed: int, callback) -> np.ndarray:
        """(H, W, 3) of 0 to 1; the same noise for a seed whatever the arm and the prompt."""
        model, inputs = self.models[arm], self.inputs
        latent = self.empty_latent(model)
        samples = comfy.sample.sample(
            model, comfy.sample.prepare_noise(latent, seed), inputs.steps, inputs.cfg, inputs.sampler_name,
            inputs.scheduler, positive, negative, latent, callback=callback, disable_pbar=True, seed=seed,
        )  # fmt: skip
        return decoded_still(self.vae, samples).numpy()


@dataclass
class Progress:
    """What a node shows while it draws: how far it is, the picture that becomes, and how long it still takes."""

    total: int
    steps: int
    tell: Told
    bar: ProgressBar
    done: int = 0
    started: float = 0.0

    @classmethod
    def of(cls, total: int, steps: int, tell: Told) -> "Progress":
        return cls(total, steps, tell, ProgressBar(max(1, total * steps)), started=time.monotonic())

    def callback(self, model: ModelPatcher):
        previewer = latent_preview.get_previewer(model.load_device, model.model.latent_format)

        def step(index: int, x0: torch.Tensor, _x: torch.Tensor, _steps: int) -> None:
            preview = previewer.decode_latent_to_preview_image("JPEG", x0) if previewer else None
            self.bar.update_absolute(self.done * self.steps + min(index + 1, self.steps), None, preview)

        return step

    def drawn(self, preview) -> None:
        self.done += 1
        self.bar.update_absolute(self.done * self.steps, None, ("JPEG", preview, None))
        left = (time.monotonic() - self.started) / self.done * (self.total - self.done)
        self.tell(f"{self.done:,} of {self.total:,} pictures drawn, {time_left(left)} left")


def draw_missing(
    painter: Painter,
    folder: Path,
    records: Sequence[Record],
    tell: Told,
    preview: Callable[[Record], object],
) -> int:
    """Draws what is not on disk yet; returns how many those were. `preview` gives a picture to show after each.

    Stopped, it goes on where it was: each picture is written before the next is begun.
    """
    missing = [one for one in records if not is_drawn(folder, one)]
    progress = Progress.of(len(missing), painter.inputs.steps, tell)
    if not missing:
        return 0
    negative = painter.encode(painter.inputs.negative_prompt)
    callbacks = {arm: progress.callback(model) for arm, model in painter.models.items()}
    for group in groups(missing):
        texts = dict.fromkeys(one.text for one in group)
        positives = {text: painter.encode(text) for text in texts}
        group.sort(key=lambda one: is_other_network(painter, one.arm))  # each network comes into memory once
        for one in group:
            pixels = painter.draw(one.arm, positives[one.text], negative, one.seed, callbacks[one.arm])
            if not np.isfinite(pixels).all():
                raise SoftREPAError(
                    f'{one.arm} draws NaN or infinite values for "{one.text[:80]}", expected a picture; run ComfyUI '
                    "with --fp32-vae or another precision."
                )
            write_picture(folder, one, pixels)
            progress.drawn(preview(one))
    return len(missing)


def is_other_network(painter: Painter, arm: str) -> bool:
    """Whether an arm has weights of its own, as a second model may, instead of the first one's."""
    first = next(iter(painter.models.values()))
    return painter.models[arm].model is not first.model
