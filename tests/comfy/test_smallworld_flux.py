"""The small world's second network: a Flux behind ComfyUI's own loader."""

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
from softrepa.comfy.families import model_shape
from softrepa.smallworld import autoencoder, checkpoint
from softrepa.smallworld.text import FastEncoder
from softrepa.statistics import mean_interval

TEMPERATURE = 0.07


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


def test_it_reads_captions_better_than_chance(stock):
    held_out = tokens.HeldOut(stock, batches=12, hard=0, timesteps=(900, 950))
    mean, half, _ = mean_interval(held_out.in_batch(stock.model, TEMPERATURE).retrieved.float().mean(0))
    assert mean - half > 1 / tokens.BATCH_SIZE
