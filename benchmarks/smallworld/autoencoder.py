"""What the autoencoder learns: the encoder's components, and a decoder that minds noisy latents.

It is trained on them so that a latent that is slightly off still decodes to a clean picture.
"""

from collections import OrderedDict
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from softrepa.smallworld.autoencoder import (
    CHANNELS,
    IDENTITY_BLOCKS,
    OUTLINE,
    PATCH,
    SCALE,
    VAE_SCALE,
    encode,
    mask,
    patches,
)
from softrepa.smallworld.world import CATEGORIES, IMAGE_SIZE, SPREAD, draw, random_scene, random_spec

from .fitting import Schedule, fit

LATENT_SIZE = IMAGE_SIZE // PATCH
NOISE = 0.25  # greatest standard deviation of the noise that the decoder learns to remove
DECODER_STEPS = (2400, 1600, 1600)


def random_images(rng: np.random.Generator, count: int, spread: float = 1.0) -> np.ndarray:
    """Drawn scenes of every category, float32 (count, 96, 96, 3); `spread` is how far things lie from cell centres."""
    specs = (random_spec(rng, (*CATEGORIES, "mixed")[int(rng.integers(7))]) for _ in range(count))
    return np.stack([draw(random_scene(rng, spec, spread)) for spec in specs])


def fit_encoder(seed: int = 0, count: int = 1500) -> dict[str, torch.Tensor]:
    """`outline` (13, 64): what the first latent channels read of a patch of the mask.

    Each component's spread is the root of what PCA gives it: high frequencies stay fainter than low ones, as in
    trained autoencoders, but are not drowned. Over patches with something in them the mean variance is 1.
    """
    planes = patches(mask(torch.from_numpy(random_images(np.random.default_rng(seed), count)))).flatten(0, 2).double()
    planes = planes[planes.amax(1) > 0]
    variance, basis = torch.linalg.eigh(planes.T @ planes / len(planes))
    variance, basis = variance.flip(0)[:OUTLINE], basis.flip(1)[:, :OUTLINE]
    basis = basis * torch.where(basis.sum(0) < 0, -1.0, 1.0)  # eigenvectors have no sign of their own
    gain = variance**-0.25
    return {"outline": (basis * gain / (gain.square() * variance).mean().sqrt()).T.float().contiguous()}


def decoder_input(latents: torch.Tensor) -> torch.Tensor:
    """Latents in the model's scale -> what TAESD's decoder receives."""
    return latents * (VAE_SCALE / SCALE)


def make_decoder() -> torch.nn.Sequential:
    """TAESD's decoder without its identity blocks; indices as in the full one."""
    import comfy.taesd.taesd

    full = comfy.taesd.taesd.Decoder(latent_channels=CHANNELS)
    for module in full.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
    for index in (3, 4, 5, 8, 9, 10, 13, 18):
        torch.nn.init.zeros_(full[index].conv[4].weight)
    kept = ((str(i), module) for i, module in enumerate(full) if i not in IDENTITY_BLOCKS)
    return torch.nn.Sequential(OrderedDict(kept))


def train_decoder(encoder: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    """Train the decoder on 48 px windows in three rounds; returns its weights. Resumes from `folder`.

    The second round starts the learning rate again and minds outlines: pixels away from things weigh a fifth. In the
    third, things lie where the world has them.
    """
    torch.manual_seed(1)
    decoder = make_decoder()
    window = 6

    def windows_of(images, rng, generator):
        images = torch.from_numpy(images)
        latents = encode(encoder, images)
        levels = torch.rand(len(latents), 1, 1, 1, generator=generator) * NOISE
        noisy = latents + levels * torch.randn(latents.shape, generator=generator)
        windows, targets = [], []
        for picture, latent in zip(images, noisy, strict=True):
            # the fullest of three windows: most of the world is plain background
            places = rng.integers(0, LATENT_SIZE - window + 1, (3, 2))
            y, x = max(places, key=lambda at: latent[0, at[0] : at[0] + window, at[1] : at[1] + window].sum())
            windows.append(latent[:, y : y + window, x : x + window])
            rows, columns = (slice(start * PATCH, (start + window) * PATCH) for start in (y, x))
            targets.append(picture[rows, columns])
        return torch.stack(windows), torch.stack(targets)

    def first(images, rng, generator):
        windows, targets = windows_of(images, rng, generator)
        return F.l1_loss(decoder(decoder_input(windows)), targets.movedim(-1, 1))

    def outlines(images, rng, generator):
        windows, targets = windows_of(images, rng, generator)
        near = F.max_pool2d(mask(targets)[:, None], 9, stride=1, padding=4)
        return ((decoder(decoder_input(windows)) - targets.movedim(-1, 1)).abs() * (0.2 + 0.8 * near)).mean()

    rounds = (("decoder", first, 1.0, 1), ("decoder-2", outlines, 1.0, 3), ("decoder-3", outlines, SPREAD, 6))
    for (name, loss, spread, seed), steps in zip(rounds, DECODER_STEPS, strict=True):
        draw = partial(random_images, count=8, spread=spread)
        schedule = Schedule(steps, lr=1e-3, seed=seed, warmup=50, ema=0.99)
        decoder.load_state_dict(fit(decoder, draw, loss, schedule, folder, name))
    return decoder.state_dict()
