"""The other objectives against plain implementations: one graph over all pairs, the gradient by autograd alone."""

import json
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest
import torch
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.comfy.training.score_matching import regression
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training import agsm
from comfyui_softrepa.softrepa.training.config import TrainingConfig
from comfyui_softrepa.softrepa.training.loss import comparison, contrastive_loss, denoising_loss
from comfyui_softrepa.softrepa.training.pairs import MOST_KEPT, Guidance, StepBatch, backward_through_pairs
from comfyui_softrepa.softrepa.training.trainer import TrainableTokens, Trainer
from softrepa_tests.golden_step import TIMESTEP, short_batch
from softrepa_tests.learning import train
from softrepa_tests.of_families import UNET_AND_JOINT
from softrepa_tests.sampling import relative_error, sample
from softrepa_tests.tiny_models import seeded
from softrepa_tests.token_sets import tokens_for

WRONG = (2, 0, 1)
"""Hard negatives of each image."""
OWN_CAPTIONS = ([0, 1, 2, 3, 4], [0, 1, 2], [0, 1, 2, 5])
"""By hand: what each image is compared with when the wrong captions follow the batch's."""
MICRO_BATCHES = (1, 5, 100)


def with_wrong_captions(family: str):
    """The golden step's batch and three more captions."""
    latents, noise, conds = short_batch(family)
    more = []
    for number in range(sum(WRONG)):
        cond = {"cross_attn": seeded(conds[0]["cross_attn"].shape, f"{family}/wrong/{number}", 1.0)}
        if "pooled_output" in conds[0]:
            cond["pooled_output"] = seeded(conds[0]["pooled_output"].shape, f"{family}/wrong/pooled/{number}", 1.0)
        more.append(cond)
    return latents, noise, [*conds, *more]


def two_banks(family: str, name: str = "second"):
    tokens = tokens_for(family)
    return replace(tokens, negative_tokens=seeded(tokens.tokens.shape, f"{family}/{name}", 0.5))


class Plain:
    """One image and one caption at a time, all in one graph."""

    def __init__(self, model, family):
        self.t = TIMESTEP[family]
        self.network = TrainableNetwork(model, tokens_for(family).blocks, checkpointing=False)
        batch = StepBatch.of_all(*with_wrong_captions(family), self.t)
        self.sigma, self.seen, self.target, self.captions = self.network.prepared(batch)

    def output(self, i, j, rows):
        return self.network.output(self.seen[i : i + 1], self.sigma, self.captions.of[j], rows.unsqueeze(0))[0]

    def guided(self, i, nothing, scale):
        """What the model without tokens predicts at a guidance, where caption `nothing` is the empty one."""
        seen, of = self.seen[i : i + 1], self.captions.of
        with torch.no_grad():
            own, without = (self.network.output(seen, self.sigma, of[j])[0] for j in (i, nothing))
            return scale * own - (scale - 1) * without

    def error(self, i, j, rows):
        return (self.output(i, j, rows) - self.target[i]).square().mean()

    def contrastive(self, rows, denoising_weight):
        """The paper's loss at temperature 2, of each image and what it is compared with."""
        loss = 0.0
        for i, captions in enumerate(OWN_CAPTIONS):
            errors = torch.stack([self.error(i, j, rows) for j in captions])
            scores = 4 * torch.exp(-errors / 2)
            loss = loss - (scores[captions.index(i)] - scores.exp().sum().log()) / 3 + denoising_weight * errors[i] / 3
        return loss

    def learned(self, rows, nothing, scale):
        """The error of the images' own predictions beside `guided`."""
        return sum((self.output(i, i, rows) - self.guided(i, nothing, scale)).square().mean() / 3 for i in range(3))


def same_gradients(ours: TrainableTokens, plain: TrainableTokens) -> None:
    for (name, one), other in zip(ours.named_parameters(), plain.parameters(), strict=True):
        assert other.grad.abs().max() > 0, name
        assert relative_error(one.grad, other.grad) <= 1e-4, name


@UNET_AND_JOINT
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_hard_negatives(models, family, micro_batch):
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        by_hand = Plain(models[family], family)
        stack.enter_context(by_hand.network.trainable())
        plain, ours = TrainableTokens(tokens_for(family)), TrainableTokens(tokens_for(family))
        loss = by_hand.contrastive(plain.rows(by_hand.t), denoising_weight=10)
        loss.backward()

        compared = comparison(WRONG)
        network = TrainableNetwork(models[family], ours.blocks)
        value, errors = backward_through_pairs(
            ours.rows(by_hand.t),
            network,
            StepBatch(*with_wrong_captions(family), by_hand.t, compared),
            micro_batch,
            lambda errors: contrastive_loss(errors, 2.0, denoising_weight=10.0, compared=compared),
        )
    assert abs(value - loss) <= 1e-5 * loss.abs()
    assert errors[~compared].abs().max() == 0
    same_gradients(ours, plain)


@UNET_AND_JOINT
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_alignment_guided_score_matching(models, family, micro_batch):
    """The paper's sums written out, with a teacher of its own tokens and other constants than the defaults."""
    positive, negative, temperature = 0.8, 0.3, 0.5
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        by_hand = Plain(models[family], family)
        stack.enter_context(by_hand.network.trainable())
        plain, ours = TrainableTokens(two_banks(family)), TrainableTokens(two_banks(family))
        start = two_banks(family, "teacher")
        shifted = replace(start, tokens=seeded(start.tokens.shape, "shift", 0.5))
        teacher = TrainableTokens(shifted).requires_grad_(False)
        banks, slow = plain.banks(by_hand.t), teacher.banks(by_hand.t)
        matching, others, pairs = 0.0, 0.0, 0
        for i, captions in enumerate(OWN_CAPTIONS):
            with torch.no_grad():
                predicted = {j: by_hand.output(i, j, slow[int(i != j)]) for j in captions}
                likelihood = {
                    j: torch.exp(-(v - by_hand.target[i]).square().mean() / temperature) for j, v in predicted.items()
                }
                mean = sum(likelihood[j] * predicted[j] for j in captions) / sum(likelihood.values())
            for j in captions:
                guidance = predicted[j] - mean
                if i == j:
                    aim = by_hand.target[i] + positive * guidance
                    matching = matching + (by_hand.output(i, j, banks[0]) - aim).square().mean()
                else:
                    aim = by_hand.target[i] - negative * guidance
                    others = others + (by_hand.output(i, j, banks[1]) - aim).square().mean()
                    pairs += 1
        loss = matching / 3 + others / pairs
        loss.backward()

        value, errors, gradient = regression(
            TrainableNetwork(models[family], ours.blocks),
            partial(agsm.aims, temperature=temperature, positive=positive, negative=negative),
            ours.banks(by_hand.t).detach(),
            slow,
            StepBatch(*with_wrong_captions(family), by_hand.t, comparison(WRONG)),
            agsm.pair_weights(comparison(WRONG)),
            micro_batch,
        )
        ours.banks(by_hand.t).backward(gradient.float())
        own = torch.stack([by_hand.error(i, i, banks[0]) for i in range(3)])
    assert abs(value - loss) <= 1e-5 * loss.abs()
    assert relative_error(errors.diagonal(), own) <= 1e-5
    same_gradients(ours, plain)


@UNET_AND_JOINT
@pytest.mark.parametrize("micro_batch", (1, 2, 100))
def test_guidance(models, family, micro_batch):
    """The guided prediction written out, without tokens, and regressed onto by a plain graph with them."""
    scale, empty = 3.0, with_wrong_captions(family)[2][3]
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        by_hand = Plain(models[family], family)
        stack.enter_context(by_hand.network.trainable())
        plain, ours = TrainableTokens(tokens_for(family)), TrainableTokens(tokens_for(family))
        loss = by_hand.learned(plain.rows(by_hand.t), 3, scale)
        loss.backward()

        network = TrainableNetwork(models[family], ours.blocks)
        latents, noise, conds = short_batch(family)
        own = StepBatch(latents, noise, conds, by_hand.t, torch.eye(3, dtype=torch.bool))
        guidance = Guidance(empty, scale, is_learned=True)
        rows = ours.rows(by_hand.t)
        value, _ = backward_through_pairs(rows, network, own, micro_batch, denoising_loss, guidance=guidance)
    assert abs(value - loss) <= 1e-5 * loss.abs()
    same_gradients(ours, plain)


@UNET_AND_JOINT
@pytest.mark.parametrize("micro_batch", MICRO_BATCHES)
def test_guidance_learned_beside_the_contrast(models, family, micro_batch):
    """Both losses written out on one plain graph, hard negatives among the captions that are compared."""
    scale, weight, empty = 3.0, 0.7, with_wrong_captions(family)[2][4]
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        by_hand = Plain(models[family], family)
        stack.enter_context(by_hand.network.trainable())
        plain = TrainableTokens(tokens_for(family))
        rows = plain.rows(by_hand.t)
        loss = by_hand.contrastive(rows, denoising_weight=1) + weight * by_hand.learned(rows, 4, scale)
        loss.backward()

        config = TrainingConfig(temperature=2.0, denoising_weight=1.0, guidance_scale=scale, guidance_weight=weight)
        ours = Trainer(config, tokens_for(family), TrainableNetwork(models[family], plain.blocks), None, empty)
        batch = StepBatch(*with_wrong_captions(family), by_hand.t, comparison(WRONG))
        value, errors = ours._contrast(batch, micro_batch, 3)
        matrix = [[by_hand.error(i, j, rows).item() for j in range(3)] for i in range(3)]
    assert abs(value - loss) <= 1e-5 * loss.abs()
    assert relative_error(errors[:, :3], torch.tensor(matrix)) <= 1e-5
    same_gradients(ours.tokens, plain)


GUIDED = {
    "paper": lambda errors, compared: contrastive_loss(errors, 2.0, denoising_weight=10.0, compared=compared),
    "relative": lambda errors, compared: contrastive_loss(errors, 1.0, 4.0, 0.5, True, True, compared, 3),
}


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("micro_batch", (1, 100))
@pytest.mark.parametrize(("name", "most_kept"), [("paper", MOST_KEPT), ("relative", 1)])
def test_guided_contrast(models, family, micro_batch, name, most_kept):
    """Errors of guided predictions, with tokens in both halves, by one plain graph."""
    scale, compared = 2.5, comparison(WRONG)
    empty = with_wrong_captions(family)[2][5]
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
        by_hand = Plain(models[family], family)
        stack.enter_context(by_hand.network.trainable())
        plain, ours = TrainableTokens(tokens_for(family)), TrainableTokens(tokens_for(family))
        rows = plain.rows(by_hand.t)
        matrix = torch.zeros(compared.shape)
        for i, captions in enumerate(OWN_CAPTIONS):
            nothing = by_hand.output(i, 5, rows)
            for j in captions:
                guided = nothing + scale * (by_hand.output(i, j, rows) - nothing)
                matrix[i, j] = (guided - by_hand.target[i]).square().mean()
        loss = GUIDED[name](matrix, compared)
        loss.backward()

        value, errors = backward_through_pairs(
            ours.rows(by_hand.t),
            TrainableNetwork(models[family], ours.blocks),
            StepBatch(*with_wrong_captions(family), by_hand.t, compared),
            micro_batch,
            lambda errors: GUIDED[name](errors, compared),
            name == "paper",
            most_kept,
            guidance=Guidance(empty, scale),
        )
    assert abs(value - loss) <= 1e-5 * loss.abs()
    assert relative_error(errors, matrix.detach()) <= 1e-5
    same_gradients(ours, plain)


def test_a_guided_contrast_at_guidance_1_is_the_contrast(models, token_folder):
    paper = train(models, "sd15", temperature=2.0)
    guided = train(models, "sd15", temperature=2.0, objective="guided contrast", guidance_scale=1.0)
    assert torch.equal(guided[0].tokens, paper[0].tokens)
    assert guided[1] == paper[1]


OTHERS = [
    {"preset": "AGSM", "hard_negatives": 1, "micro_batch": 3},
    {"hard_negatives": 1, "symmetric": True, "temperature_mode": "relative", "temperature": 1.0},
    {"objective": "denoising"},
    {"preset": "guidance", "guidance_scale": 2.0},
    {"preset": "paper and guidance", "guidance_scale": 2.0, "temperature": 2.0, "hard_negatives": 1},
    {"objective": "guided contrast", "guidance_scale": 2.0, "temperature": 2.0, "contrast": "ranking"},
]


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("options", OTHERS)
def test_runs_go_on_where_they_stopped(models, token_folder, family, options):
    whole = train(models, family, steps=4, filename_prefix="whole", **options)
    half = train(models, family, steps=2, filename_prefix="half", **options)
    rest = train(models, family, steps=4, filename_prefix="half", resume=True, **options)
    saved = token_files.load(rest[3])
    assert rest[3] == half[3]
    for name in ("tokens", "time_table", "negative_tokens"):
        ours, theirs = getattr(saved, name), getattr(whole[0], name)
        assert (ours is None) == (theirs is None) == (name == "negative_tokens" and options.get("preset") != "AGSM")
        assert ours is None or torch.equal(ours, theirs), name
    assert rest[1] == whole[1]
    assert torch.isfinite(sample(apply_tokens(models[family], saved), family, steps=1)).all()


def test_both_banks_learn(models, token_folder):
    still = train(models, "sd3", steps=1, learning_rate=0.0, preset="AGSM")[0]
    moved = train(models, "sd3", steps=4, preset="AGSM")[0]
    for name in ("tokens", "time_table", "negative_tokens"):
        assert not torch.equal(getattr(still, name), getattr(moved, name)), name
    settings = json.loads(moved.metadata["inputs"])
    assert settings["objective"] == "agsm"
    assert "preset" not in settings  # the file says what it was trained with, whatever a preset means later


def test_two_banks_from_one(models, token_folder):
    one = train(models, "sd3", steps=1)[0]
    two = train(models, "sd3", steps=1, learning_rate=0.0, init_tokens=one, preset="AGSM")[0]
    assert torch.equal(two.tokens, one.tokens)
    assert torch.equal(two.negative_tokens, one.tokens)
    again = train(models, "sd3", steps=1, learning_rate=0.0, init_tokens=two, preset="AGSM")[0]
    assert torch.equal(again.negative_tokens, two.negative_tokens)


@pytest.mark.parametrize(
    ("preset", "inputs"), [("hard negatives", {"hard_negatives": 1}), ("paper and guidance", {"guidance_weight": 10.0})]
)
def test_a_preset_is_its_inputs(models, token_folder, preset, inputs):
    by_preset = train(models, "sd3", temperature=2.0, preset=preset)
    by_input = train(models, "sd3", temperature=2.0, **inputs)
    assert torch.equal(by_preset[0].tokens, by_input[0].tokens)
    assert not torch.equal(by_preset[0].tokens, train(models, "sd3", temperature=2.0)[0].tokens)


def test_presets_are_not_overruled_silently(models, token_folder):
    with pytest.raises(SoftREPAError, match='objective is denoising, expected agsm as preset "AGSM" sets it'):
        train(models, "sd3", preset="AGSM", objective="denoising")
    with pytest.raises(SoftREPAError, match='objective is agsm, expected contrastive as preset "paper and guidance"'):
        train(models, "sd3", preset="paper and guidance", objective="agsm")
    with pytest.raises(
        SoftREPAError,
        match='preset is "best", expected one of paper; paper, relative temperature; hard negatives; AGSM',
    ):
        train(models, "sd3", preset="best")
