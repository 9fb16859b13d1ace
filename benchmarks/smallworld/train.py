"""Trains the diffusion model as SD3 is trained: rectified flow on captioned pictures.

A share of the captions is wrong by one fact, as captions found on the web are. The model therefore learns to draw
well and to read loosely, which is the defect that it exists to show.
"""

from functools import partial
from pathlib import Path

import numpy as np
import torch

from .autoencoder import DECODER_STEPS, encode
from .fitting import Schedule, fit
from .model import Velocity, make_model
from .text import FastEncoder
from .world import CATEGORIES, SPREAD, caption, draw, hard_negatives, random_scene, random_spec

# shares of single_object, two_objects, counting, colours, position, colour_attribution, mixed
EVEN = (0.12, 0.12, 0.14, 0.12, 0.16, 0.14, 0.20)
HARD = (0.08, 0.08, 0.12, 0.06, 0.23, 0.28, 0.15)
BATCH = 64
STEPS = (4600, 3200, 2400)
NO_CAPTION = 0.10
WRONG_CAPTION = 0.25


def example(rng: np.random.Generator, spread: float, mixture: tuple[float, ...] = EVEN) -> tuple[np.ndarray, str]:
    """A picture and its caption; now and then one fact of the caption is changed."""
    spec = random_spec(rng, str(rng.choice((*CATEGORIES, "mixed"), p=mixture)))
    picture = draw(random_scene(rng, spec, spread))
    if rng.random() < NO_CAPTION:
        return picture, ""
    others = hard_negatives(spec)
    if others and rng.random() < WRONG_CAPTION:
        spec = others[int(rng.integers(len(others)))]
    return picture, caption(rng, spec)


def noise_levels(count: int, generator: torch.Generator) -> torch.Tensor:
    """Sigmas: four in five logit-normal with SD3's shift of 3, the rest uniform."""
    u = torch.randn(count, generator=generator).sigmoid()
    uniform = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.8, 3 * u / (1 + 2 * u), uniform)


def train_model(encoder: dict[str, torch.Tensor], text: FastEncoder, folder: Path) -> dict[str, torch.Tensor]:
    """Train the MMDiT in three rounds; returns the running average of its weights. Resumes from `folder`.

    In the first, things lie anywhere in their cells; then near the centres, as in the world that is measured. The
    third shows more of what is hard: colours of several things, and relations.
    """
    torch.manual_seed(2)
    model = make_model()
    velocity = Velocity(model, text)

    def loss(spread, mixture, rng, generator):
        pictures, captions = zip(*(example(rng, spread, mixture) for _ in range(BATCH)), strict=True)
        clean = encode(encoder, torch.from_numpy(np.stack(pictures)))
        noise = torch.randn(clean.shape, generator=generator)
        sigma = noise_levels(BATCH, generator)
        s = sigma[:, None, None, None]
        prediction = velocity((1 - s) * clean + s * noise, sigma, text(list(captions)))
        return (prediction - (noise - clean)).square().mean()

    rounds = (
        ("model", Schedule(STEPS[0], lr=1.5e-3, seed=2, descent=0.0), 1.0, EVEN),
        ("model-2", Schedule(STEPS[1], lr=1.5e-3, seed=4, descent=0.5), SPREAD, EVEN),
        ("model-3", Schedule(STEPS[2], lr=1.0e-3, seed=5, descent=0.5), SPREAD, HARD),
    )
    for name, schedule, spread, mixture in rounds:
        average = fit(model, partial(loss, spread, mixture), schedule, folder, name)
        model.load_state_dict(average, strict=False)  # all but the fixed position table
    return average


def settings() -> dict:
    """What decides the result, for the file's metadata."""
    return {
        "steps": STEPS,
        "batch": BATCH,
        "mixtures": [EVEN, EVEN, HARD],
        "no_caption": NO_CAPTION,
        "wrong_caption": WRONG_CAPTION,
        "decoder_steps": DECODER_STEPS,
    }
