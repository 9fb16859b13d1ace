"""Numbers that are none and pictures beyond a model's positions: one sentence, before anything is computed."""

import math
from dataclasses import replace

import pytest
import torch
from comfy_api.latest import io
from comfyui_softrepa.nodes import dataset as dataset_nodes
from comfyui_softrepa.nodes import flowedit, score, tokens, training
from comfyui_softrepa.nodes.dataset import DatasetFromLatents
from comfyui_softrepa.nodes.flowedit import FlowEdit, FlowEditGuiderNode
from comfyui_softrepa.nodes.score import AlignmentScore
from comfyui_softrepa.nodes.tokens import ApplyTokens
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.errors import SoftREPAError
from softrepa_tests.editing import conds, edit, source_latent
from softrepa_tests.learning import InMemory, dataset, train
from softrepa_tests.sampling import prompt
from softrepa_tests.tiny_models import CHANNELS, mmdit_of
from softrepa_tests.token_sets import tokens_for

ACTING = ("strength", "start_percent", "end_percent")
GUIDANCE = ("source_cfg", "target_cfg")
TRAINING = (
    "learning_rate",
    "temperature",
    "logit_scale",
    "denoising_weight",
    "gradient_clip",
    "ema_decay",
    "caption_dropout",
    "guidance_scale",
    "guidance_weight",
    "preview_cfg",
)
OF_THE_DATASET = ("validation_percent", "cache_gb")
"""Their tests are beside the folder's."""

NO_NUMBERS = (math.nan, math.inf, -math.inf)
SUBJECTS = (tokens, flowedit, dataset_nodes, training, score)


@pytest.fixture(autouse=True)
def nothing_runs(models, monkeypatch):
    """The networks of the tiny models must not be asked."""
    for model in models.values():
        monkeypatch.setattr(model.model.diffusion_model, "forward", lambda *_, **__: pytest.fail("the network ran"))


def test_every_widget_for_a_fraction_is_tried_here():
    nodes = [node for subject in SUBJECTS for node in subject.NODES]
    found = {one.id for node in nodes for one in node.define_schema().inputs if isinstance(one, io.Float.Input)}
    assert found == {*ACTING, *GUIDANCE, *TRAINING, *OF_THE_DATASET}


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", ACTING)
def test_of_tokens(models, name, value):
    with pytest.raises(SoftREPAError, match=f'^Tokens "a": {name} is {value}, expected 0'):
        ApplyTokens.execute(models["sd15"], tokens_for("sd15"), **{name: value})


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", GUIDANCE)
def test_of_edits(models, name, value):
    latent = {"samples": source_latent("sd3")}
    with pytest.raises(SoftREPAError, match=f"^{name} is {value}, expected 0 or more"):
        FlowEdit.execute(models["sd3"], **conds("sd3"), latent_image=latent, seed=0, **{name: value})
    with pytest.raises(SoftREPAError, match=f"^{name} is {value}, expected 0 or more"):
        FlowEditGuiderNode.execute(models["sd3"], **conds("sd3"), **{name: value})


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", TRAINING)
def test_of_training(models, token_folder, name, value):
    with pytest.raises(SoftREPAError, match=f"^{name} is {value}, expected"):
        train(models, "sd3", **{name: value})
    assert list(token_folder.iterdir()) == []


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_in_what_is_edited(models, family, value):
    broken = source_latent(family)
    broken[0, 1, 2, 3] = value
    with pytest.raises(SoftREPAError, match="^latent_image has 1 NaN or infinite values, expected finite numbers"):
        edit(models[family], family, {"samples": broken})
    mask = torch.ones(1, 64, 64)
    mask[0, 5:7] = value
    with pytest.raises(SoftREPAError, match="^noise_mask has 128 NaN or infinite values"):
        edit(models[family], family, {"samples": source_latent(family), "noise_mask": mask})
    words = prompt(family, "target_negative")
    words[0][0][0, 5] = value
    with pytest.raises(SoftREPAError, match="^target_negative has .* NaN or infinite values"):
        edit(models[family], family, target_negative=words)


def test_in_noise_and_sigmas_of_other_nodes(models):
    guider = flowedit.FlowEditGuider(models["sd3"])
    guider.set_conds(**conds("sd3"))
    guider.set_cfg(2.0, 4.0)
    sampler, latent = flowedit.FlowEditSampler(), source_latent("sd3")
    sigmas = torch.tensor([0.9, math.nan, 0.0])
    with pytest.raises(SoftREPAError, match="^the schedule in sigmas has 1 NaN or infinite values"):
        guider.sample(torch.ones_like(latent), latent, sampler, sigmas)
    with pytest.raises(SoftREPAError, match=f"^noise has {latent.numel()} NaN or infinite values"):
        guider.sample(torch.full_like(latent, math.inf), latent, sampler, sigmas.nan_to_num(0.5))


@pytest.mark.parametrize("name", ["latents", "conditioning", "empty_conditioning"])
def test_in_given_encodings(name):
    samples = torch.randn(3, 4, 8, 8)
    entries = {word: prompt("sd15", word) for word in ("a", "b", "c", "")}
    broken = samples if name == "latents" else entries["" if name.startswith("empty") else "b"][0][0]
    broken[-1].view(-1)[:2] = math.nan
    given = [{"samples": samples}], [entries[word] for word in "abc"], [entries[""]]
    with pytest.raises(SoftREPAError, match=f"^(an entry of )?{name} has 2 NaN or infinite values"):
        DatasetFromLatents.execute(*given)


LARGE = (64, 1040)
BEYOND = "is 64 x 1040 pixels, expected at most 1024 a side: this model has no positions beyond"


def test_edits_beyond_the_position_table(models):
    latent = {"samples": torch.randn(1, CHANNELS["sd3"], 130, 8)}
    with pytest.raises(SoftREPAError, match=f"^latent_image {BEYOND}"):
        edit(models["sd3"], "sd3", latent)


def test_edits_beyond_the_position_table_of_the_second_model(models):
    small = mmdit_of(128, 2, pos_embed_max_size=4, num_patches=16)
    latent = {"samples": torch.randn(1, CHANNELS["sd3"], 16, 8)}
    with pytest.raises(SoftREPAError, match="^latent_image is 64 x 128 pixels, expected at most 64 a side"):
        edit(models["sd3"], "sd3", latent, target_model=small)


def with_a_large_image(family: str, part: str = "train"):
    data = dataset(family)
    data.validation = dataset(family, 9).train[6:] if part == "validation" else []
    images = getattr(data, part)
    images[-1] = replace(images[-1], size=LARGE)
    return data


@pytest.mark.parametrize("part", ["train", "validation"])
def test_training_beyond_the_position_table(models, token_folder, monkeypatch, part):
    if part == "train":
        monkeypatch.setattr(InMemory, "latent", lambda *_: pytest.fail("an image was encoded"))
    monkeypatch.setattr(TrainableNetwork, "gradients", lambda *_: pytest.fail("the network ran"))
    with pytest.raises(SoftREPAError, match=f'^Dataset "toy": an image {BEYOND}'):
        train(models, "sd3", dataset=with_a_large_image("sd3", part))
    assert list(token_folder.iterdir()) == []


def test_scores_beyond_the_position_table(models):
    with pytest.raises(SoftREPAError, match=f'^Dataset "toy": an image {BEYOND}'):
        AlignmentScore.execute(models["sd3"], with_a_large_image("sd3"), 3, 1, "500")


def test_scores_of_another_models_dataset(models):
    with pytest.raises(SoftREPAError, match='^Dataset "toy" has text of width 768, expected 4096 for SD3'):
        AlignmentScore.execute(models["sd3"], dataset("sd15"), 3, 1, "500")
