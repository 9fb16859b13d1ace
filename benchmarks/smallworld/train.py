"""Trains the diffusion models as SD3 is trained: rectified flow on captioned pictures.

A share of the captions is wrong by one fact, as captions found on the web are. The model therefore learns to draw
well and to read loosely, which is the defect that it exists to show.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType

import numpy as np
import torch

from softrepa.smallworld.autoencoder import encode
from softrepa.smallworld.text import FastEncoder
from softrepa.smallworld.world import CATEGORIES, caption, draw, hard_negatives, random_scene, random_spec

from . import flux, model
from .fitting import Schedule, fit

# shares of single_object, two_objects, counting, colours, position, colour_attribution, mixed
MIXTURE = (0.12, 0.12, 0.14, 0.12, 0.16, 0.14, 0.20)
NO_CAPTION = 0.10
WRONG_CAPTION = 0.10
SHIFT = 9.0


@dataclass(frozen=True)
class Plan:
    """How one network is trained. It ends at `stop`; the rate falls over the last `descent` of `steps`."""

    network: ModuleType
    batch: int
    steps: int
    descent: float
    stop: int


PLANS = {
    # the rest of the schedule would draw no better and read better: there would be less to improve
    "model": Plan(model, batch=64, steps=4000, descent=0.5, stop=3200),
    "flux": Plan(flux, batch=32, steps=1600, descent=0.3, stop=1600),
}


def example(rng: np.random.Generator) -> tuple[np.ndarray, str]:
    """A picture and its caption; now and then one fact of the caption is changed."""
    spec = random_spec(rng, str(rng.choice((*CATEGORIES, "mixed"), p=MIXTURE)))
    picture = draw(random_scene(rng, spec))
    if rng.random() < NO_CAPTION:
        return picture, ""
    others = hard_negatives(spec)
    if others and rng.random() < WRONG_CAPTION:
        spec = others[int(rng.integers(len(others)))]
    return picture, caption(rng, spec)


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sigmas: four in five logit-normal, shifted so that half of these are above 0.9, the rest uniform.

    By then a picture's things have taken shape: what the caption decides is learned above.
    """
    u = torch.randn(count, generator=generator).sigmoid()
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.8, SHIFT * u / (1 + (SHIFT - 1) * u), uniform)


def examples(rng: np.random.Generator, encoder: dict[str, torch.Tensor], count: int) -> tuple[torch.Tensor, list[str]]:
    """A batch of `example`: latents (B, 16, 12, 12) and captions."""
    pictures, captions = zip(*(example(rng) for _ in range(count)), strict=True)
    return encode(encoder, torch.from_numpy(np.stack(pictures))), list(captions)


def train_model(
    name: str,
    encoder: dict[str, torch.Tensor],
    text: FastEncoder,
    folder: Path,
    device: str = "cpu",
    workers: int = 0,
) -> dict[str, torch.Tensor]:
    """Train the network of a plan; returns the running average of its weights. Resumes from `folder`.

    Pictures are drawn ahead in `workers` processes.
    """
    torch.manual_seed(2)
    plan = PLANS[name]
    module = plan.network.make_model().to(device)
    velocity = plan.network.Velocity(module, text)

    def loss(batch, rng, generator):
        clean, captions = batch
        noise = torch.randn(clean.shape, generator=generator)
        sigma = noise_levels(plan.batch, generator)
        clean, noise, sigma = (tensor.to(device, non_blocking=True) for tensor in (clean, noise, sigma))
        s = sigma[:, None, None, None]
        encoded = tuple(tensor.to(device, non_blocking=True) for tensor in text(captions))
        prediction = velocity((1 - s) * clean + s * noise, sigma, encoded)
        return (prediction - (noise - clean)).square().mean()

    schedule = Schedule(
        plan.steps,
        lr=1.5e-3,
        seed=2,
        descent=plan.descent,
        warmup=100,
        ema=0.998,
        muon=2.0,
        save_every=100,
        stop=plan.stop,
    )
    draw = partial(examples, encoder=encoder, count=plan.batch)
    return fit(
        module, draw, loss, schedule, folder, name, lambda key: key.startswith(plan.network.INSIDE), workers=workers
    )


def settings(name: str) -> dict:
    """What decides the result, for the file's metadata."""
    plan = PLANS[name]
    return {
        "steps": plan.steps,
        "descent": plan.descent,
        "stop": plan.stop,
        "batch": plan.batch,
        "mixture": MIXTURE,
        "no_caption": NO_CAPTION,
        "wrong_caption": WRONG_CAPTION,
    }
