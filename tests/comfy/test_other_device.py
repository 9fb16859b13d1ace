"""Everything that runs on a GPU, on a device that refuses what a GPU refuses: the same values as on the CPU."""

import math
from contextlib import suppress

import pytest
import torch
from comfyui_softrepa.softrepa.comfy.editing.passes import Stack
from comfyui_softrepa.softrepa.comfy.tokens.patching import SoftTokenPatch, apply_tokens
from comfyui_softrepa.softrepa.comfy.training.pairs import PairNetwork
from comfyui_softrepa.softrepa.comfy.training.score import HeldOut, score
from comfyui_softrepa.softrepa.tokens import SoftTokens
from softrepa_tests import foreign
from softrepa_tests.editing import edit, source_latent
from softrepa_tests.learning import dataset, moved_by, same_training
from softrepa_tests.of_families import UNET_AND_JOINT
from softrepa_tests.other_device import DEVICE, built, other_device
from softrepa_tests.sampling import prompt, relative_error, sample
from softrepa_tests.tiny_models import HIDDEN, latent_shape, seeded
from softrepa_tests.token_sets import tokens_for

FAMILIES = ("sd15", "sdxl", "sd3")
EXACT = 1e-5
ACTING = {
    "as trained": [{}],
    "weaker": [{"strength": 0.5}],
    "in a window": [{"end_percent": 0.5}],
    "on one prompt": [{"apply_to": "positive"}],
    "second bank": [{"uncond_bank": "negative"}],
    "two sets": [{}, {"strength": 0.5, "apply_to": "negative"}],
}
ON_CPU = torch.zeros(3, 4)


def with_tokens(model, family: str, sets: list[dict]):
    for number, options in enumerate(sets):
        model = apply_tokens(model, tokens_for(family, seed=f"{number}", banks=True), **options)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sets", ACTING.values(), ids=ACTING)
def test_sampling(models, monkeypatch, family, sets):
    expected = sample(with_tokens(models[family], family, sets), family, steps=2)
    with other_device(monkeypatch) as device:
        ours = sample(with_tokens(built(family), family, sets), family, steps=2)
        assert ours.device == DEVICE
        assert max(device.copied_out, default=0) <= 1
        ours = ours.cpu()
    assert relative_error(ours, expected) <= EXACT
    assert relative_error(sample(models[family], family, steps=2), expected) > 1e-3


def text_width_tokens() -> SoftTokens:
    table = seeded((100, 5 * HIDDEN["sd3"]), "wide/table", 0.5)
    return SoftTokens.of(seeded((5, 2, 4096), "wide/tokens", 0.5), "sd3", 5, time_table=table)


def test_tokens_of_text_width(models, token_folder, monkeypatch):
    tokens = text_width_tokens()
    expected = sample(apply_tokens(models["sd3"], tokens), "sd3", steps=2)
    trained = moved_by(models["sd3"], "sd3", tokens)
    with other_device(monkeypatch):
        model = built("sd3")
        ours = sample(apply_tokens(model, tokens), "sd3", steps=2).cpu()
        same_training(moved_by(model, "sd3", tokens), trained)
    assert relative_error(ours, expected) <= EXACT


TRAINING = {
    "contrastive": {},
    "all kept": {"checkpointing": False},
    "recomputed": {"checkpointing": True},
    "hard negatives": {"preset": "hard negatives"},
    "agsm": {"preset": "AGSM", "hard_negatives": 1},
    "paper and guidance": {"preset": "paper and guidance", "guidance_scale": 2.0},
    "guided contrast": {"objective": "guided contrast", "guidance_scale": 2.0},
    "everything else": {
        "ema_decay": 0.9,
        "caption_dropout": 0.5,
        "gradient_clip": 1.0,
        "symmetric": True,
        "temperature_mode": "relative",
    },
}


@UNET_AND_JOINT
@pytest.mark.parametrize("options", TRAINING.values(), ids=TRAINING)
def test_training(models, token_folder, monkeypatch, family, options):
    start = tokens_for(family, banks=options.get("preset") == "AGSM")
    expected = moved_by(models[family], family, start, **options)
    with other_device(monkeypatch) as device:
        ours = moved_by(built(family), family, start, **options)
        # no caption and no layer's output leaves it; predictions with guidance do
        most = start.tokens.numel() * (2 if start.negative_tokens is not None else 1)
        predictions = math.prod((3, *latent_shape(family))) if "guidance_scale" in options else 0
        assert max(device.copied_out) <= max(most, predictions)
    same_training(ours, expected)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
@pytest.mark.parametrize("change", [foreign.drops_masks, foreign.has_no_backward])
def test_overrides_of_other_nodes(models, token_folder, monkeypatch, family, change):
    """They are asked what they do on the device."""
    sets, start = ACTING["weaker"], tokens_for(family)
    expected = sample(with_tokens(models[family], family, sets), family, steps=1)
    trained = moved_by(models[family], family, start)
    with other_device(monkeypatch):
        model = change(built(family))
        same_training(moved_by(model, family, start), trained)
        assert relative_error(sample(with_tokens(model, family, sets), family, steps=1).cpu(), expected) <= EXACT


class ToyVAE:
    """Decodes to the first three latent channels, wherever they lie."""

    def decode(self, samples):
        return samples[:, :3].movedim(1, -1).sigmoid().cpu()


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_previews_and_held_out_images(models, token_folder, monkeypatch, family):
    data = dataset(family)
    data.validation = dataset(family, 9).train[6:]
    cond = prompt(family, "positive", length=77)
    previews = {"preview_positive": cond, "preview_negative": cond, "vae": ToyVAE(), "preview_every": 1}
    start = tokens_for(family)
    expected = moved_by(models[family], family, start)
    said = []
    monkeypatch.setattr("comfyui_softrepa.nodes.training.show_on_node", lambda node, text: said.append(text))
    monkeypatch.setattr("comfyui_softrepa.softrepa.comfy.training.launch.PREVIEW_STEPS", 1)
    with other_device(monkeypatch):
        ours = moved_by(built(family), family, start, dataset=data, **previews)
    same_training(ours, expected)
    assert "held out: loss" in said[-1]
    assert "could not be" not in said[-1]


@pytest.mark.parametrize("family", FAMILIES)
def test_score(models, monkeypatch, family):
    sets = ACTING["weaker"]
    expected = score(with_tokens(models[family], family, sets), HeldOut(dataset(family), 3, 1, 0), (100, 900))
    with other_device(monkeypatch) as device:
        ours = score(with_tokens(built(family), family, sets), HeldOut(dataset(family), 3, 1, 0), (100, 900))
        assert max(device.copied_out) == 9  # the errors
    assert torch.equal(ours.retrieved, expected.retrieved)
    assert relative_error(ours.information, expected.information) <= 1e-4


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("forwards", ["one forward", "two forwards", "two models"])
def test_flowedit(models, monkeypatch, family, forwards):
    mask = torch.zeros(1, 8, 8)
    mask[:, 2:, 3:] = 1
    latent = {"samples": source_latent(family), "noise_mask": mask}
    if forwards == "two forwards":
        monkeypatch.setattr(Stack, "of", lambda *_: None)

    def edited(model):
        target = {"target_model": with_tokens(model, family, [{}])} if forwards == "two models" else {}
        source = model if target else with_tokens(model, family, [{}])
        return edit(source, family, latent, steps=6, n_max=3, n_min=1, n_avg=2, **target)

    expected = edited(models[family])
    with other_device(monkeypatch):
        ours = edited(built(family))
    assert relative_error(ours, expected) <= EXACT


def rows_on_cpu(monkeypatch):
    state = SoftTokenPatch.state

    def moved(self, *args, **more):
        found = state(self, *args, **more)
        found.rows = {place: rows.cpu() for place, rows in found.rows.items()}
        return found

    monkeypatch.setattr(SoftTokenPatch, "state", moved)


def tokens_left_on_cpu(monkeypatch):
    monkeypatch.setattr(SoftTokens, "to", lambda self, device: self)


def output_brought_to_cpu(monkeypatch):
    output = PairNetwork.output
    monkeypatch.setattr(PairNetwork, "output", lambda *args: output(*args).cpu())


@pytest.mark.parametrize("fault", [rows_on_cpu, tokens_left_on_cpu])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_faults_in_sampling_are_found(monkeypatch, fault, family):
    fault(monkeypatch)
    with pytest.raises(RuntimeError, match="expected all tensors on the same device"), other_device(monkeypatch):
        sample(with_tokens(built(family), family, [{}]), family, steps=1)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_faults_in_training_are_found(token_folder, monkeypatch, family):
    output_brought_to_cpu(monkeypatch)
    with pytest.raises(RuntimeError, match="expected all tensors on the same device"), other_device(monkeypatch):
        moved_by(built(family), family, tokens_for(family))


def test_faults_in_the_backward_pass_are_found(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * torch.ones(gradient.shape)

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        pytest.raises(RuntimeError, match="expected all tensors on the same device"),
        other_device(monkeypatch),
    ):
        Wrong.apply(torch.zeros(3, device=DEVICE, requires_grad=True)).sum().backward()


def test_what_was_refused_is_said_even_where_it_was_caught(monkeypatch):
    caught = suppress(RuntimeError)
    with pytest.raises(AssertionError, match="on the same device"), other_device(monkeypatch), caught:
        torch.zeros(3, device=DEVICE) + torch.zeros(3)


REFUSED = {
    "sum": lambda here: here + ON_CPU,
    "sum from the other side": lambda here: ON_CPU + here,
    "change of the CPU's": lambda here: ON_CPU.clone().add_(here),
    "a number of the CPU's changed": lambda here: torch.zeros(()).add_(here.sum()),
    "matrix product": lambda here: here @ ON_CPU.T,
    "concatenation": lambda here: torch.cat([here, ON_CPU]),
    "condition": lambda here: torch.where(ON_CPU > 0, here, here),
    "rows by index_select": lambda here: here.index_select(0, torch.tensor([0])),
    "table by index": lambda here: torch.nn.functional.embedding(torch.tensor([0]), here),
    "values put in": lambda here: here.clone().__setitem__(torch.tensor([0]), ON_CPU[:1]),
    "the CPU's by an index from here": lambda here: ON_CPU[torch.tensor([0], device=DEVICE)],
    "noise of the CPU's generator": lambda here: torch.randn(3, device=DEVICE, generator=torch.Generator()),
}


@pytest.mark.parametrize("action", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("inference", [False, True])
def test_what_cuda_refuses_is_refused(monkeypatch, action, inference):
    with torch.inference_mode(inference), other_device(monkeypatch) as device:
        here = torch.ones(3, 4).to(DEVICE)
        with pytest.raises(RuntimeError, match="expected (all tensors|a generator)"):
            action(here)
        assert len(device.refused) == 1
        device.refused.clear()


ALLOWED = {
    "a number": lambda here: here * torch.tensor(2.0),
    "index of the CPU": lambda here: here[torch.tensor([2, 0])],
    "list": lambda here: here[[2, 0], [1, 1]],
    "mask of the CPU": lambda here: here[ON_CPU[:, 0] == 0],
    "put by index": lambda here: here.clone().index_put_((torch.tensor([1]),), torch.tensor(7.0)),
    "made here": lambda here: here + torch.tensor([1.0, 2.0, 3.0, 4.0], device=here.device),
    "made like": lambda here: here + torch.ones_like(here) + here.new_zeros(4),
    "made from the CPU's": lambda here: here + torch.ones_like(ON_CPU, device=here.device),
    "copied": lambda here: torch.zeros_like(here).copy_(ON_CPU) + here,
    "changed by a view": lambda here: here.clone().view(12).unflatten(0, (3, 4)).mul_(2),
    "attention": lambda here: torch.nn.functional.scaled_dot_product_attention(here[None], here[None], here[None]),
    "numbers": lambda here: torch.tensor([here.sum().item(), *here[0].tolist(), float(here.max())]),
}


@pytest.mark.parametrize("action", ALLOWED.values(), ids=ALLOWED)
@pytest.mark.parametrize("inference", [False, True])
def test_what_cuda_allows_gives_the_cpus_values(monkeypatch, action, inference):
    with torch.inference_mode(inference):
        values = seeded((3, 4), "values", 1.0)
        with other_device(monkeypatch):
            found = action(values.to(DEVICE)).cpu()
        assert torch.allclose(found, action(values))


def test_views_are_inference_tensors_as_what_they_look_at(monkeypatch):
    with other_device(monkeypatch):
        made = torch.zeros(3, device=DEVICE)
        with torch.inference_mode(False):
            other = torch.zeros(3, device=DEVICE)
            assert made[1:].is_inference() and not other[1:].is_inference()
        assert made[1:].is_inference() and not other[1:].is_inference()


def test_an_alias_shares_memory(monkeypatch):
    with other_device(monkeypatch):
        weight = torch.zeros(3, 4, device=DEVICE)
        assert weight.is_inference()
        with torch.inference_mode(False):
            alias = torch.empty(0, device=DEVICE).set_(weight.untyped_storage(), 0, weight.shape, weight.stride())
            assert not alias.is_inference()
        weight[1:].view(8).add_(1)
        assert torch.equal(alias.cpu(), torch.tensor([[0.0], [1.0], [1.0]]).expand(3, 4))
