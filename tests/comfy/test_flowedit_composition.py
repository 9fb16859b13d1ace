"""FlowEdit with what people put on conds and models: each prediction is the one ComfyUI's own guider would make."""

import comfy.conds
import comfy.hooks
import comfy.model_base
import comfy.patcher_extension
import comfy.samplers
import comfy.sd
import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete
from comfy_extras.nodes_pag import PerturbedAttentionGuidance
from comfy_extras.nodes_sag import SelfAttentionGuidance
from comfyui_softrepa.softrepa.comfy.editing.flowedit import edit_sigmas
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.editing.flowedit import Draws, flow_edit
from softrepa_tests import tiny_models
from softrepa_tests.composing import lora_for, small_controlnet
from softrepa_tests.editing import conds, edit, source_latent
from softrepa_tests.sampling import prompt, record, relative_error
from softrepa_tests.token_sets import tokens_for

EXACT = 1e-5
STEPS = {"steps": 6, "n_max": 4}


class OneByOne:
    """Each prediction by a guider of its own, loaded and cleaned up for that prediction alone."""

    def __init__(self, model, target_model, prompts):
        self.models, self.prompts = {"source": model, "target": target_model}, prompts

    def predict(self, name, z, sigma):
        guider = comfy.samplers.CFGGuider(self.models[name])
        guider.set_conds(self.prompts[f"{name}_positive"], self.prompts[f"{name}_negative"])
        guider.set_cfg({"source": 2.0, "target": 4.0}[name])
        return record(guider, z, torch.stack([sigma, torch.zeros_like(sigma)]))[0]

    def both(self, zs, zt, sigma):
        return self.predict("source", zs, sigma), self.predict("target", zt, sigma)

    def target(self, zt, sigma):
        return self.predict("target", zt, sigma)


def expected_edit(model, family, latent=None, target_model=None, n_min=0, **prompts):
    latent = source_latent(family) if latent is None else latent
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    denoiser = OneByOne(model, target_model or model, conds(family, **prompts))
    sigmas = edit_sigmas(model, "normal", **STEPS)
    sampling = model.get_model_object("model_sampling")
    out = flow_edit(
        model.model.process_latent_in(latent), sigmas, denoiser, Draws(noise), sampling.noise_scaling, n_min
    )
    return model.model.process_latent_out(out)


def check(model, family, latent=None, **options):
    """Our edit is the one-by-one edit, and the thing under test matters."""
    ours = edit(model, family, None if latent is None else {"samples": latent}, **STEPS, **options)
    assert relative_error(ours, expected_edit(model, family, latent, **options)) <= EXACT
    return ours


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_areas_stay_in_their_pair(models, family):
    area, masked = prompt(family, "area"), prompt(family, "masked")
    area[0][1].update(area=(4, 8, 4, 0), strength=0.9, set_area_to_bounds=False)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    masked[0][1].update(mask=mask, set_area_to_bounds=False, mask_strength=0.7)
    plain = edit(models[family], family, **STEPS)
    for name, extra in (("source_positive", area), ("target_positive", area + masked)):
        ours = check(models[family], family, **{name: prompt(family, name) + extra})
        assert relative_error(ours, plain) > 1e-3


@pytest.mark.parametrize("n_min", [0, 2])
def test_controlnet_on_one_pair_or_both(models, n_min):
    plain = edit(models["sd15"], "sd15", n_min=n_min, **STEPS)
    shared = small_controlnet()
    for names in (("target_positive",), ("source_positive", "target_positive", "target_negative")):
        prompts = {name: prompt("sd15", name) for name in names}
        for cond in prompts.values():
            cond[0][1].update(control=shared, control_apply_to_uncond=len(names) == 1)
        ours = check(models["sd15"], "sd15", n_min=n_min, **prompts)
        assert relative_error(ours, plain) > 1e-4


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("names", [("target_positive",), ("source_positive", "target_positive")])
def test_conditioning_hooks_with_a_schedule(family, names):
    model = tiny_models.build(family)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    prompts = {}
    for strength, name in enumerate(names, 1):
        hooks = comfy.hooks.create_hook_lora(lora_for(model, family), float(strength), 0.0)
        frames = comfy.hooks.HookKeyframeGroup()
        frames.add(comfy.hooks.HookKeyframe(strength=1.0, start_percent=0.0))
        frames.add(comfy.hooks.HookKeyframe(strength=0.2, start_percent=0.6))
        hooks.set_keyframes_on_hooks(frames)
        prompts[name] = comfy.hooks.set_hooks_for_conditioning(prompt(family, name), hooks)
    ours = check(model, family, **prompts)
    assert relative_error(ours, edit(model, family, **STEPS)) > 1e-4
    after = model.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_timestep_ranges(models):
    late = prompt("sd3", "late")
    late[0][1].update(start_percent=0.5, end_percent=1.0)
    early = prompt("sd3", "target_positive")
    early[0][1].update(start_percent=0.0, end_percent=0.5)
    check(models["sd3"], "sd3", target_positive=early + late)


@pytest.mark.parametrize(("family", "strength"), [("sd15", 0.5), ("sd3", 1.0)])
@pytest.mark.parametrize("apply_to", ["both", "positive", "negative"])
def test_tokens_play_their_roles_in_both_pairs(models, family, strength, apply_to):
    model = apply_tokens(models[family], tokens_for(family), strength=strength, apply_to=apply_to)
    check(model, family, n_min=1)
    area = prompt(family, "area")
    area[0][1].update(area=(4, 8, 4, 0), set_area_to_bounds=False)
    check(model, family, target_positive=prompt(family, "target_positive") + area)


def test_guidance_functions_and_their_passes(models):
    """A custom guidance, one that calls the model again, and one that keeps attention maps between calls."""
    model = apply_tokens(models["sd15"], tokens_for("sd15"), strength=0.5, apply_to="positive")
    plain = edit(model, "sd15", **STEPS)
    softer = model.clone()
    softer.set_model_sampler_cfg_function(
        lambda args: args["uncond"] + 0.7 * args["cond_scale"] * (args["cond"] - args["uncond"])
    )
    pag = PerturbedAttentionGuidance.execute(model, 2.0)[0]
    sag = SelfAttentionGuidance.execute(model, 0.5, 2.0)[0]
    # the middle block's attention must be large enough to be a picture
    latent = source_latent("sd15", size=(16, 16))
    for changed, x in ((softer, None), (pag, None), (sag, latent)):
        ours = check(changed, "sd15", x)
        reference = plain if x is None else edit(model, "sd15", {"samples": x}, **STEPS)
        assert relative_error(ours, reference) > 1e-4


def test_a_wrapper_of_another_pack_sees_source_and_target(models):
    seen = []

    def wrapper(executor, x, timestep, model_options={}, seed=None):
        seen.append((len(x), sorted(executor.class_obj.conds)))
        return executor(x, timestep, model_options, seed) * 0.9

    model = models["sd15"].clone()
    model.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "other", wrapper)
    ours = edit(model, "sd15", **STEPS)
    assert seen == [(1, ["negative", "positive"])] * 8
    assert relative_error(ours, expected_edit(model, "sd15")) <= EXACT


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("n_min", [0, 2])
def test_target_model_with_tokens(models, family, n_min):
    target = apply_tokens(models[family], tokens_for(family), strength=0.5, apply_to="positive")
    ours = check(models[family], family, target_model=target, n_min=n_min)
    assert relative_error(ours, edit(models[family], family, n_min=n_min, **STEPS)) > 1e-4
    back = edit(target, family, target_model=models[family], n_min=n_min, **STEPS)
    assert relative_error(back, expected_edit(target, family, target_model=models[family], n_min=n_min)) <= EXACT


@pytest.mark.parametrize(
    ("family", "which"), [("sd15", "source"), ("sd15", "target"), ("sd15", "both"), ("sd3", "both")]
)
def test_loras_of_two_models_on_one_checkpoint(family, which):
    """Clones of one network share its weights, patched for one of them at a time."""
    model = tiny_models.build(family)
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    lora = lora_for(model, family)
    changed = {strength: comfy.sd.load_lora_for_models(model, None, lora, strength, 0.0)[0] for strength in (1.0, 0.5)}
    source = model if which == "target" else changed[0.5]
    target = model if which == "source" else changed[1.0]
    hooks = comfy.hooks.create_hook_lora(lora, 2.0, 0.0)
    hooked = comfy.hooks.set_hooks_for_conditioning(prompt(family, "source_positive"), hooks)
    for prompts in ({}, {"source_positive": hooked}):
        ours = check(source, family, target_model=target, **prompts)
        assert relative_error(ours, edit(source, family, **STEPS, **prompts)) > 1e-4
    edit(model, family, **STEPS)  # loads the plain clone, as the next graph would
    after = model.model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_target_model_with_another_sampling_object():
    """A model's sampling object belongs to the clone; the network under it is shared."""
    model = tiny_models.build("sd15")
    (other,) = ModelSamplingDiscrete().patch(model, "v_prediction", False)
    for source, target in ((model, other), (other, model)):
        ours = check(source, "sd15", target_model=target)
        assert relative_error(ours, edit(source, "sd15", **STEPS)) > 1e-3


def test_target_model_of_another_checkpoint(models):
    other = tiny_models.build("sd15")
    for weight in other.model.diffusion_model.parameters():
        weight.mul_(1.1)
    control = prompt("sd15", "target_positive")
    control[0][1].update(control=small_controlnet(), control_apply_to_uncond=True)
    for prompts in ({}, {"target_positive": control}):
        ours = check(models["sd15"], "sd15", target_model=apply_tokens(other, tokens_for("sd15")), **prompts)
        assert relative_error(ours, edit(models["sd15"], "sd15", **STEPS, **prompts)) > 1e-4


def test_differential_diffusion(models):
    """Where the mask is 1 the edit runs in every step, where it is 0 never, between later the lower it is."""
    (model,) = DifferentialDiffusion.execute(models["sd3"]).args
    latent, mask = source_latent("sd3"), torch.linspace(0, 1, 8).expand(1, 8, 8)
    ours = edit(model, "sd3", {"samples": latent, "noise_mask": mask}, **STEPS)
    assert torch.equal(ours[..., 0], latent[..., 0])
    plain = edit(models["sd3"], "sd3", {"samples": latent, "noise_mask": mask}, **STEPS)
    assert relative_error(ours, plain) > 1e-3
    everywhere = edit(model, "sd3", {"samples": latent, "noise_mask": torch.ones(1, 8, 8)}, **STEPS)
    assert relative_error(everywhere, edit(models["sd3"], "sd3", {"samples": latent}, **STEPS)) <= EXACT


def tiny_flux() -> ModelPatcher:
    config = {
        "image_model": "flux",
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "vec_in_dim": 32,
        "context_in_dim": 48,
        "hidden_size": 64,
        "mlp_ratio": 2.0,
        "num_heads": 2,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [8, 12, 12],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
        "txt_ids_dims": [],
    }
    model_config = comfy.supported_models.Flux(dict(config))
    model_config.unet_config.update(config)
    model_config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.Flux(model_config, device="cpu")
    for name, tensor in model.diffusion_model.state_dict().items():
        std = torch.Size(tensor.shape[1:]).numel() ** -0.5 if tensor.ndim > 1 else 0.02
        tensor.copy_(tiny_models.seeded(tensor.shape, f"flux/{name}", std, 1.0 if "norm" in name else 0.0))
    return ModelPatcher(model, tiny_models.CPU, tiny_models.CPU)


def test_flux_with_embedded_guidance():
    """Guidance differs between the pairs as a cond's own value: cfg 1 and one forward for both."""
    model, calls = tiny_flux(), []
    model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))

    def flux_prompt(name, guidance):
        extra = {"pooled_output": tiny_models.seeded((1, 32), f"{name}/pooled", 1.0), "guidance": guidance}
        return [[tiny_models.seeded((1, 20, 48), name, 1.0), extra]]

    def prompts(target_guidance):
        return {
            "source_positive": flux_prompt("a", 1.5),
            "source_negative": flux_prompt("n", 1.5),
            "target_positive": flux_prompt("b", target_guidance),
            "target_negative": flux_prompt("n", target_guidance),
        }

    latent = tiny_models.seeded((1, 16, 8, 8), "flux/latent", 1.0)
    run = {"family": "sd3", "latent": {"samples": latent}, "steps": 6, "n_max": 5, "source_cfg": 1.0, "target_cfg": 1.0}
    ours = edit(model, **run, **prompts(5.5))
    assert calls == [2] * 5
    assert relative_error(edit(model, **run, **prompts(1.5)), ours) > 1e-4

    class Denoiser(OneByOne):
        def predict(self, name, z, sigma):
            guider = comfy.samplers.CFGGuider(model)
            guider.set_conds(self.prompts[f"{name}_positive"], self.prompts[f"{name}_negative"])
            return record(guider, z, torch.stack([sigma, torch.zeros_like(sigma)]))[0]

    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    sigmas = edit_sigmas(model, "normal", 6, 5)
    x, sampling = model.model.process_latent_in(latent), model.get_model_object("model_sampling")
    expected = flow_edit(x, sigmas, Denoiser(model, model, prompts(5.5)), Draws(noise), sampling.noise_scaling)
    assert relative_error(ours, model.model.process_latent_out(expected)) <= EXACT
