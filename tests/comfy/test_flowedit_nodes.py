"""The FlowEdit nodes: their equal results, and the sentence for each wrong input."""

import comfy.nested_tensor
import comfy.samplers
import pytest
import torch
from comfy_extras.nodes_custom_sampler import (
    BasicScheduler,
    DisableNoise,
    RandomNoise,
    SamplerCustomAdvanced,
    SplitSigmas,
)
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.editing.flowedit import Draws
from softrepa_tests import tiny_models
from softrepa_tests.editing import Network, conds, paper_edit, sd3_schedule, source_latent
from softrepa_tests.sampling import guider, prompt, relative_error
from softrepa_tests.token_sets import tokens_for

LATENTS = {family: {"samples": source_latent(family)} for family in ("sd15", "sd3")}


@pytest.fixture
def flow_edit(pack, models):
    def run(family="sd3", model=None, latent=None, **options):
        values = conds(family) | {"seed": 3, "steps": 8, "n_max": 6, "source_cfg": 2.0, "target_cfg": 4.0} | options
        latent = LATENTS[family] if latent is None else latent
        return pack["SoftREPAFlowEdit"].execute(model or models[family], latent_image=latent, **values).args[0]

    return run


@pytest.fixture
def network_calls(models):
    """How often any of the tiny networks was called."""
    calls = []
    handles = [
        model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(1))
        for model in models.values()
    ]
    yield calls
    for handle in handles:
        handle.remove()


def test_defaults_are_the_papers(pack, models):
    values = {"latent_image": LATENTS["sd3"], "seed": 0, "steps": 50} | conds("sd3")
    ours = pack["SoftREPAFlowEdit"].execute(models["sd3"], **values).args[0]["samples"]
    noise = torch.randn(ours.shape, generator=torch.Generator().manual_seed(0))
    times = sd3_schedule(50)[-34:]
    expected = paper_edit(Network("sd3"), LATENTS["sd3"]["samples"], Draws(noise), times, conds("sd3"), 3.5, 13.5)
    assert relative_error(ours.double(), expected) <= 1e-5


def test_the_latent_keeps_what_it_carries(flow_edit):
    latent = LATENTS["sd3"] | {"noise_mask": torch.ones(1, 8, 8), "batch_index": [0], "downscale_ratio_spacial": 8}
    before = {key: value for key, value in latent.items()}
    out = flow_edit(latent=latent)
    assert set(out) == {"samples", "noise_mask", "batch_index"}
    assert latent == before
    assert torch.equal(latent["samples"], source_latent("sd3"))
    assert out["samples"].dtype == torch.float32
    half = flow_edit(latent=LATENTS["sd3"] | {"samples": source_latent("sd3").half()})
    assert half["samples"].dtype == torch.float16


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("with_target_model", [False, True])
def test_custom_sampling_gives_the_same(pack, models, flow_edit, family, with_target_model):
    mask = torch.zeros(2, 8, 8)
    mask[0, 2:6] = 1
    mask[1, :, 3:] = 1
    latent = {"samples": source_latent(family, batch=2), "noise_mask": mask}
    options = {"source_cfg": 2.0, "target_cfg": 4.0}
    if with_target_model:
        options["target_model"] = apply_tokens(models[family], tokens_for(family))
    (edit_guider,) = pack["SoftREPAFlowEditGuider"].execute(models[family], **conds(family), **options).args
    (sampler,) = pack["SoftREPAFlowEditSampler"].execute(n_min=2, n_avg=2).args
    (sigmas,) = BasicScheduler.execute(models[family], "normal", 8, 1.0).args
    sigmas = SplitSigmas.execute(sigmas, 2).args[1]
    (noise,) = RandomNoise.execute(3).args
    expected = flow_edit(family, latent=latent, n_min=2, n_avg=2, **options)["samples"]
    for _ in range(2):  # the guider is kept between runs of a graph
        out, denoised = SamplerCustomAdvanced.execute(noise, edit_guider, sampler, sigmas, latent).args
        assert torch.equal(out["samples"], expected)
        assert relative_error(denoised["samples"], expected) <= 1e-5
    outside = (mask == 0)[:, None].expand_as(expected)
    assert torch.equal(expected[outside], latent["samples"][outside])
    assert not torch.equal(expected[~outside], latent["samples"][~outside])


def refused(run, sentence, calls):
    calls.clear()
    with pytest.raises(ValueError, match=sentence):
        run()
    assert not calls, "the network ran before the refusal"


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n_max": 9}, "n_max is 9, expected at most steps, 8"),
        ({"n_min": 7}, "n_min is 7, expected at most n_max, 6"),
        (
            {"latent": {"samples": torch.zeros(1, 16, 8, 8)}},
            r"latent_image is empty \(all zeros\), expected an image, for example from VAE Encode",
        ),
        (
            {"latent": {"samples": torch.ones(1, 16, 3, 8, 8)}},
            r"latent_image is of shape \[1, 16, 3, 8, 8\], expected still images, \[batch, channels, height, width\]",
        ),
        (
            {"latent": {"samples": comfy.nested_tensor.NestedTensor([torch.ones(1, 16, 8, 8)])}},
            "latent_image is a nested latent, expected still images",
        ),
        ({"latent": LATENTS["sd15"]}, "latent_image has 4 channels, expected 16, as SD3 has"),
        (
            {"target_positive": prompt("sd3", "target", batch=2)},
            "target_positive is a batch of 2, expected 1 or 1, the number of images in latent_image",
        ),
        (
            {"latent": {"samples": source_latent("sd3", 3)}, "source_negative": prompt("sd3", "a", batch=2)},
            "source_negative is a batch of 2, expected 1 or 3",
        ),
    ],
)
def test_wrong_inputs(flow_edit, network_calls, options, sentence):
    refused(lambda: flow_edit(**options), sentence, network_calls)


def test_a_batch_of_prompts_for_a_batch_of_images(flow_edit):
    latent = {"samples": source_latent("sd3", batch=2)}
    both = prompt("sd3", "target", batch=2)
    out = flow_edit(latent=latent, target_positive=both)["samples"]
    context, extra = both[0]
    for index in range(2):
        single = [[context[index : index + 1], {"pooled_output": extra["pooled_output"][index : index + 1]}]]
        alone = {"samples": latent["samples"][index : index + 1], "batch_index": [index]}
        ours = flow_edit(latent=alone, target_positive=single)["samples"]
        assert relative_error(ours, out[index : index + 1]) <= 1e-5


def test_models_that_do_not_fit(flow_edit, models, network_calls):
    inpainting = tiny_models.build("sd15")
    inpainting.model.set_inpaint()
    name = "inpainting or image-conditioned BaseModel, expected a text-to-image model"
    refused(lambda: flow_edit("sd15", inpainting), f"model is an {name}", network_calls)
    refused(lambda: flow_edit("sd15", target_model=inpainting), f"target_model is an {name}", network_calls)
    edits_images = tiny_models.build("sd15")
    edits_images.model.model_config.unet_config["in_channels"] = 8
    refused(lambda: flow_edit("sd15", edits_images), f"model is an {name}", network_calls)
    sound = tiny_models.build("sd3")
    sound.model.latent_format = comfy.latent_formats.StableAudio1()
    refused(lambda: flow_edit("sd3", sound), "model is SD3, whose latents are video or sound", network_calls)
    refused(
        lambda: flow_edit("sd3", target_model=models["sd15"]),
        "target_model is BaseModel with SD15 latents, expected the family of model, SD3 with SD3 latents",
        network_calls,
    )


def test_foreign_partners(pack, models, network_calls):
    (edit_guider,) = pack["SoftREPAFlowEditGuider"].execute(models["sd3"], **conds("sd3")).args
    (sampler,) = pack["SoftREPAFlowEditSampler"].execute().args
    (noise,) = RandomNoise.execute(3).args
    sigmas = torch.tensor([0.8, 0.4, 0.0])

    def run(noise=noise, guider=edit_guider, sampler=sampler, sigmas=sigmas):
        return lambda: SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, LATENTS["sd3"])

    euler = comfy.samplers.sampler_object("euler")
    refused(run(sampler=euler), "sampler is KSAMPLER beside the FlowEdit Guider, expected the FlowEdit Sampler", [])
    refused(
        run(guider=guider(models["sd3"], "sd3")),
        "guider is CFGGuider beside the FlowEdit Sampler, expected the FlowEdit Guider",
        network_calls,
    )
    refused(run(noise=DisableNoise.execute().args[0]), "noise is all zeros, expected random noise", network_calls)
    for values, sentence in (
        ([0.8], "sigmas have 1 values, expected 2 or more"),
        ([0.8, 0.4], "sigmas end at 0.4, expected 0"),
        ([0.4, 0.8, 0.0], "sigmas rise or reach 0 before the end"),
        ([0.4, 0.0, 0.0], "sigmas rise or reach 0 before the end"),
    ):
        refused(run(sigmas=torch.tensor(values)), sentence, network_calls)
    (greedy,) = pack["SoftREPAFlowEditSampler"].execute(n_min=3).args
    refused(run(sampler=greedy), "n_min is 3, expected at most the number of steps in sigmas, 2", network_calls)


def test_nothing_to_run_returns_the_source(pack, models):
    (edit_guider,) = pack["SoftREPAFlowEditGuider"].execute(models["sd3"], **conds("sd3")).args
    (sampler,) = pack["SoftREPAFlowEditSampler"].execute().args
    (noise,) = RandomNoise.execute(3).args
    out, _ = SamplerCustomAdvanced.execute(noise, edit_guider, sampler, torch.tensor([]), LATENTS["sd3"]).args
    assert torch.equal(out["samples"], source_latent("sd3"))


def test_no_growth_over_many_edits(flow_edit):
    """Nothing of a run stays behind."""
    import gc

    counts = []
    for number in range(30):
        flow_edit("sd15", n_max=1, steps=2)
        if number % 10 == 9:
            gc.collect()
            counts.append(len(gc.get_objects()))
    assert max(counts) - min(counts) < 200, counts
