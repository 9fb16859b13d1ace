"""What a new family must do: each row of the table, with its adapter and its tiny model, from training to a picture."""

from types import SimpleNamespace

import pytest
import torch
from comfy.model_base import ModelType, model_sampling
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy.families import ADAPTERS, adapter_of, model_shape
from comfyui_softrepa.softrepa.comfy.families.noising import timestep
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.families import FAMILIES
from softrepa_tests.learning import train
from softrepa_tests.sampling import sample

EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)


def test_every_adapter_serves_a_family():
    assert {family.stream for family in FAMILIES.values()} == set(ADAPTERS)


@EVERY_FAMILY
def test_a_model_is_recognised(models, family):
    shape = model_shape(models[family])
    assert shape.family is FAMILIES[family]
    assert adapter_of(shape.family) is ADAPTERS[shape.family.stream]
    assert models[family].model.model_type in adapter_of(shape.family).noisings


@EVERY_FAMILY
def test_tokens_are_learned_written_read_and_drawn_with(models, token_folder, family):
    model = models[family]
    tokens, _, _, path = train(models, family, steps=2, temperature=2.0)
    read = token_files.load(path)
    assert read.family is FAMILIES[family]
    assert torch.equal(read.tokens, tokens.tokens)
    plain, drawn = (sample(one, family, steps=2) for one in (model, apply_tokens(model, read)))
    assert drawn.isfinite().all()
    assert not torch.equal(drawn, plain)


@EVERY_FAMILY
def test_strength_0_is_the_plain_model(models, token_folder, family):
    tokens = train(models, family, steps=1)[0]
    plain, drawn = (sample(one, family, steps=1) for one in (models[family], apply_tokens(models[family], tokens, 0.0)))
    assert torch.equal(drawn, plain)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(ModelType.FLOW, {"shift": 3.0}), (ModelType.FLOW, {"multiplier": 1.0}), (ModelType.FLUX, {})],
    ids=["SD3", "ends at 1", "Flux"],
)
def test_a_time_table_is_read_by_one_scale(kind, settings):
    """Some flow models count their own time from 0 to 1."""
    sampling = model_sampling(SimpleNamespace(sampling_settings=settings), kind)
    assert timestep(sampling, torch.tensor([0.25, 1.0])).tolist() == [250.0, 1000.0]


@pytest.mark.parametrize("kind", [ModelType.EDM, ModelType.V_PREDICTION_CONTINUOUS, ModelType.V_PREDICTION_EDM])
def test_a_time_table_is_read_by_noise_where_the_model_counts_in_logarithms(kind):
    """As Playground v2.5 and CosXL, which are SDXL otherwise, do."""
    usual = model_sampling(SimpleNamespace(sampling_settings={}), ModelType.EPS)
    sampling = model_sampling(SimpleNamespace(sampling_settings={}), kind)
    sigmas = usual.sigmas[[0, 250, 999]]
    assert timestep(usual, sigmas).tolist() == [0, 250, 999]
    assert timestep(sampling, sigmas).tolist() == [0, 250, 999]
    assert timestep(sampling, torch.tensor([120.0])).tolist() == [999]
