"""The score of a model on a dataset: what it measures, and that only the model can change it."""

import math
from dataclasses import replace

import pytest
import scipy.stats
import torch
from comfyui_softrepa.nodes.score import AlignmentScore
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.comfy.training.pairs import PairNetwork, pair_errors
from comfyui_softrepa.softrepa.comfy.training.score import HeldOut, parse_timesteps, score
from comfyui_softrepa.softrepa.data.dataset import Dataset
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training.loss import contrastive_loss, information, retrieval_accuracy
from softrepa_tests import foreign
from softrepa_tests.learning import InMemory, dataset, train


def batches(family):
    return HeldOut(dataset(family), 3, 2, seed=1)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_it_is_the_loss_of_the_pairs(models, family):
    measured = score(models[family], batches(family), (100, 900))
    assert measured.losses.shape == (2, 6)
    for row, t in enumerate(measured.timesteps):
        for column, batch in enumerate(batches(family)):
            latents = models[family].model.process_latent_in(batch.latents)
            noise = torch.randn((1, *latents.shape[1:]), generator=torch.Generator().manual_seed(column * 1000 + t))
            errors = pair_errors(models[family], None, latents, noise, batch.conds, t, 9)
            part = slice(3 * column, 3 * column + 3)
            assert measured.losses[row, part].mean() == pytest.approx(contrastive_loss(errors).item(), rel=1e-5)
            assert measured.retrieved[row, part].float().mean() == pytest.approx(retrieval_accuracy(errors))
            expected = information(errors, latents[0].numel()).mean().item()
            assert measured.information[row, part].mean() == pytest.approx(expected, rel=1e-3)


def test_the_same_model_scores_the_same_and_a_patch_without_effect_too(models, token_folder):
    model = models["sd3"]
    tokens = train(models, "sd3", steps=1)[0]
    first, second = score(model, batches("sd3")), score(model, batches("sd3"))
    assert torch.equal(first.losses, second.losses)
    assert torch.equal(first.losses, score(apply_tokens(model, tokens, strength=0.0), batches("sd3")).losses)
    assert not torch.equal(first.information, score(apply_tokens(model, tokens), batches("sd3")).information)


def test_other_noise_for_another_seed_and_the_same_for_fewer_timesteps(models):
    whole, part = score(models["sd15"], batches("sd15")), score(models["sd15"], batches("sd15"), (500,))
    assert torch.equal(whole.information[2], part.information[0])
    assert not torch.equal(part.information, score(models["sd15"], batches("sd15"), (500,), seed=1).information)


def test_the_node(models):
    accuracy, loss, plot, *change = AlignmentScore.execute(models["sd3"], dataset("sd3"), 3, 2, "900, 100").args
    assert all(map(math.isnan, change))
    assert 0 <= accuracy <= 1
    assert loss > 0
    assert plot.shape[0] == 1
    assert plot.shape[3] == 3
    assert plot.std() > 0.05


def test_a_model_of_no_numbers_has_no_score(models, monkeypatch):
    monkeypatch.setattr(PairNetwork, "errors", lambda self, rows, batch, size: torch.full((3, 3), torch.nan))
    with pytest.raises(SoftREPAError, match="Loss of model has 12 NaN or infinite values, expected finite numbers"):
        AlignmentScore.execute(models["sd3"], dataset("sd3"), 3, 2, "900, 100")


def test_a_second_model_is_compared_image_by_image(models, token_folder, monkeypatch):
    told = []
    monkeypatch.setattr("comfyui_softrepa.nodes.score.show_on_node", lambda node, text: told.append(text))
    other = apply_tokens(models["sd3"], train(models, "sd3", steps=1)[0])
    data = dataset("sd3")
    alone = AlignmentScore.execute(models["sd3"], data, 3, 2, "900, 100")
    both = AlignmentScore.execute(models["sd3"], data, 3, 2, "900, 100", other_model=other)
    assert both.args[:2] == alone.args[:2]
    ones, others = (score(one, HeldOut(data, 3, 2, seed=0), (100, 900)) for one in (models["sd3"], other))
    by_image = others.retrieved.double().mean(0) - ones.retrieved.double().mean(0)
    assert both.args[3] == pytest.approx(by_image.mean().item())
    half = scipy.stats.t.ppf(0.975, 5) * by_image.std().item() / math.sqrt(6)
    assert both.args[5] - both.args[4] == pytest.approx(2 * half)
    assert both.args[2].shape == alone.args[2].shape
    assert not torch.equal(both.args[2], alone.args[2])
    lines = told[1].splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["model", "other model"]
    assert lines[3].startswith("loss (less is better), other model: ")
    same = AlignmentScore.execute(models["sd3"], data, 3, 2, "900, 100", other_model=models["sd3"])
    assert same.args[3:] == (0.0, 0.0, 0.0)
    assert "no difference from model in 6 images" in told[2]


@pytest.mark.parametrize("text", ["", "a", "1000", "5,-1", "1.5"])
def test_timesteps_that_are_none(text):
    with pytest.raises(SoftREPAError, match=r"expected numbers from 0 to 999 with commas"):
        parse_timesteps(text)


def test_chance_is_that_of_the_batches_there_are(models):
    measured = score(models["sd3"], HeldOut(dataset("sd3"), 32, 9, seed=0), (500,))
    assert measured.losses.shape == (1, 6)
    assert measured.chance == pytest.approx(1 / 6)


def test_no_image_is_measured_twice():
    examples = [replace(one, size=(64, 64 * (1 + i % 4))) for i, one in enumerate(dataset("sd3", 20).train)]
    data = Dataset("toy", examples, [], InMemory("sd3"), [])
    names = [name for batch in HeldOut(data, 3, 99, seed=0) for name in batch.keys]
    assert len(names) == len(set(names)) == 12  # of five of a size two find no third


def test_validation_images_that_never_meet():
    data = dataset("sd3")
    one, other = dataset("sd3", 8).train[6:]
    data.validation = [one, replace(other, size=(64, 128))]
    with pytest.raises(SoftREPAError, match="has 2 validation images and no two of one size"):
        HeldOut(data, 2, 4, seed=0)


def test_memory_that_runs_out_halves_the_pairs(models, monkeypatch):
    whole, sizes, errors = score(models["sd3"], batches("sd3"), (500,)), [], PairNetwork.errors

    def small_memory(self, rows, batch, micro_batch):
        sizes.append(micro_batch)
        if micro_batch > 1:
            raise RuntimeError("MPS backend out of memory")
        return errors(self, rows, batch, micro_batch)

    monkeypatch.setattr(PairNetwork, "errors", small_memory)
    halved = score(models["sd3"], batches("sd3"), (500,))
    assert sizes == [3, 1, 1]
    assert torch.equal(halved.retrieved, whole.retrieved)


def test_timesteps_are_sorted_and_different():
    assert parse_timesteps(" 900,100, 100") == (100, 900)


def test_another_nodes_attention_is_measured_as_it_samples(models):
    """An override that no training could go through: it changes the result and has no backward."""
    model = foreign.with_override(
        models["sd3"], lambda func, q, k, v, *args, **kwargs: func(q, k, 2 * v, *args, **kwargs).detach()
    )
    found, plain = (score(one, batches("sd3"), (500,)) for one in (model, models["sd3"]))
    assert not torch.equal(found.information, plain.information)
