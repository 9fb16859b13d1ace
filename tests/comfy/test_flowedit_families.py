"""Edits on the transformers with rotary positions; of some of them latents have a time axis, of one frame."""

import math

import latent_preview
import pytest
import torch
from comfy.cli_args import LatentPreviewMethod
from comfy_extras.nodes_custom_sampler import BasicScheduler, RandomNoise, SamplerCustomAdvanced, SplitSigmas
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from comfyui_softrepa.softrepa.comfy.editing.flowedit import edit_sigmas
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.editing.flowedit import Draws
from comfyui_softrepa.softrepa.editing.methods import FLOW_ALIGN, METHODS
from softrepa_tests import tiny_models
from softrepa_tests.editing import Transformer, aligned_edit, conds, edit, paper_edit, source_latent
from softrepa_tests.of_families import EVERY_TRANSFORMER
from softrepa_tests.sampling import prompt, relative_error
from softrepa_tests.tiny_models import HAS_TIME_AXIS
from softrepa_tests.token_sets import tokens_for

EXACT = 1e-5
STEPS, N_MAX = 4, 3


@pytest.fixture(scope="module")
def networks():
    """Each built when it is asked for."""

    class Networks(dict):
        def __missing__(self, family: str):
            with torch.inference_mode():
                self[family] = Transformer(family)
            return self[family]

    return Networks()


def expected_edit(networks, family, latent, method=None, **options):
    network = networks[family]
    noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(3))
    times = edit_sigmas(network.model, "normal", STEPS, N_MAX).double()
    if method is FLOW_ALIGN:
        return aligned_edit(network, latent, Draws(noise), times, conds(family), 4.0, **options)
    return paper_edit(network, latent, Draws(noise), times, conds(family), 2.0, 4.0, **options)


@EVERY_TRANSFORMER
@pytest.mark.parametrize("options", [{"n_min": 1}, {"method": FLOW_ALIGN}], ids=["FlowEdit", "FlowAlign"])
def test_equals_the_papers(models, networks, family, options):
    latent = source_latent(family)
    ours = edit(models[family], family, steps=STEPS, n_max=N_MAX, **options)
    assert relative_error(ours.double(), expected_edit(networks, family, latent, **options)) <= EXACT
    assert relative_error(ours, latent) > 0.01


def test_where_the_documents_say_to_start(models):
    """At the noise at which SD3's 33 of 50 steps begin, and for Flux on the reference's schedule at 1024 pixels."""
    start = {"zimage": 33, "anima": 33, "chroma": 32, "qwenimage": 32, "krea2": 32, "hunyuanimage": 27, "lumina2": 25}
    for family, n_max in (start | {"sd3": 33, "flux2": 22}).items():
        begins = edit_sigmas(models[family], "normal", 50, 50).flip(0)  # by n_max
        assert (begins - 0.85).abs().argmin() == n_max, family
    times = torch.linspace(1, 1 / 28, 28)
    shifted = 1 / (1 + math.exp(-1.15) * (1 / times - 1))
    assert (edit_sigmas(models["flux"], "simple", 28, 28)[:-1] - shifted).abs().max() < 1e-3


def two_masks() -> torch.Tensor:
    """In pixels, with soft edges when it is resized."""
    mask = torch.zeros(2, 64, 64)
    mask[0, 20:44] = 1
    mask[1, :, 28:] = 1
    return mask


def masked(family: str, mask: torch.Tensor | None = None) -> dict:
    mask = two_masks() if mask is None else mask
    return {"samples": source_latent(family, batch=2), "noise_mask": mask}


def resized(mask: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
    """Each image's own mask, as ComfyUI does it for latents without a time axis."""
    small = torch.nn.functional.interpolate(mask[:, None], size=latent.shape[-2:], mode="bilinear")
    return small[:, :, None].expand_as(latent)


@pytest.mark.parametrize("family", HAS_TIME_AXIS)
@pytest.mark.parametrize("method", list(METHODS))
def test_stills_with_a_time_axis(pack, models, networks, family, method):
    """A batch of two with a mask each, by the node and by SamplerCustomAdvanced, and from latents without the axis."""
    mask = two_masks()[:, ::8, ::8]
    latent = masked(family, mask)
    values = {"source_cfg": 2.0, "target_cfg": 4.0} | conds(family)
    node = pack["SoftREPAFlowEdit"]
    more = {"seed": 3, "steps": STEPS, "n_max": N_MAX, "method": method}
    ours = node.execute(models[family], latent_image=latent, **values, **more).args[0]["samples"]
    samples, outside = latent["samples"], resized(mask, latent["samples"]) == 0
    assert torch.equal(ours[outside], samples[outside])
    options = {"method": METHODS[method], "mask": resized(mask, samples).double()}
    assert relative_error(ours.double(), expected_edit(networks, family, samples, **options)) <= EXACT
    assert ((ours != samples) | outside).float().mean() > 0.99

    (guider,) = pack["SoftREPAFlowEditGuider"].execute(models[family], **values).args
    (sampler,) = pack["SoftREPAFlowEditSampler"].execute(method=method).args
    sigmas = SplitSigmas.execute(*BasicScheduler.execute(models[family], "normal", STEPS, 1.0).args, 1).args[1]
    (noise,) = RandomNoise.execute(3).args
    out, denoised = SamplerCustomAdvanced.execute(noise, guider, sampler, sigmas, latent).args
    assert torch.equal(out["samples"], ours)
    assert relative_error(denoised["samples"], ours) <= EXACT

    flat = latent | {"samples": samples.squeeze(2)}
    assert torch.equal(node.execute(models[family], latent_image=flat, **values, **more).args[0]["samples"], ours)


def test_an_image_keeps_its_own_soft_mask(models):
    """Masks of pictures are not frames of one video, which ComfyUI would take the mean of."""
    latent = masked("anima")
    ours = edit(models["anima"], "anima", latent, n_max=2)
    soft = resized(two_masks(), ours)
    assert torch.equal(ours[soft == 0], latent["samples"][soft == 0])
    assert (ours != latent["samples"])[soft > 0].float().mean() > 0.99
    alone = {"samples": latent["samples"][1:], "noise_mask": two_masks()[1:], "batch_index": [1]}
    assert relative_error(edit(models["anima"], "anima", alone, n_max=2), ours[1:]) <= EXACT
    in_axes = latent | {"noise_mask": two_masks()[:, None, None]}
    assert torch.equal(edit(models["anima"], "anima", in_axes, n_max=2), ours)
    (gradual,) = DifferentialDiffusion.execute(models["anima"]).args
    other = edit(gradual, "anima", latent, n_max=2)
    assert torch.equal(other[soft == 0], latent["samples"][soft == 0])
    assert not torch.equal(other, ours)


def test_a_second_model_and_a_mask(models):
    latent = masked("anima")
    target = apply_tokens(models["anima"], tokens_for("anima"))
    ours = edit(models["anima"], "anima", latent, n_max=2, target_model=target)
    soft = resized(two_masks(), ours)
    assert torch.equal(ours[soft == 0], latent["samples"][soft == 0])
    assert relative_error(ours, edit(models["anima"], "anima", latent, n_max=2)) > 1e-4


def test_areas_and_masks_of_prompts(models):
    """In the part that the second prompt does not have, the edit of one step is that without it."""
    area, half = prompt("anima", "area"), prompt("anima", "half")
    area[0][1].update(area=(8, 4, 0, 4), strength=1.0, set_area_to_bounds=False)
    mask = torch.zeros(1, 64, 64)
    mask[:, :, 32:] = 1
    half[0][1].update(mask=mask, set_area_to_bounds=False, mask_strength=1.0)
    plain = edit(models["anima"], "anima", steps=1, n_max=1)
    for extra in (area, half):
        prompts = {"target_positive": prompt("anima", "target_positive") + extra}
        ours = edit(models["anima"], "anima", steps=1, n_max=1, **prompts)
        assert relative_error(ours[..., :4], plain[..., :4]) <= EXACT
        assert relative_error(ours[..., 4:], plain[..., 4:]) > 1e-3


@pytest.mark.parametrize("family", HAS_TIME_AXIS)
def test_previews(models, family, monkeypatch):
    """One picture a step, as ComfyUI makes it of the first image's one frame."""
    monkeypatch.setattr(latent_preview.args, "preview_method", LatentPreviewMethod.Latent2RGB)
    seen = []
    bar = type("Bar", (), {"update_absolute": lambda self, value, total, preview: seen.append((value, total, preview))})
    monkeypatch.setattr(latent_preview.comfy.utils, "ProgressBar", lambda steps: bar())
    callback = latent_preview.prepare_callback(models[family], 2)
    edit(models[family], family, {"samples": source_latent(family, batch=2)}, n_max=2, callback=callback)
    assert [(value, total, preview[1].size) for value, total, preview in seen] == [(1, 2, (8, 8)), (2, 2, (8, 8))]


def tiny_video():
    config = {
        "image_model": "wan2.1",
        "model_type": "t2v",
        "dim": 48,
        "in_dim": 16,
        "out_dim": 16,
        "ffn_dim": 48,
        "freq_dim": 16,
        "num_heads": 2,
        "num_layers": 1,
        "patch_size": (1, 2, 2),
        "window_size": (-1, -1),
        "qk_norm": True,
        "cross_attn_norm": True,
        "eps": 1e-6,
    }
    return tiny_models.with_network("WAN21_T2V", config)


def test_video_is_refused(models):
    """A model that makes it, though its latents are Qwen-Image's own, and latents of more frames than one."""
    video = tiny_video()
    assert type(video.model.latent_format) is type(models["qwenimage"].model.latent_format)
    with pytest.raises(ValueError, match="model is WAN21, whose latents are video or sound, expected a model of still"):
        edit(video, "qwenimage")
    with pytest.raises(ValueError, match="target_model is WAN21, whose latents are video or sound"):
        edit(models["qwenimage"], "qwenimage", target_model=video)
    two_frames = {"samples": torch.cat([source_latent("qwenimage")] * 2, dim=2)}
    with pytest.raises(ValueError, match="latent_image has 2 frames, expected 1: video cannot be edited"):
        edit(models["qwenimage"], "qwenimage", two_frames)
    with pytest.raises(
        ValueError, match=r"latent_image is of shape \[1, 16, 1, 8, 8\], expected still images, \[batch"
    ):
        edit(models["flux"], "flux", {"samples": source_latent("qwenimage")})
