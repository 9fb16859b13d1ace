"""What training is for: tokens from a folder of pictures, made on a real server, align better on held-out pictures."""

import os

import pytest
import torch

from benchmarks.server import ComfyServer
from benchmarks.smallworld import tokens
from benchmarks.smallworld.measure import StockModel
from softrepa.checkpoint import load
from softrepa.comfy.patching import apply_tokens

SEEDS, STEPS, PICTURES = 5, 150, 240
TEMPERATURE = 0.07


@pytest.fixture(autouse=True)
def inference():
    """The server trains; what is measured here looks after its own mode."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Files of tokens by seed, one trained with learning rate 0, and the folder with the checkpoint."""
    work = tmp_path_factory.mktemp("smallworld")
    tokens.prepare(work, PICTURES)
    options = {"steps": STEPS, "temperature": TEMPERATURE, "micro_batch": 16, "checkpointing": False}  # fast on a CPU
    with ComfyServer(work) as server:
        files = [tokens.train(server, seed, **options) for seed in range(SEEDS)]
        still = [tokens.train(server, seed, learning_rate=0.0, **options | {"steps": 2}) for seed in range(SEEDS)]
    return files, still, work / "models" / "checkpoints"


@pytest.fixture(scope="module")
def alignment(trained):
    """Of the plain model, of each seed's tokens, and of each seed's tokens without training."""
    files, still, checkpoints = trained
    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count() or 1)  # the server has ended: nobody else computes
    stock = StockModel(checkpoints)
    held_out = tokens.HeldOut(stock)

    def measured(file):
        return held_out.measure(apply_tokens(stock.model, load(file)), TEMPERATURE)

    yield held_out.measure(stock.model, TEMPERATURE), [measured(f) for f in files], [measured(f) for f in still]
    torch.set_num_threads(threads)


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
    before, _, still = alignment
    assert not improves(changes(before, still))


def test_the_tokens_sample(trained):
    files, _, checkpoints = trained
    stock = StockModel(checkpoints)
    plain = stock.pictures("a red circle and a blue square", 1, seed=0)
    stock.model = apply_tokens(stock.model, load(files[0]))
    steered = stock.pictures("a red circle and a blue square", 1, seed=0)
    assert torch.isfinite(torch.from_numpy(steered)).all()
    assert abs(steered - plain).max() > 1e-3
