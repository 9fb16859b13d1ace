"""Trains the diffusion model as SD3 is trained: rectified flow on captioned pictures.

A share of the captions is wrong by one fact, as captions found on the web are. The model therefore learns to draw
well and to read loosely, which is the defect that it exists to show.
"""

from pathlib import Path

import numpy as np
import torch

from softrepa.smallworld.autoencoder import encode
from softrepa.smallworld.text import FastEncoder
from softrepa.smallworld.world import CATEGORIES, caption, draw, hard_negatives, random_scene, random_spec

from .autoencoder import DECODER_STEPS
from .fitting import Schedule, fit
from .model import Velocity, make_model

# shares of single_object, two_objects, counting, colours, position, colour_attribution, mixed
MIXTURE = (0.12, 0.12, 0.14, 0.12, 0.16, 0.14, 0.20)
BATCH = 64
STEPS = 4000
STOP = 3200  # the rest of the schedule would draw no better and read better: there would be less to improve
NO_CAPTION = 0.10
WRONG_CAPTION = 0.10
SHIFT = 9.0


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


def train_model(encoder: dict[str, torch.Tensor], text: FastEncoder, folder: Path) -> dict[str, torch.Tensor]:
    """Train the MMDiT; returns the running average of its weights. Resumes from `folder`."""
    torch.manual_seed(2)
    model = make_model()
    velocity = Velocity(model, text)

    def loss(rng, generator):
        pictures, captions = zip(*(example(rng) for _ in range(BATCH)), strict=True)
        clean = encode(encoder, torch.from_numpy(np.stack(pictures)))
        noise = torch.randn(clean.shape, generator=generator)
        sigma = noise_levels(BATCH, generator)
        s = sigma[:, None, None, None]
        prediction = velocity((1 - s) * clean + s * noise, sigma, text(list(captions)))
        return (prediction - (noise - clean)).square().mean()

    schedule = Schedule(STEPS, lr=1.5e-3, seed=2, descent=0.5, warmup=100, ema=0.998, muon=2.0, stop=STOP)
    inside = ("joint_blocks", "context_embedder", "y_embedder")
    return fit(model, loss, schedule, folder, "model", lambda name: name.startswith(inside))


def settings() -> dict:
    """What decides the result, for the file's metadata."""
    return {
        "steps": STEPS,
        "stop": STOP,
        "batch": BATCH,
        "mixture": MIXTURE,
        "no_caption": NO_CAPTION,
        "wrong_caption": WRONG_CAPTION,
        "decoder_steps": DECODER_STEPS,
    }
