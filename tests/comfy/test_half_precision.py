"""Training on models that compute in half precision, as most GPUs do: within its precision the same as in float32."""

import pytest
import torch
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.training.pairs import StepBatch
from softrepa_tests import tiny_models
from softrepa_tests.golden_step import TIMESTEP, short_batch
from softrepa_tests.learning import moved_by, same_training
from softrepa_tests.of_families import UNET_AND_JOINT
from softrepa_tests.sampling import relative_error
from softrepa_tests.tiny_models import seeded
from softrepa_tests.token_sets import tokens_for

PRECISION = {torch.float16: 0.01, torch.bfloat16: 0.08}
"""About ten roundings; what is lost altogether is far beyond it."""


def half(family: str, dtype: torch.dtype):
    model = tiny_models.build(family)
    tiny_models.compute_in(model, dtype)
    return model


@UNET_AND_JOINT
@pytest.mark.parametrize("dtype", PRECISION, ids=str)
def test_a_step(models, token_folder, family, dtype):
    start = tokens_for(family)
    expected = moved_by(models[family], family, start, hard_negatives=1)
    same_training(moved_by(half(family, dtype), family, start, hard_negatives=1), expected, PRECISION[dtype])


@UNET_AND_JOINT
def test_a_step_of_score_matching(models, token_folder, family):
    start = tokens_for(family, banks=True)
    expected = moved_by(models[family], family, start, preset="AGSM")
    same_training(moved_by(half(family, torch.float16), family, start, preset="AGSM"), expected, 0.01)


def test_gradients_of_a_large_picture_do_not_underflow():
    """The mean over a picture's numbers makes each one's share of the gradient smaller than float16 can hold."""
    latents, noise, conds = short_batch("sd3")
    large = [torch.nn.functional.interpolate(one, size=(96, 96)) for one in (latents[:1], noise)]
    gradients = []
    for dtype in (torch.float32, torch.float16):
        model = tiny_models.mmdit_of(width=64, blocks=2)
        tiny_models.compute_in(model, dtype)
        with torch.inference_mode(False), torch.enable_grad():
            rows = seeded((1, 4, 64), "rows", 0.5)
            network = TrainableNetwork(model, blocks=1)
            gradients.append(network.gradients(rows, StepBatch.of_all(*large, conds[:1], TIMESTEP["sd3"]), 1)[1])
    assert relative_error(gradients[1], gradients[0]) <= 0.005
