"""Several processes train what one trains; what ends one of them ends all."""

import os
import signal
import sys
import time

import pytest
import torch
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training import ranks as module
from comfyui_softrepa.softrepa.training import state as training_state
from comfyui_softrepa.softrepa.training.loss import comparison
from comfyui_softrepa.softrepa.training.ranks import ALONE, EndedError, Ranks
from softrepa_tests.processes import together
from softrepa_tests.toy_training import trainer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no fork on Windows")

STEPS = 50
WAYS = {
    "paper": {"batch_size": 4, "denoising_weight": 0.5},
    "relative": {"batch_size": 3, "temperature_mode": "relative", "symmetric": True},
    "denoising": {"batch_size": 5, "objective": "denoising", "temperature": 0.07, "optimizer": "SGD"},
    "accumulation": {
        "batch_size": 3,
        "accumulation": 3,
        "ema_decay": 0.9,
        "gradient_clip": 0.1,
        "caption_dropout": 0.5,
    },
    "guidance": {"batch_size": 5, "objective": "guidance", "temperature": 0.07, "optimizer": "SGD"},
    "guided": {"batch_size": 4, "objective": "guided contrast", "guidance_scale": 2.5, "contrast": "ranking"},
    "paper and guidance": {"batch_size": 4, "guidance_weight": 0.5, "guidance_scale": 2.0, "denoising_weight": 0.5},
    "AGSM": {"batch_size": 3, "objective": "agsm", "temperature": 0.07, "teacher_decay": 0.9},
}


def run(ranks, settings, steps=STEPS, double=True, at_step=lambda ranks, step: None, state=None):
    """Tokens, records and the state behind them, as the first process has them."""
    one = trainer(**settings)
    one.ranks = ranks
    if double:
        one.tokens.double()
        if one.teacher is not None:
            one.teacher.double()
        one.average = {key: value.double() for key, value in one.average.items()}
    if state is not None:
        training_state.restore(one, state)
        for _ in range(state.step):  # where the toy's batches stand
            one.next_batch(settings["batch_size"])
    records = []
    while one.step_index < steps:
        at_step(ranks, one.step_index)
        records.append(one.step(1))
    one.give_out()
    names = {"tokens": one.tokens.named_parameters(), "average": one.average.items() if one.config.ema_decay else ()}
    found = {f"{part}/{key}": value.detach().clone() for part, items in names.items() for key, value in items}
    return found, records, training_state.capture(one, records, [], {}, {}) if ranks.is_first else None


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("name", WAYS)
def test_any_number_of_processes_learns_the_same(name, count):
    expected, records, _ = run(ALONE, WAYS[name])
    for found, seen, _ in together(count, run, WAYS[name]) if count > 1 else [run(Ranks(), WAYS[name])]:
        assert seen[0].matching_error == records[0].matching_error  # bit for bit
        for one, other in zip(seen, records, strict=True):
            assert one.timestep == other.timestep
            assert one.loss == pytest.approx(other.loss, rel=1e-6)
            assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-6)
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-6 * value.abs().max(), key


def test_a_run_goes_on_with_another_number_of_processes():
    settings = WAYS["paper"]
    whole, _, _ = run(ALONE, settings)
    _, _, half = together(3, run, settings, 20)[0]
    assert half.step == 20
    rest, _, _ = together(2, run, settings, STEPS, True, nothing, half)[1]
    for key, value in whole.items():
        assert (rest[key] - value).abs().max() <= 1e-6 * value.abs().max()


def nothing(ranks, step):
    pass


def test_only_the_first_process_updates_and_the_others_have_its_tokens():
    def other_start(ranks):
        settings = WAYS["paper"] | {"seed": ranks.index}  # of which the draws and the first tokens come
        return run(ranks, settings, 5)[0]

    first, second = together(2, other_start)
    expected = run(ALONE, WAYS["paper"] | {"seed": 0}, 5)[0]
    for key, value in expected.items():
        assert torch.equal(first[key], second[key])
        assert torch.allclose(first[key], value, rtol=1e-6)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7, 30])
def test_shares_are_even_and_whole(count):
    compared = comparison([2, 0, 1, 3])
    several = [Ranks() for _ in range(count)]
    for index, one in enumerate(several):
        one.index, one.count = index, count
    for shares, unit in (
        ([one.pairs(compared) for one in several], lambda mask: int(mask.sum())),
        ([one.images(compared) for one in several], lambda mask: int(mask.any(dim=1).sum())),
    ):
        assert torch.equal(torch.stack(shares).sum(dim=0), compared.long())
        sizes = [unit(mask) for mask in shares]
        assert max(sizes) - min(sizes) <= 1
    assert all(((mask == compared).all(dim=1) | ~mask.any(dim=1)).all() for mask in shares)


@pytest.mark.parametrize(
    ("name", "shares"),
    [("paper", [5, 5, 6]), ("guidance", [1, 2, 2]), ("guided", [4, 4, 8]), ("paper and guidance", [6, 6, 8])],
)
def test_no_pair_is_computed_twice(name, shares):
    def computed(ranks):
        one = trainer(**WAYS[name])
        one.ranks, counts, gradients = ranks, [], one.pairs.gradients

        def counted(rows, batch, micro_batch):
            counts.append(batch.pairs)
            return gradients(rows, batch, micro_batch)

        one.pairs.gradients = counted
        one.step(1)
        return sum(counts)

    assert sorted(together(3, computed)) == shares


ERRORS = {
    "refusal": (SoftREPAError("dataset: it is gone."), "Process 2 of 3 has stopped: dataset: it is gone."),
    "fault": (ZeroDivisionError("by zero"), "Process 2 of 3 has stopped: ZeroDivisionError: by zero"),
    "interrupt": (KeyboardInterrupt(), ""),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_ends_one_process_ends_all(name):
    error, said = ERRORS[name]

    def fails(ranks, step):
        if step == 3 and ranks.index == 1:
            raise error

    started = time.monotonic()
    found = together(3, run, WAYS["paper"], STEPS, True, fails)
    assert time.monotonic() - started < 60
    first, failed, last = found
    # a refusal is said by the first of a machine alone
    assert type(failed) is (SystemExit if name == "refusal" else type(error))
    if said:
        assert type(first) is EndedError
        assert str(first) == said
        assert type(last) is SystemExit
    else:
        assert type(first) is type(last) is KeyboardInterrupt


def test_what_all_of_them_find_is_said_once():
    found = together(2, run, WAYS["paper"] | {"learning_rate": 1e30, "optimizer": "SGD"})
    assert "is nan" in str(found[0]) or "is inf" in str(found[0])
    assert "Process" not in str(found[0])
    assert type(found[1]) is SystemExit


def test_an_error_behind_the_last_step_is_one_of_all():
    def work(ranks):
        run(ranks, WAYS["paper"], 2)
        if ranks.is_first:
            raise SoftREPAError("tokens could not be written.")

    first, second = together(2, work)
    assert str(first) == "tokens could not be written."
    assert type(second) is SystemExit


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_is_noticed(killed):
    def dies(ranks, step):
        if step == 3 and ranks.index == killed:
            os.kill(os.getpid(), signal.SIGKILL)

    found = together(3, run, WAYS["paper"], STEPS, True, dies)
    assert found[killed] is None
    survivors = [one for index, one in enumerate(found) if index != killed]
    assert all(type(one) in (EndedError, SystemExit) for one in survivors)
    if killed:
        assert "has lost another one, expected all of them to run to the end" in str(found[0])


def test_a_broken_step_leaves_no_trace_on_the_first_process():
    """What is saved then is the last finished step."""

    def work(ranks):
        one = trainer(**WAYS["paper"])
        one.ranks = ranks
        one.step(1)
        before = training_state.capture(one, [], [], {}, {}).tensors
        if not ranks.is_first:
            raise SoftREPAError("enough.")
        with pytest.raises(EndedError):
            one.step(1)
        after = training_state.capture(one, [], [], {}, {})
        return after.step, all(torch.equal(before[key], value) for key, value in after.tensors.items())

    first, second = together(2, work)
    assert type(first) is EndedError or first == (1, True)
    assert type(second) is SystemExit


def test_told_and_met():
    def work(ranks):
        ranks.meet()
        return ranks.told({"position": {"seed": ranks.index}, "loss": float("nan"), "name": "ä\n"})

    for found in together(3, work):
        assert found.pop("loss") != 0
        assert found == {"position": {"seed": 0}, "name": "ä\n"}


def test_who_shares_a_folder(tmp_path):
    def work(ranks):
        own = tmp_path / str(ranks.index)
        own.mkdir()
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # three machines
        found = ranks.around(tmp_path / "shared"), ranks.around(own)
        os.environ["LOCAL_RANK"] = str(ranks.index)
        return found

    assert together(3, work) == [((index, 3), (0, 1)) for index in range(3)]
    assert list((tmp_path / "shared").iterdir()) == []
    assert ALONE.around(tmp_path) == (0, 1)


def test_without_torchrun_there_is_one(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with module.joined() as ranks:
        assert ranks is ALONE
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SoftREPAError, match="WORLD_SIZE is set, but RANK"), module.joined():
        pass
