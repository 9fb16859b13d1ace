"""The small world's second network: a Flux behind ComfyUI's own loader, on which training raises held-out retrieval."""

from types import SimpleNamespace

import comfy.model_base
import comfy.sd
import comfy.sd1_clip
import numpy as np
import pytest
import torch

from benchmarks.smallworld import flux, tokens
from benchmarks.smallworld.autoencoder import random_images
from benchmarks.smallworld.measure import trained
from benchmarks.smallworld.world import caption, draw, random_scene, random_spec
from softrepa.comfy.families import model_shape
from softrepa.comfy.tokens.patching import apply_tokens
from softrepa.comfy.training.run import train
from softrepa.comfy.training.session import RunFiles
from softrepa.data.ahead import AtHand
from softrepa.data.batches import Example
from softrepa.data.dataset import Dataset
from softrepa.smallworld import autoencoder, checkpoint
from softrepa.smallworld.text import FastEncoder
from softrepa.statistics import mean_interval
from softrepa.training.inputs import TrainingInputs

PICTURES, STEPS = 64, 30
LEARNING_RATE = 2e-3
TEMPERATURE = 0.07
BATCHES, TIMESTEPS = 12, (900, 950)


@pytest.fixture(autouse=True)
def inference():
    """Training looks after its own mode."""


@pytest.fixture(scope="module")
def fast():
    return FastEncoder(comfy.sd1_clip.SDTokenizer())


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    path = flux.write_checkpoint(tmp_path_factory.mktemp("flux") / flux.CHECKPOINT_NAME)
    model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(str(path))
    assert clip is None
    return SimpleNamespace(model=model, vae=vae)


@pytest.fixture(scope="module")
def held_out(stock):
    return tokens.HeldOut(stock, BATCHES, hard=0, timesteps=TIMESTEPS)


class Drawn(AtHand):
    """Pictures of the world with their captions, encoded when they are asked for."""

    identity = "drawn"

    def __init__(self, stock, fast, count: int, seed: int):
        self.fast, rng = fast, np.random.default_rng(seed)
        specs = [random_spec(rng, tokens.CATEGORIES[i % len(tokens.CATEGORIES)]) for i in range(count)]
        pictures = torch.from_numpy(np.stack([draw(random_scene(rng, spec)) for spec in specs]))
        with torch.inference_mode():
            self.latents = stock.vae.encode(pictures).clone()
        self.examples = [Example(str(i), str(i), (caption(rng, spec),), (96, 96)) for i, spec in enumerate(specs)]

    @property
    def empty(self) -> dict:
        return self.cond("")

    def latent(self, example: Example) -> torch.Tensor:
        return self.latents[int(example.name)]

    def cond(self, caption: str) -> dict:
        context, pooled = self.fast.as_comfyui(caption)
        return {"cross_attn": context, "pooled_output": pooled}

    def prepare(self, captions: list[str]) -> str:
        return ""


def learned(stock, fast, folder, learning_rate, steps=STEPS):
    """The MODEL with tokens of a run on drawn pictures."""
    drawn = Drawn(stock, fast, PICTURES, seed=5)
    inputs = TrainingInputs(
        steps=steps,
        batch_size=tokens.BATCH_SIZE,
        learning_rate=learning_rate,
        seed=0,
        temperature=TEMPERATURE,
        micro_batch=16,
        checkpointing=False,
    )
    folder.mkdir()
    files = RunFiles(folder / "tokens.safetensors", folder / "state")
    found = train(stock.model, Dataset("drawn", drawn.examples, [], drawn, []), inputs, [files])
    return apply_tokens(stock.model, found.tokens)


def test_stock_loader_sees_a_flux(stock):
    assert type(stock.model.model) is comfy.model_base.Flux
    assert stock.model.model.model_type is comfy.model_base.ModelType.FLUX
    shape = model_shape(stock.model)
    assert (shape.family.name, shape.layers, shape.width) == ("flux", flux.DOUBLE + flux.SINGLE, flux.WIDTH)


def test_training_runs_the_model_that_comfyui_runs(stock, fast):
    noisy = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    velocity, core = trained("flux", fast), stock.model.model.diffusion_model.float()
    with torch.no_grad():
        for text in ("", "a red circle", "a blue square left of a red circle"):
            ours = velocity(noisy, torch.tensor([0.7]), fast([text]))
            context, pooled = fast.as_comfyui(text)
            theirs = core(noisy, torch.tensor([0.7]), context, pooled, guidance=torch.tensor([3.5]))
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_its_latents_are_those_of_the_first_model(stock):
    images = torch.from_numpy(random_images(np.random.default_rng(3), 4))
    latents = stock.vae.encode(images)
    ours = autoencoder.encode(checkpoint.read_shipped()["encoder"], images)
    assert (stock.model.model.process_latent_in(latents) - ours).abs().max() < 1e-3
    assert (stock.vae.decode(latents) - images).abs().mean() < 0.02


def test_it_reads_captions_better_than_chance(stock, held_out):
    mean, half, _ = mean_interval(held_out.in_batch(stock.model, TEMPERATURE).retrieved.float().mean(0))
    assert mean - half > 1 / tokens.BATCH_SIZE


def test_training_aligns_tokens_on_pictures_that_it_never_saw(stock, fast, held_out, tmp_path):
    """Beside the tokens that the same run starts from, on the same noise."""
    start = held_out.in_batch(learned(stock, fast, tmp_path / "start", 0.0, steps=1), TEMPERATURE)
    after = held_out.in_batch(learned(stock, fast, tmp_path / "end", LEARNING_RATE), TEMPERATURE)
    mean, half, _ = mean_interval(after.losses.mean(0) - start.losses.mean(0))
    assert mean + half < 0, (mean, half, start.accuracy, after.accuracy)
