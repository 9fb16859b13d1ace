"""The small world's shipped model behind ComfyUI's stock nodes."""

import comfy.model_base
import comfy.sd1_clip
import numpy as np
import pytest
import torch

from benchmarks.smallworld import checker
from benchmarks.smallworld.autoencoder import random_images
from benchmarks.smallworld.measure import StockModel
from benchmarks.smallworld.model import Velocity, make_model
from softrepa.smallworld import autoencoder, checkpoint, world
from softrepa.smallworld.text import FastEncoder
from softrepa.smallworld.world import Group, Spec

CAPTIONS = (
    "",
    "a red circle",
    "a blue square left of a red circle",
    "a red square left of a blue circle",
    "an image of a purple triangle, a black diamond and a green cross",
)


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    with torch.inference_mode():
        return StockModel(tmp_path_factory.mktemp("smallworld"))


@pytest.fixture(scope="module")
def fast():
    return FastEncoder(comfy.sd1_clip.SDTokenizer())


def test_stock_loader_sees_an_sd3(stock):
    assert type(stock.model.model) is comfy.model_base.SD3
    assert len(stock.model.model.diffusion_model.joint_blocks) == 3


def test_fast_encodings_are_those_of_the_text_encoder(stock, fast):
    context, pooled = fast(list(CAPTIONS))
    for row, caption in enumerate(CAPTIONS):
        ((full, extra),) = stock.encode(caption)
        assert full.shape == (1, 77, 4096)
        assert torch.allclose(full[0, :19, :768], context[row])
        assert torch.allclose(full[0, 19:, :768], context[row, 18].expand(58, 768))
        assert full[..., 768:].abs().max() == 0
        assert torch.allclose(extra["pooled_output"][0, :768], pooled[row], atol=1e-5)
        mine = fast.as_comfyui(caption)
        assert mine[1].shape == extra["pooled_output"].shape
        assert torch.allclose(mine[0], full, atol=1e-6)
        assert torch.allclose(mine[1], extra["pooled_output"], atol=1e-5)


def test_training_runs_the_model_that_comfyui_runs(stock, fast):
    model = make_model()
    model.load_state_dict(checkpoint.read_shipped()["model"], strict=False)
    noisy = torch.randn(1, 16, 12, 12, generator=torch.Generator().manual_seed(0))
    for caption in CAPTIONS:
        ((context, extra),) = stock.encode(caption)
        ours = Velocity(model, fast)(noisy, torch.tensor([0.7]), fast([caption]))
        core = stock.model.model.diffusion_model.float()
        theirs = core(noisy, torch.tensor([700.0]), context=context, y=extra["pooled_output"])
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_autoencoder_is_the_linear_map_and_its_decoder(stock):
    images = torch.from_numpy(random_images(np.random.default_rng(3), 8))
    latents = stock.vae.encode(images)
    ours = autoencoder.encode(checkpoint.read_shipped()["encoder"], images)
    assert ((latents - autoencoder.SHIFT) * autoencoder.SCALE - ours).abs().max() < 1e-3
    assert (stock.vae.decode(latents) - images).abs().mean() < 0.02


def test_drawn_things_survive_the_autoencoder(stock):
    rng = np.random.default_rng(4)
    specs = [world.random_spec(rng, category) for category in world.CATEGORIES for _ in range(5)]
    images = torch.from_numpy(np.stack([world.draw(world.random_scene(rng, spec)) for spec in specs]))
    back = stock.vae.decode(stock.vae.encode(images)).numpy()
    assert np.mean([checker.correct(image, spec) for image, spec in zip(back, specs, strict=True)]) >= 0.9


def test_draws_single_objects(stock):
    right = []
    for colour, shape in (("red", "circle"), ("blue", "square"), ("green", "triangle"), ("black", "cross")):
        images = stock.pictures(f"a {colour} {shape}", 4, seed=1)
        assert images.shape == (4, 96, 96, 3)
        right += [checker.correct(image, Spec((Group(shape, colour=colour),))) for image in images]
    assert np.mean(right) >= 0.75
