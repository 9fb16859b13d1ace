"""The numbers that a run sends to whoever draws them."""

import json
import math
from types import SimpleNamespace

import pytest
from comfyui_softrepa.nodes import training as training_node
from comfyui_softrepa.softrepa.comfy.training.live import MOST_POINTS, Curve, Live
from comfyui_softrepa.softrepa.comfy.training.session import Session
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training.config import TrainingConfig
from comfyui_softrepa.softrepa.training.trainer import StepRecord
from softrepa_tests.learning import dataset, train


def records(losses, accuracy: float = 0.5) -> list[StepRecord]:
    return [StepRecord(index + 1, 500, loss, accuracy, 1.0, 1.0) for index, loss in enumerate(losses)]


@pytest.fixture
def sent(monkeypatch) -> list[dict]:
    messages = []
    monkeypatch.setattr(training_node, "tell_node", lambda node, data: messages.append(data))
    return messages


def test_a_run_sends_its_start_and_its_end(models, token_folder, sent):
    data = dataset("sd3")
    data.validation = dataset("sd3", 9).train[6:]
    _, losses, _, _ = train(models, "sd3", dataset=data, steps=3, temperature=2.0, preview_every=2)
    assert [message["step"] for message in (sent[0], sent[-1])] == [1, 3]
    assert [message["ended"] for message in (sent[0], sent[-1])] == [False, True]
    last = sent[-1]
    assert [point[0] for point in last["points"]] == [1, 2, 3]
    assert last["points"][1][1] == pytest.approx(sum(losses["loss"][:2]) / 2)
    assert [point[0] for point in last["held_out"]] == [2, 3]
    assert last["comparable"]
    assert (last["steps"], last["chance"]) == (3, 0.5)
    assert 0 < last["memory"]["used"] < last["memory"]["total"]


@pytest.mark.parametrize(
    "added", [{"denoising_weight": 1.0}, {"preset": "paper and guidance"}, {"contrast": "ranking"}]
)
def test_a_loss_with_more_in_it_is_not_beside_the_contrast(models, token_folder, sent, added):
    train(models, "sd3", steps=1, temperature=2.0, **added)
    assert not sent[-1]["comparable"]


def test_a_run_that_goes_on_sends_what_was_before(models, token_folder, sent):
    train(models, "sd3", steps=2, temperature=2.0, filename_prefix="run")
    sent.clear()
    train(models, "sd3", steps=4, temperature=2.0, filename_prefix="run", resume=True)
    assert [point[0] for point in sent[0]["points"]] == [1, 2, 3]
    assert sent[0]["seconds_left"] is None  # until a step of this run was timed


def test_a_run_that_is_refused_before_its_first_step_ends(models, token_folder, sent):
    with pytest.raises(SoftREPAError, match="teaches nothing"):
        train(models, "sd3", on_no_contrast="stop")
    assert [(message["step"], message["points"], message["ended"]) for message in sent] == [(0, [], True)]


def test_what_is_no_number_is_none(models, token_folder, sent):
    """JSON that a browser reads has no NaN."""
    train(models, "sd3", steps=1, objective="denoising")
    json.dumps(sent, allow_nan=False)
    curve = Curve()
    curve.extend(records([1.0], math.nan))
    assert curve.points() == [(1, 1.0, None)]


def test_messages_are_seldom_and_the_end_is_one():
    messages = []
    live = Live(messages.append, seconds=math.inf)
    session = SimpleNamespace(
        trainer=SimpleNamespace(config=TrainingConfig(steps=9, batch_size=2, negatives=3)),
        records=[],
        held_out=[],
    )
    for record in records(range(9)):
        session.records.append(record)
        live.after(record, session)
    live.ended(session)
    assert [message["step"] for message in messages] == [1, 9]
    assert messages[0]["chance"] == 0.25  # among as many captions as an image is compared with


def test_long_runs_send_few_points():
    curve, losses = Curve(), [float(index % 100) for index in range(20_000)]
    everything = records(losses)
    for end in (10, 5_000, 20_000):
        curve.extend(everything[:end])
    points = curve.points()
    assert MOST_POINTS / 2 <= len(points) <= MOST_POINTS + 1
    steps = [point[0] for point in points]
    assert steps == sorted(set(steps))
    assert steps[-1] == 20_000
    assert points[-1][1] == pytest.approx(sum(losses[-50:]) / 50)


def test_with_live_curves_the_picture_is_the_samples_alone(models, token_folder, monkeypatch):
    shown = []
    monkeypatch.setattr(Session, "show", lambda session, image: shown.append(image))
    path = train(models, "sd3", steps=2, temperature=2.0)[3]
    assert shown == []
    assert next(iter(token_folder.parents[1].rglob("curves.png"))).stat().st_size > 1000, path
