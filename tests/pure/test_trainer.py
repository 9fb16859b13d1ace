"""The training loop on a toy model: schedule, determinism, running average, refusals."""

import math

import pytest
import torch
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.families import FAMILIES
from comfyui_softrepa.softrepa.training import optimizers
from comfyui_softrepa.softrepa.training.config import TrainingConfig
from comfyui_softrepa.softrepa.training.trainer import DivergedError, new_tokens
from softrepa_tests.toy_training import batches, trainer


def test_it_learns():
    run = trainer(learning_rate=0.02, denoising_weight=1.0)
    losses = [run.step(1).loss for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


@pytest.mark.parametrize("name", optimizers.PACKAGES)
def test_every_optimizer_learns(name):
    rate = {"Prodigy": 0.1, "SGD": 0.3, "Lion": 0.005}.get(name, 0.02)
    run = trainer(learning_rate=rate, denoising_weight=1.0, optimizer=name)
    losses = [run.step(1).loss for _ in range(60)]
    assert sum(losses[-10:]) < sum(losses[:10])


def test_optimizers_that_are_not_there(monkeypatch):
    with pytest.raises(SoftREPAError, match='optimizer is "Adagrad", expected one of AdamW, Adam, SGD, RMSprop'):
        TrainingConfig(steps=1, optimizer="Adagrad")
    monkeypatch.setitem(optimizers.PACKAGES, "Lion", "no_such_package")
    assert "Lion" not in optimizers.available()
    with pytest.raises(SoftREPAError, match="expected its package no_such_package to be installed"):
        TrainingConfig(steps=1, optimizer="Lion")


def test_learning_rate_is_that_of_the_reference():
    config = TrainingConfig(steps=1)
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, T_0=10, eta_min=1e-5)
    for step in range(12_000):
        assert math.isclose(config.learning_rate_at(step), optimizer.param_groups[0]["lr"], rel_tol=1e-9)
        optimizer.step()
        if (step + 1) % 500 == 0:
            schedule.step()


def test_warm_up():
    config = TrainingConfig(steps=1, warmup_steps=4)
    assert [config.learning_rate_at(step) / 1e-3 for step in range(5)] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_one_seed_one_result():
    first, second, other = trainer(), trainer(), trainer()
    other.generator.manual_seed(1)
    for run in (first, second, other):
        for _ in range(5):
            run.step(1)
    assert first.pairs.seen == second.pairs.seen
    assert torch.equal(first.tokens.tokens, second.tokens.tokens)
    assert torch.equal(first.tokens.time_table, second.tokens.time_table)
    assert not torch.equal(first.tokens.tokens, other.tokens.tokens)


def test_nothing_learned_at_rate_zero():
    run = trainer(learning_rate=0.0)
    before = run.tokens.tokens.detach().clone()
    for _ in range(3):
        run.step(1)
    assert torch.equal(run.tokens.tokens, before)


def test_accumulation_averages_batches():
    run = trainer(accumulation=3)
    run.step(1)
    assert len(run.pairs.seen) == 3


def test_gradient_clip_limits_the_update():
    free, clipped = trainer(denoising_weight=100.0), trainer(denoising_weight=100.0, gradient_clip=1e-3)
    record = clipped.step(1)
    assert record.gradient_norm == pytest.approx(free.step(1).gradient_norm)
    assert record.gradient_norm > 1e-3
    moments = clipped.optimizer.state[clipped.tokens.tokens]["exp_avg"].norm() / 0.1
    assert moments <= 1e-3


def test_caption_dropout_leaves_out_one_caption_at_most():
    run = trainer(caption_dropout=0.5)
    for _ in range(40):
        run.step(1)
    dropped = [names.count("") for _, _, names in run.pairs.seen]
    assert set(dropped) == {0, 1}


def test_running_average():
    run = trainer(ema_decay=0.9, learning_rate=0.05, denoising_weight=1.0)
    for _ in range(30):
        run.step(1)
    averaged = run.finished("x", {})
    assert not torch.equal(averaged.tokens, run.tokens.tokens)
    distance = (averaged.tokens - run.tokens.tokens).norm() / run.tokens.tokens.norm()
    assert distance < 1


@pytest.mark.parametrize("ema_decay", [0.9, 0.15])
def test_the_running_average_soon_forgets_the_start(ema_decay):
    """Its decay rises as 1/10, 2/11, 3/12, ... to the one that was asked for."""
    run = trainer(ema_decay=ema_decay, learning_rate=0.05, denoising_weight=1.0)
    expected = run.tokens.tokens.detach().clone()
    for step in range(4):
        run.step(1)
        decay = min(ema_decay, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * run.tokens.tokens.detach()
        assert torch.allclose(run.finished("x", {}).tokens, expected, atol=1e-6)


def test_a_loss_that_is_no_number_stops_the_run():
    run = trainer()
    run.next_batch = lambda size: (torch.full((size, 2, 2, 2), torch.nan), *batches()(size)[1:])
    with pytest.raises(SoftREPAError, match="The loss is nan at step 1, expected a number"):
        run.step(1)


def test_a_gradient_that_is_no_number_leaves_no_trace():
    run, untouched = trainer(), trainer()
    run.step(1), untouched.step(1)
    gradients = run.pairs.gradients

    def poisoned(*args):
        errors, found = gradients(*args)
        found[0].fill_(torch.inf)
        return errors, found

    run.pairs.gradients = poisoned
    with pytest.raises(DivergedError, match="The gradient is .* at step 2, expected a number"):
        run.step(1)
    run.pairs.gradients = gradients
    run.next_batch, untouched.next_batch = batches(1), batches(1)
    assert run.step(1) == untouched.step(1)
    assert torch.equal(run.tokens.tokens, untouched.tokens.tokens)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"batch_size": 1}, "batch_size is 1, expected 2 or more"),
        ({"temperature": 0.0}, "temperature is 0.0, expected more than 0"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
        ({"minimum_learning_rate": math.nan}, "minimum_learning_rate is nan"),
        ({"schedule_steps": 0}, "schedule_steps is 0, expected 1 or more"),
        ({"restart_after": 0}, "restart_after is 0, expected 1 or more"),
        ({"objective": "agsm", "denoising_weight": 0.0}, "denoising_weight is 0.0, expected its default with"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, expected 0 to below 1"),
    ],
)
def test_refused_configurations(option, message):
    with pytest.raises(SoftREPAError, match=message):
        TrainingConfig(**({"steps": 1} | option))


def test_new_tokens():
    bos = torch.randn(768)
    sd15 = new_tokens(FAMILIES["sd15"], 768, 4, ("down",), True, 0, bos)
    assert torch.equal(sd15.tokens, bos.expand(4, 768))
    assert sd15.time_table.std() == pytest.approx(0.02, rel=0.05)
    sd3 = new_tokens(FAMILIES["sd3"], 64, 4, 5, True, 0, None)
    assert sd3.tokens.shape == (5, 4, 64)
    assert sd3.time_table.shape == (100, 320)
    assert sd3.tokens.std() == pytest.approx(0.02, rel=0.1)


def test_the_start_and_the_draws_are_two_streams():
    """Otherwise the first noise of a run would be its first tokens, 50 times as large."""
    tokens = new_tokens(FAMILIES["sd3"], 64, 4, 5, False, 7, None).tokens
    noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(7))
    assert abs(torch.corrcoef(torch.stack([tokens.flatten(), noise.flatten()]))[0, 1]) < 0.1
    assert torch.equal(new_tokens(FAMILIES["sd3"], 64, 4, 5, False, 7, None).tokens, tokens)
