"""The objectives' own sums, on small numbers."""

import math

import pytest
import torch
from comfyui_softrepa.softrepa.data.ahead import AtHand
from comfyui_softrepa.softrepa.data.batches import Example
from comfyui_softrepa.softrepa.data.dataset import Dataset
from comfyui_softrepa.softrepa.data.latent_lists import dataset_of_lists
from comfyui_softrepa.softrepa.data.swaps import MOST, swaps
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training import agsm
from comfyui_softrepa.softrepa.training.config import TrainingConfig
from comfyui_softrepa.softrepa.training.loss import comparison, contrastive_loss, soft_rank
from comfyui_softrepa.softrepa.training.pairs import loss_weights
from softrepa_tests.toy_training import batches, trainer


def test_who_is_compared_with_whom():
    found = comparison([2, 0, 1])
    assert [row.nonzero().flatten().tolist() for row in found] == [[0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2, 5]]
    assert comparison([0, 0]).tolist() == [[True, True], [True, True]]


def test_an_aim_without_guidance_is_the_target():
    torch.manual_seed(0)
    target, predictions = torch.randn(4, 8, 8), torch.randn(3, 4, 8, 8)
    is_own = torch.tensor([False, True, False])
    plain = agsm.aims(target, predictions, is_own, positive=0.0, negative=0.0)
    assert torch.equal(plain, target.expand_as(plain))
    moved = agsm.aims(target, predictions, is_own)
    framed = agsm.aims(target[:, None], predictions[:, :, None], is_own)
    assert torch.equal(framed.squeeze(2), moved)
    assert (moved - target).abs().amax(dim=(1, 2, 3))[1] > (moved - target).abs().amax(dim=(1, 2, 3))[0]


def test_symmetric_and_relative_by_hand():
    errors = torch.tensor([[0.1, 0.4], [0.3, 0.2]], requires_grad=True)
    scores = 4 * torch.exp(-errors / (2 * 0.25))
    rows, columns = (-(scores.softmax(dim).diagonal().log().mean()) for dim in (1, 0))
    found = contrastive_loss(errors, 2.0, relative=True, symmetric=True)
    assert torch.allclose(found, (rows + columns) / 2)
    ours, plain = (torch.autograd.grad(value, errors)[0] for value in (found, (rows + columns) / 2))
    assert torch.allclose(ours, plain)


@pytest.mark.parametrize("symmetric", [False, True])
def test_ranking_by_hand(symmetric):
    """Its weights of the errors, too, in float64."""
    compared, tau, weight = comparison([2, 0, 1]), 0.3, 0.25
    generator = torch.Generator().manual_seed(0)
    errors = torch.rand(3, 6, generator=generator, dtype=torch.float64).requires_grad_()
    temperature = tau * errors.detach()[:, :3].mean()

    def rank(own, others):
        return sum(1 / (1 + torch.exp((other - own) / temperature)) for other in others) / len(others)

    plain = 0.0
    for i, captions in enumerate(([1, 2, 3, 4], [0, 2], [0, 1, 5])):
        row = rank(errors[i, i], [errors[i, j] for j in captions])
        column = rank(errors[i, i], [errors[k, i] for k in range(3) if k != i])
        plain = plain + ((row + column) / 2 if symmetric else row) / 3 + weight * errors[i, i] / 3
    found = contrastive_loss(
        errors, tau, 4.0, weight, relative=True, symmetric=symmetric, compared=compared, kind="ranking"
    )
    ours = loss_weights(
        errors, lambda e: contrastive_loss(e, tau, 4.0, weight, True, symmetric, compared, None, "ranking")
    )
    assert torch.allclose(found, plain, rtol=1e-12)
    assert torch.allclose(ours, torch.autograd.grad(plain, errors)[0], rtol=1e-10, atol=1e-15)


def test_a_rank_is_a_share():
    errors = torch.tensor([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]])
    assert torch.allclose(soft_rank(errors, 1e-3), torch.tensor([0.0, 0.5, 1.0]))
    assert soft_rank(errors, 1e-3, torch.eye(3, dtype=torch.bool)).tolist() == [0, 0, 0]


def test_relative_temperature_leaves_no_timestep_without_gradient():
    for size in (0.01, 1.0, 30.0):
        errors = (size * torch.tensor([[1.0, 1.1], [1.2, 0.9]])).requires_grad_()
        (gradient,) = torch.autograd.grad(contrastive_loss(errors, 1.0, relative=True), errors)
        assert 0.1 < size * gradient.abs().max() < 10


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "a red square left of a blue circle",
            {"a red circle left of a blue square", "a blue square left of a red circle"},
        ),
        ("a circle above a square", {"a square above a circle"}),
        ("a circle and a square", set()),
        ("a red circle and a red square", set()),
        ("two circles and a square", {"two square and a circles"}),
        ("Two dogs, a cat", {"Two cat, a dogs"}),
        ("three small red circles", set()),
        (
            "the man's hat on a well-kept table",
            {"the man's table on a well-kept hat", "the well-kept hat on a man's table"},
        ),
        ("a photo of a cat and a dog", set()),
        ("a man and a woman on a bench", {"a man and a bench on a woman", "a bench and a woman on a man"}),
        ("There is a cat and a dog.", set()),
        ("a cat next to a dog", set()),
        ("a cat near a dog", set()),
        ("one circle and a square", set()),
        ("a picture of a red circle", set()),
        ("ein roter Kreis, ein blaues Quadrat", {"ein roter Quadrat, ein blaues Kreis"}),
        ("红色的圆在蓝色的方块上面", set()),
        ("\n ... \U0001f600", set()),
        ("", set()),
    ],
)
def test_swapped_words(caption, expected):
    assert set(swaps(caption)) == expected


def test_long_captions_give_a_few_swaps_and_always_the_same():
    caption = "a red circle, a blue cross, a green diamond and a yellow square"
    assert len(swaps(caption)) == MOST
    assert swaps(caption) == swaps(caption)
    assert caption not in swaps(caption)


class Texts(AtHand):
    """Encodings that are their captions."""

    identity, empty = "texts", ""

    def __init__(self):
        self.prepared = []

    def latent(self, example):
        return torch.zeros(4, 8, 8)

    def cond(self, caption):
        return caption

    def prepare(self, captions):
        self.prepared = captions
        return "encoded"


def dataset(*captions: tuple[str, ...]) -> Dataset:
    examples = [Example(f"{i}.png", f"digest{i}", own, (64, 64)) for i, own in enumerate(captions)]
    return Dataset("toy", examples, [], Texts(), [])


def test_batches_with_hard_negatives():
    data = dataset(("a red circle and a blue cross", "a blue circle and a red cross"), ("a cat on a mat",), ("a cat",))
    assert data.prepare_hard_negatives() == "1 hard negatives, none for 3 of 4 captions: encoded"
    first, again = data.started(0), data.started(0)
    for _ in range(4):
        batch = first.batch(3, hard_negatives=2)
        found = dict(zip(batch.captions, batch.wrong, strict=True))
        assert found["a cat on a mat"] == ["a mat on a cat"]
        assert found["a cat"] == []
        assert again.batch(3, hard_negatives=2).wrong == batch.wrong
    assert data.started(0).batch(3).wrong == [[], [], []]


def test_hard_negatives_that_cannot_be():
    with pytest.raises(SoftREPAError, match="has no caption with two words to swap"):
        dataset(("a cat",), ("a dog",)).prepare_hard_negatives()
    conditioning = [[[torch.full((1, 77, 8), float(value)), {}]] for value in range(2)]
    given = dataset_of_lists([{"samples": torch.randn(2, 4, 8, 8)}], conditioning, conditioning[:1])
    with pytest.raises(SoftREPAError, match="without their text, expected one from Caption-Image Folder"):
        given.prepare_hard_negatives()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "clip"}, 'objective is "clip", expected one of contrastive, denoising, agsm'),
        ({"temperature_mode": "auto"}, 'temperature_mode is "auto", expected one of fixed, relative'),
        (
            {"objective": "agsm", "symmetric": True},
            "symmetric is True, expected its default, False, with objective agsm",
        ),
        ({"objective": "denoising", "hard_negatives": 1}, "hard_negatives is 1, expected its default"),
        ({"teacher_decay": 0.5}, "teacher_decay is 0.5, expected its default, 0.9999, with objective contrastive"),
        ({"hard_negatives": 9}, "hard_negatives is 9, expected at most 4"),
        ({"temperature_mode": "relative"}, "temperature is 0.07, expected about 1 with temperature_mode relative"),
        ({"hard_negatives": -1}, "hard_negatives is -1, expected 0 or more"),
        ({"contrast": "hinge"}, 'contrast is "hinge", expected one of cross-entropy, ranking'),
        ({"contrast": "ranking", "logit_scale": 2.0}, "logit_scale is 2.0, expected its default, 4.0, with contrast"),
        ({"objective": "denoising", "contrast": "ranking"}, "contrast is ranking, expected its default, cross-entropy"),
        ({"guidance_scale": 2.0}, "guidance_scale is 2.0, expected its default, 4.0, with guidance_weight 0, which"),
        (
            {"objective": "denoising", "guidance_scale": 2.0},
            "guidance_scale is 2.0, expected its default, 4.0, with objective denoising, which",
        ),
        ({"guidance_weight": -1.0}, "guidance_weight is -1.0, expected 0 or more"),
        ({"guidance_weight": math.nan}, "guidance_weight is nan, expected 0 or more"),
        (
            {"objective": "guided contrast", "guidance_weight": 1.0},
            "guidance_weight is 1.0, expected its default, 0.0, with objective guided contrast",
        ),
        ({"min_timestep": 800, "max_timestep": 700}, "min_timestep is 800 and max_timestep 700, expected 0 to 999"),
        ({"max_timestep": 1000}, "min_timestep is 0 and max_timestep 1000, expected 0 to 999"),
        ({"min_timestep": -1}, "min_timestep is -1 and max_timestep 999, expected 0 to 999"),
        ({"objective": "agsm", "negative_guidance": -1.0}, "negative_guidance is -1.0, expected 0 or more"),
    ],
)
def test_what_does_not_go_together(options, message):
    with pytest.raises(SoftREPAError, match=message):
        TrainingConfig(steps=1, **options)


def test_timesteps_are_drawn_where_they_are_asked_for():
    drawn = {trainer(min_timestep=low, max_timestep=high).step(1).timestep for low, high in ((997, 999), (5, 5))}
    assert drawn <= {5, 997, 998, 999}
    run = trainer(min_timestep=998)
    assert {run.step(1).timestep for _ in range(20)} == {998, 999}
    assert [TrainingConfig(steps=1, **asked).middle_timestep for asked in ({}, {"min_timestep": 700})] == [500, 850]


@pytest.mark.parametrize("temperature_mode", ["fixed", "relative"])
def test_guidance_learned_beside_the_contrast_is_their_sum(temperature_mode):
    def step(**config):
        one = trainer(**config)
        _, value, accuracy, error = one._accumulate(1)
        return {name: each.grad for name, each in one.tokens.named_parameters()}, value, accuracy, error

    contrast = {"temperature_mode": temperature_mode, "denoising_weight": 0.5}
    both, value, *seen = step(guidance_weight=3.0, guidance_scale=2.0, **contrast)
    alone, paper, *expected = step(**contrast)
    learned, beside, *_ = step(objective="guidance", guidance_scale=2.0, temperature=0.07)
    assert seen == expected  # retrieval and error are those of the contrast
    assert value == pytest.approx(paper + 3 * beside)
    for name, found in both.items():
        assert torch.allclose(found, alone[name] + 3 * learned[name], rtol=1e-5, atol=1e-7), name
        assert not torch.allclose(found, alone[name], rtol=1e-2), name


def test_an_end_between_the_contrast_and_guidance_leaves_no_trace():
    run, untouched = (trainer(guidance_weight=3.0, guidance_scale=2.0) for _ in range(2))
    run.step(1), untouched.step(1)
    guided, run.pairs.guided = run.pairs.guided, None
    with pytest.raises(TypeError):
        run.step(1)
    run.pairs.guided = guided
    run.next_batch, untouched.next_batch = batches(1), batches(1)
    assert run.step(1) == untouched.step(1)
    assert torch.equal(run.tokens.tokens, untouched.tokens.tokens)


def test_the_control_compares_nothing():
    run = trainer(objective="denoising", temperature=0.07, learning_rate=0.02)
    records = [run.step(1) for _ in range(60)]
    assert all(record.accuracy != record.accuracy for record in records)
    assert all(record.loss == pytest.approx(record.matching_error) for record in records)
    assert sum(record.loss for record in records[-10:]) < sum(record.loss for record in records[:10])


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_teacher_follows_slowly(accumulation):
    run = trainer(objective="agsm", temperature=0.07, learning_rate=0.1, teacher_decay=0.75, accumulation=accumulation)
    slow = {name: value.detach().clone() for name, value in run.tokens.named_parameters()}
    for _ in range(3):
        run.step(1)
        for name, value in run.tokens.named_parameters():
            slow[name] = 0.75 * slow[name] + 0.25 * value.detach()
    assert {"tokens", "negative_tokens", "time_table"} == slow.keys()
    for name, value in run.teacher.named_parameters():
        assert torch.allclose(value, slow[name], atol=1e-6), name
        assert not torch.equal(value, dict(run.tokens.named_parameters())[name])
    first, *rest = run.pairs.teachers
    assert len(rest) == 3 * accumulation - 1
    assert first.shape == (2, 3, 2, 8)


def test_each_bank_learns_its_own():
    run = trainer(objective="agsm", temperature=0.07, learning_rate=0.05)
    for _ in range(60):
        run.step(1)
    assert run.tokens.tokens.mean() > 0.3
    assert run.tokens.negative_tokens.mean() < -0.3


def test_a_dropped_caption_has_no_hard_negatives():
    run = trainer(caption_dropout=0.9, hard_negatives=1)
    plain, seen = run.next_batch, []

    def next_batch(size):
        latents, conds, _ = plain(size)
        return (
            latents,
            conds,
            [[{"name": f"wrong {j}", "cross_attn": cond["cross_attn"]}] for j, cond in enumerate(conds)],
        )

    run.next_batch = next_batch
    for _ in range(20):
        run.step(1)
    for _, _, names in run.pairs.seen:
        own, wrong = names[:4], names[4:]
        assert wrong == [f"wrong {j}" for j, name in enumerate(own) if name != ""]
        seen.append("" in own)
    assert any(seen)
    assert not all(seen)
