"""FlowEdit through ComfyUI's sampling: the paper's result, batching, seeds, masks and what people put on a model."""

import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfyui_softrepa.softrepa.comfy.editing.flowedit import edit_sigmas
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.editing.flowedit import Draws
from softrepa_tests import tiny_models
from softrepa_tests.editing import Network, conds, edit, paper_edit, sd3_schedule, source_latent, vp_schedule
from softrepa_tests.oracle import injected
from softrepa_tests.sampling import prompt, relative_error
from softrepa_tests.token_sets import tokens_for

EXACT = 1e-5
FAMILIES = ("sd15", "sdxl", "sd3")


@pytest.fixture(scope="module")
def networks():
    with torch.inference_mode():
        return {family: Network(family) for family in FAMILIES}


@pytest.fixture
def count(monkeypatch):
    """Batch sizes of the network's calls, in order, for a model."""
    handles = []

    def start(model) -> list[int]:
        calls = []
        network = model.model.diffusion_model
        handles.append(network.register_forward_pre_hook(lambda module, args: calls.append(len(args[0]))))
        return calls

    yield start
    for handle in handles:
        handle.remove()


def expected_edit(network, family, n_max=6, steps=8, seed=3, latent=None, n_min=0, n_avg=1, mask=1.0, **cfg):
    latent = source_latent(family) if latent is None else latent
    times = sd3_schedule(steps) if family == "sd3" else vp_schedule(steps)
    if family != "sd3":
        times = times / (1 + times)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(seed))
    options = {"n_min": n_min, "n_avg": n_avg, "mask": mask} | {"source_cfg": 2.0, "target_cfg": 4.0} | cfg
    return paper_edit(network, latent, Draws(noise), times[-(n_max + 1) :], conds(family), **options)


PAPER = [
    {},
    {"n_max": 8},
    {"n_avg": 3},
    {"n_min": 4},
    {"n_min": 4, "n_avg": 3, "n_max": 8},
    {"source_cfg": 1.0, "target_cfg": 1.0},
    {"source_cfg": 1.0},
]


@pytest.mark.parametrize(
    ("family", "options"),
    [(family, options) for family in ("sd15", "sd3") for options in PAPER] + [("sdxl", {"n_min": 1, "n_max": 3})],
)
def test_equals_the_paper(models, networks, family, options):
    ours = edit(models[family], family, **options)
    expected = expected_edit(networks[family], family, **options)
    assert relative_error(ours.double(), expected) <= EXACT
    assert relative_error(ours, source_latent(family)) > 0.01


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("n_min", [0, 4])
def test_equals_the_paper_with_a_mask(models, networks, family, n_min):
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:, 3:] = 1
    latent = source_latent(family)
    ours = edit(models[family], family, {"samples": latent, "noise_mask": mask}, n_min=n_min)
    expected = expected_edit(networks[family], family, n_min=n_min, mask=mask[:, None].double())
    assert relative_error(ours.double(), expected) <= EXACT
    outside = (mask == 0)[:, None].expand_as(latent)
    assert torch.equal(ours[outside], latent[outside])
    assert not torch.equal(ours, latent)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_equals_the_paper_with_soft_tokens(models, networks, family):
    tokens = tokens_for(family)
    ours = edit(apply_tokens(models[family], tokens), family)
    with injected(networks[family].model, tokens):
        expected = expected_edit(networks[family], family)
    assert relative_error(ours.double(), expected) <= EXACT
    assert relative_error(edit(models[family], family).double(), expected) > 1e-3


def test_schedule_is_the_references():
    sd3 = tiny_models.build("sd3")
    ours = edit_sigmas(sd3, "normal", 50, 33)
    assert ours.shape == (34,)
    assert abs(ours[0].item() - 0.85) < 1e-3
    assert (ours.double() - torch.from_numpy(sd3_schedule(50)[-34:])).abs().max() < 1e-6
    sd15 = edit_sigmas(tiny_models.build("sd15"), "normal", 50, 41).double()
    assert (sd15 - torch.from_numpy(vp_schedule(50)[-42:])).abs().max() < 1e-4
    assert abs(sd15[0] / (1 + sd15[0]) - 0.85) < 0.005  # the documented n_max for eps models


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("tokens", [None, {}, {"strength": 0.5, "apply_to": "negative"}])
def test_one_two_and_four_forwards_agree(models, family, count, monkeypatch, tokens):
    model = models[family] if tokens is None else apply_tokens(models[family], tokens_for(family), **tokens)
    calls = count(model)
    latent = {"samples": source_latent(family, batch=2)}
    one = edit(model, family, latent, n_max=3)
    assert calls == [8] * 3
    calls.clear()

    asked = []
    required = type(model.model).memory_required

    def only_halves(self, shape, cond_shapes={}):
        asked.append(shape[0])
        return 1e30 if shape[0] > 4 else required(self, shape, cond_shapes=cond_shapes)

    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "memory_required", only_halves)
        two = edit(model, family, latent, n_max=3)
    assert calls == [4, 4] * 3
    assert 8 in asked
    calls.clear()
    with monkeypatch.context() as patch:
        patch.setattr(type(model.model), "memory_required", lambda self, shape, cond_shapes={}: 1e30)
        four = edit(model, family, latent, n_max=3)
    assert calls == [2, 2, 2, 2] * 3
    assert relative_error(two, one) <= EXACT
    assert relative_error(four, one) <= EXACT


def test_only_what_is_used_is_computed(models, count):
    model = models["sd3"]
    calls = count(model)
    for options, expected in (
        ({"source_cfg": 1.0, "target_cfg": 1.0}, [2] * 3),
        ({"source_cfg": 1.0}, [1, 2] * 3),
        ({"n_min": 2}, [4] + [2] * 2),
        ({"n_min": 2, "target_cfg": 1.0}, [2, 1] + [1] * 2),
        ({"n_avg": 3, "n_min": 1}, [4] * 6 + [2]),
    ):
        calls.clear()
        edit(model, "sd3", n_max=3, **options)
        assert calls == expected, options


@pytest.mark.parametrize("family", FAMILIES)
def test_several_token_sets_are_one_forward(models, family, count):
    """A second set takes the place of the first one's hooks, as nothing else acts on the model then."""
    model = models[family]
    for seed in ("a", "b", "c"):
        model = apply_tokens(model, tokens_for(family, seed=seed))
    calls = count(model)
    edit(model, family, n_max=2)
    assert calls == [4] * 2


def test_prompts_of_other_lengths_run_apart(models, count):
    """SD3's text is not padded: lengths that differ between source and target are two forwards."""
    calls = count(models["sd3"])
    prompts = {name: prompt("sd3", name, length=231) for name in ("target_positive", "target_negative")}
    edit(models["sd3"], "sd3", n_max=2, **prompts)
    assert calls == [2, 2] * 2


def test_same_seed_same_edit_whatever_ran_before(models):
    model = models["sd15"]
    first = edit(model, "sd15", n_avg=2)
    state = torch.random.get_rng_state()
    again = edit(model, "sd15", n_avg=2)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(12345)
    torch.randn(100)
    assert torch.equal(edit(model, "sd15", n_avg=2), first)
    assert torch.equal(again, first)
    assert not torch.equal(edit(model, "sd15", n_avg=2, seed=4), first)


@pytest.mark.parametrize("n_min", [0, 2])
def test_batch_index_as_a_ksampler(models, n_min):
    """An image of a batch, done again alone by its index, gets the same noise in every step."""
    latent = source_latent("sd15", batch=3)
    whole = edit(models["sd15"], "sd15", {"samples": latent}, n_avg=2, n_min=n_min)
    alone = edit(models["sd15"], "sd15", {"samples": latent[2:], "batch_index": [2]}, n_avg=2, n_min=n_min)
    assert relative_error(alone, whole[2:]) <= EXACT
    without = edit(models["sd15"], "sd15", {"samples": latent[2:]}, n_avg=2, n_min=n_min)
    assert relative_error(without, whole[2:]) > 1e-3


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_equal_prompts_return_the_source(models, family):
    same = {f"target_{role}": prompt(family, f"source_{role}") for role in ("positive", "negative")}
    latent = source_latent(family)
    ours = edit(models[family], family, source_cfg=3.0, target_cfg=3.0, **same)
    assert relative_error(ours, latent) <= EXACT


@pytest.mark.parametrize("n_min", [0, 3])
@pytest.mark.parametrize(("batch", "with_target_model"), [(1, False), (2, False), (2, True)])
def test_mask_of_image_size(models, n_min, batch, with_target_model):
    """A mask in pixels, resized with soft edges: exactly the source where the resized mask is 0."""
    target_model = apply_tokens(models["sd3"], tokens_for("sd3")) if with_target_model else None
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:40, 20:] = 1
    latent = source_latent("sd3", batch=batch)
    masked = {"samples": latent, "noise_mask": mask}
    ours = edit(models["sd3"], "sd3", masked, n_min=n_min, n_max=4, target_model=target_model)
    resized = comfy.sampler_helpers.prepare_mask(mask, latent.shape, latent.device)
    assert 0 < (resized == 0).float().mean() < 1
    assert torch.equal(ours[resized == 0], latent[resized == 0])
    assert (ours != latent)[resized == 1].float().mean() > 0.99


def test_euler_when_every_step_is_plain(models):
    """n_min = n_max is ComfyUI's own Euler sampling of the target from the noised source."""
    model = models["sd3"]
    latent = source_latent("sd3")
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(prompt("sd3", "target_positive"), prompt("sd3", "target_negative"))
    guider.set_cfg(4.0)
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    sigmas = edit_sigmas(model, "normal", 8, 6)
    expected = guider.sample(noise, latent, comfy.samplers.sampler_object("euler"), sigmas, disable_pbar=True, seed=3)
    assert relative_error(edit(model, "sd3", n_min=6), expected) <= EXACT


def test_v_prediction(models):
    (model,) = ModelSamplingDiscrete().patch(models["sd15"], "v_prediction", False)
    expected = expected_edit(Network("sd15", v_prediction=True), "sd15")
    assert relative_error(edit(model, "sd15").double(), expected) <= EXACT
    assert relative_error(edit(models["sd15"], "sd15").double(), expected) > 1e-3


def test_progress_preview_and_cancel(models):
    seen = []
    latent = source_latent("sd3")
    ours = edit(models["sd3"], "sd3", callback=lambda step, x0, x, total: seen.append((step, total, x0, x)))
    assert [(step, total) for step, total, *_ in seen] == [(step, 6) for step in range(6)]
    last = models["sd3"].model.process_latent_out(seen[-1][2])
    assert relative_error(last, ours) <= EXACT
    assert seen[0][3].shape == latent.shape

    def cancel(step, *_):
        if step == 1:
            comfy.model_management.interrupt_current_processing()
        seen.append(step)

    seen.clear()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        edit(models["sd3"], "sd3", callback=cancel)
    assert seen == [0, 1]
    assert torch.equal(edit(models["sd3"], "sd3"), ours)
