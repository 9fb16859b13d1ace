"""What training is for: tokens from a folder of pictures, made on a real server, align better on held-out pictures."""

import pytest
import torch

from benchmarks.smallworld import tokens
from benchmarks.smallworld.measure import StockModel
from softrepa.comfy.tokens.patching import apply_tokens
from softrepa.token_files import load
from tools.server import ComfyServer

SEEDS, STEPS, PICTURES = 5, 75, 64
LEARNING_RATE = 2e-3
TEMPERATURE = 0.07
BATCHES, TIMESTEPS = 16, (900, 950)  # the study measures 24 at three


@pytest.fixture(autouse=True)
def inference():
    """The server trains; what is measured here looks after its own mode."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Files of tokens by seed, one with learning rate 0, and the folder with the checkpoint."""
    work = tmp_path_factory.mktemp("smallworld")
    tokens.prepare(work, PICTURES)
    options = {"steps": STEPS, "temperature": TEMPERATURE, "micro_batch": 16, "checkpointing": False}  # fast on a CPU
    with ComfyServer(work) as server:
        files = [tokens.train(server, seed, learning_rate=LEARNING_RATE, **options) for seed in range(SEEDS)]
        still = tokens.train(server, 0, learning_rate=0.0, **options | {"steps": 2})
    return files, still, work / "models" / "checkpoints"


@pytest.fixture(scope="module")
def stock(trained):
    return StockModel(trained[2])


@pytest.fixture(scope="module")
def alignment(trained, stock):
    """Of the plain model and of each seed's tokens; and the loss of tokens as they start."""
    files, still, _ = trained
    held_out = tokens.HeldOut(stock, BATCHES, timesteps=TIMESTEPS)

    with_tokens = [apply_tokens(stock.model, load(file)) for file in files]
    after = [held_out.measure(model, TEMPERATURE) for model in with_tokens]
    unlearned = held_out.in_batch(apply_tokens(stock.model, load(still)), TEMPERATURE)
    return held_out.measure(stock.model, TEMPERATURE), after, unlearned.loss


def changes(before, after) -> dict:
    return {
        name: tokens.change(getattr(before, name), [getattr(one, name) for one in after])
        for name in ("loss", "retrieval", "hard_retrieval")
    }


def improves(found: dict) -> bool:
    """The loss falls, and a retrieval rises, each beyond both 95% intervals."""
    rises = [
        found[name].beyond() and found[name].after > found[name].before for name in ("retrieval", "hard_retrieval")
    ]
    return found["loss"].beyond() and found["loss"].after < found["loss"].before and any(rises)


def test_held_out_alignment_improves(alignment):
    before, after, _ = alignment
    assert improves(changes(before, after)), changes(before, after)


def test_without_learning_it_does_not(alignment):
    before, _, unlearned = alignment
    assert unlearned > before.loss.mean()


def test_the_tokens_sample(trained, stock, monkeypatch):
    files, *_ = trained
    plain = stock.pictures("a red circle and a blue square", 1, seed=0)
    monkeypatch.setattr(stock, "model", apply_tokens(stock.model, load(files[0])))
    steered = stock.pictures("a red circle and a blue square", 1, seed=0)
    assert torch.isfinite(torch.from_numpy(steered)).all()
    assert abs(steered - plain).max() > 1e-3
