"""FlowAlign, the other method of the FlowEdit nodes, with what people put on conds and models."""

import comfy.hooks
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfyui_softrepa.softrepa.comfy.editing.flowedit import edit_sigmas
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.editing.flowedit import Draws, flow_edit
from comfyui_softrepa.softrepa.editing.methods import FLOW_ALIGN, METHODS
from softrepa_tests import tiny_models
from softrepa_tests.composing import lora_for, small_controlnet
from softrepa_tests.editing import Network, aligned_edit, conds, edit, sd3_schedule, source_latent, vp_schedule
from softrepa_tests.sampling import prompt, record, relative_error
from softrepa_tests.token_sets import tokens_for

EXACT = 1e-5
STEPS = {"steps": 6, "n_max": 6}
TARGET_CFG = 4.0


def align(model, family, latent=None, **options):
    return edit(model, family, latent, method=FLOW_ALIGN, **{"source_cfg": 99.0, **STEPS, **options})


@pytest.fixture(scope="module")
def networks():
    with torch.inference_mode():
        return {family: Network(family) for family in ("sd15", "sd3")}


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("options", [{}, {"n_avg": 2, "n_max": 4}, {"target_cfg": 1.0}, {"masked": True}])
def test_equals_its_code(models, networks, family, options):
    """In the velocities of its flow, which an eps model has as well: t = sigma / (1 + sigma)."""
    options = {"n_max": 6, "n_avg": 1, "target_cfg": TARGET_CFG} | options
    latent, mask = source_latent(family), torch.ones(1, 1, 8, 8)
    if options.pop("masked", False):
        mask[..., :3] = 0
    ours = align(models[family], family, {"samples": latent, "noise_mask": mask}, **options)
    times = sd3_schedule(6) if family == "sd3" else vp_schedule(6) / (1 + vp_schedule(6))
    draws = Draws(torch.randn(latent.shape, generator=torch.Generator().manual_seed(3)))
    times, cfg = times[-(options["n_max"] + 1) :], options["target_cfg"]
    expected = aligned_edit(networks[family], latent, draws, times, conds(family), cfg, options["n_avg"], mask.double())
    assert relative_error(ours.double(), expected) <= EXACT
    assert relative_error(ours, latent) > 0.01
    assert torch.equal(ours[..., :3], latent[..., :3]) == (mask.min() == 0)


class OneByOne:
    """Each prediction by a guider of its own; the source's has no guidance, the target's moves away from the source."""

    def __init__(self, model, target_model, prompts):
        self.models, self.prompts = {"source": model, "target": target_model}, prompts

    def predict(self, name, z, sigma):
        guider = comfy.samplers.CFGGuider(self.models[name])
        guider.set_conds(self.prompts[f"{name}_positive"], self.prompts["source_positive"])
        guider.set_cfg({"source": 1.0, "target": TARGET_CFG}[name])
        return record(guider, z, torch.stack([sigma, torch.zeros_like(sigma)]))[0]

    def both(self, zs, zt, sigma):
        return self.predict("source", zs, sigma), self.predict("target", zt, sigma)


def check(model, family, target_model=None, **prompts):
    """Our edit is the one-by-one edit, and what is tested matters."""
    ours = align(model, family, target_model=target_model, **prompts)
    latent = source_latent(family)
    draws = Draws(torch.randn(latent.shape, generator=torch.Generator().manual_seed(3)))
    denoiser = OneByOne(model, target_model or model, conds(family, **prompts))
    add_noise = model.get_model_object("model_sampling").noise_scaling
    x, sigmas = model.model.process_latent_in(latent), edit_sigmas(model, "normal", **STEPS)
    expected = model.model.process_latent_out(flow_edit(x, sigmas, denoiser, draws, add_noise, zeta=0.01))
    assert relative_error(ours, expected) <= EXACT
    return ours


@pytest.mark.parametrize("name", ["source_positive", "target_positive"])
def test_controlnets_areas_and_hooks(models, name):
    model = models["sd15"]
    plain = align(model, "sd15")
    controlled, area, hooked = prompt("sd15", name), prompt("sd15", "area"), prompt("sd15", name)
    controlled[0][1].update(control=small_controlnet(), control_apply_to_uncond=False)
    area[0][1].update(area=(4, 8, 4, 0), strength=0.9, set_area_to_bounds=False)
    hooks = comfy.hooks.create_hook_lora(lora_for(model, "sd15"), 1.0, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(hooked, hooks)
    for changed in (controlled, prompt("sd15", name) + area, hooked):
        assert relative_error(check(tiny_models.build("sd15"), "sd15", **{name: changed}), plain) > 1e-4


@pytest.mark.parametrize("apply_to", ["both", "positive", "negative"])
def test_tokens_take_the_source_for_a_negative_where_the_target_moves_away_from_it(models, apply_to):
    check(apply_tokens(models["sd3"], tokens_for("sd3"), strength=0.5, apply_to=apply_to), "sd3")


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_second_model(models, family):
    """It sees the target prompt and, to move away from it, the source prompt."""
    target = apply_tokens(models[family], tokens_for(family), strength=0.5, apply_to="positive")
    ours = check(models[family], family, target_model=target)
    assert relative_error(ours, align(models[family], family)) > 1e-4
    model = tiny_models.build(family)
    check(model, family, target_model=comfy.sd.load_lora_for_models(model, None, lora_for(model, family), 1.0, 0.0)[0])


def test_guidance_functions(models):
    """One that calls the model again, and one in place of ComfyUI's own."""
    model = models["sd15"]
    softer = model.clone()
    softer.set_model_sampler_cfg_function(
        lambda args: args["uncond"] + 0.7 * args["cond_scale"] * (args["cond"] - args["uncond"]),
        disable_cfg1_optimization=True,
    )
    for changed in (softer, PerturbedAttentionGuidance.execute(model, 2.0)[0]):
        assert relative_error(check(changed, "sd15"), align(model, "sd15")) > 1e-4


def test_equal_prompts_return_the_source(models):
    same = {"target_positive": prompt("sd3", "source_positive")}
    assert relative_error(align(models["sd3"], "sd3", **same), source_latent("sd3")) <= EXACT


def test_what_it_does_not_use_changes_nothing(models):
    ours = align(models["sd3"], "sd3")
    others = {"source_negative": prompt("sd3", "x"), "target_negative": prompt("sd3", "y"), "source_cfg": 3.0}
    assert torch.equal(align(models["sd3"], "sd3", **others), ours)


def test_three_predictions_a_step_in_one_batch_or_apart(models, monkeypatch):
    model, calls = models["sd3"], []
    handle = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    latent = {"samples": source_latent("sd3", batch=2)}
    required = type(model.model).memory_required

    def run(most, patched=model, **options):
        calls.clear()
        with monkeypatch.context() as patch:
            small = lambda self, shape, cond_shapes={}: required(self, shape) if shape[0] <= most else 1e30  # noqa: E731
            patch.setattr(type(model.model), "memory_required", small)
            return align(patched, "sd3", latent, n_max=2, **options), list(calls)

    one, batches = run(6)
    assert batches == [6] * 2
    for most, expected in ((5, [2, 4] * 2), (3, [2, 2, 2] * 2)):
        apart, batches = run(most)
        assert batches == expected
        assert relative_error(apart, one) <= EXACT
    assert run(6, target_cfg=1.0)[1] == [4] * 2
    assert run(6, apply_tokens(model, tokens_for("sd3")))[1] == [6] * 2
    assert run(6, apply_tokens(model, tokens_for("sd3"), apply_to="positive"))[1] == [2, 4] * 2
    handle.remove()


def test_its_steps_all_look_at_the_source(pack):
    (name,) = (name for name, method in METHODS.items() if method is FLOW_ALIGN)
    assert name == "FlowAlign, keeps more of the source"
    with pytest.raises(ValueError, match="n_min is 2, expected 0 with FlowAlign, whose every step looks at the source"):
        pack["SoftREPAFlowEditSampler"].execute(n_min=2, method=name)
    assert pack["SoftREPAFlowEditSampler"].execute(method=name).args[0].method.name == "FlowAlign"
    assert pack["SoftREPAFlowEditSampler"].execute(n_min=2).args[0].method.name == "FlowEdit"


def test_old_graphs_keep_their_meaning(pack):
    """The widget is the last one, and without a value it is FlowEdit."""
    for name in ("SoftREPAFlowEdit", "SoftREPAFlowEditSampler"):
        *_, last = (one for one in pack[name].GET_SCHEMA().inputs if one.io_type in ("INT", "FLOAT", "COMBO"))
        assert (last.id, last.optional, last.default) == ("method", True, "FlowEdit")
