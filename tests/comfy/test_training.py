"""The training run on the tiny models: what it learns, leaves and refuses."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from comfy.model_base import BaseModel
from comfyui_softrepa.nodes import training as training_node
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.comfy.training.launch import PREVIEW_STEPS
from comfyui_softrepa.softrepa.comfy.training.memory_use import AdaptivePairs
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training import state as training_state
from comfyui_softrepa.softrepa.training.pairs import StepBatch
from comfyui_softrepa.softrepa.training.presets import RELATIVE
from comfyui_softrepa.softrepa.training.trainer import Trainer
from PIL import Image
from softrepa_tests import tiny_models
from softrepa_tests.learning import dataset, train
from softrepa_tests.sampling import sample

FAMILIES = ("sd15", "sdxl", "sd3")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_leaves_tokens_a_file_and_its_configuration(models, token_folder, family):
    tokens, losses, steps, path = train(models, family, filename_prefix="mine/run")
    assert steps == len(losses["loss"]) == 3
    saved = token_files.load(path)
    assert token_folder in Path(path).parents
    assert torch.equal(saved.tokens, tokens.tokens)
    assert (tokens.time_table is None) == (family == "sdxl")
    assert saved.metadata["steps"] == "3"
    config = json.loads(saved.metadata["training"])
    assert config["learning_rate"] == 1e-2
    assert config["denoising_weight"] == {"sd15": 10.0, "sdxl": 10.0, "sd3": 0.0}[family]
    assert tokens.count == 4
    assert tokens.blocks == {"sd15": ("down",), "sdxl": ("down", "mid"), "sd3": 5}[family]
    assert torch.isfinite(sample(apply_tokens(models[family], tokens), family, steps=1)).all()


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_one_seed_gives_one_result(models, token_folder, family):
    first = train(models, family)[0]
    second = train(models, family)[0]
    other = train(models, family, seed=1)[0]
    assert torch.equal(first.tokens, second.tokens)
    assert torch.equal(first.time_table, second.time_table)
    assert not torch.equal(first.tokens, other.tokens)


@pytest.mark.parametrize("family", FAMILIES)
def test_micro_batches_and_checkpointing_change_nothing(models, token_folder, family):
    whole = train(models, family, micro_batch=4, temperature=2.0, checkpointing=False)[0]
    single = train(models, family, micro_batch=1, temperature=2.0, checkpointing=True)[0]
    # AdamW turns rounding into a change where a gradient is nearly zero, so only the bulk can be compared
    assert (whole.tokens - single.tokens).abs().median() < 1e-5


def test_it_learns_what_it_is_trained_on(models, token_folder):
    losses = train(models, "sd3", steps=40, learning_rate=0.02, temperature=2.0, denoising_weight=1.0)[1]["loss"]
    still = train(models, "sd3", steps=40, learning_rate=0.0, temperature=2.0, denoising_weight=1.0)[1]["loss"]
    gain = sum(still[-10:]) - sum(losses[-10:])
    assert gain > 0.05 * sum(still[-10:])


def test_the_base_model_stays_as_it_was(models, token_folder, monkeypatch):
    for family in FAMILIES:
        weights = models[family].model.diffusion_model.state_dict()
        before = {key: value.clone() for key, value in weights.items()}
        options = dict(models[family].model_options["transformer_options"])
        train(models, family, steps=1)
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="broken"):
            patch.setattr(TrainableNetwork, "gradients", lambda *_: (_ for _ in ()).throw(RuntimeError("broken")))
            train(models, family, steps=1)
        after = models[family].model.diffusion_model.state_dict()
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert models[family].model_options["transformer_options"] == options


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), RuntimeError("MPS backend out of memory")])
def test_out_of_memory_halves_the_pairs(models, token_folder, monkeypatch, error):
    sizes = []
    gradients = TrainableNetwork.gradients

    def small_memory(self, rows, batch, micro_batch):
        sizes.append(micro_batch)
        if micro_batch > 3:
            raise error
        return gradients(self, rows, batch, micro_batch)

    monkeypatch.setattr(TrainableNetwork, "gradients", small_memory)
    assert train(models, "sd3", batch_size=4, micro_batch=16, steps=2)[2] == 2
    assert sizes == [1, 16, 8, 4, 2, 2]


def test_no_memory_for_one_pair_is_said(models, token_folder, monkeypatch):
    def no_memory(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(TrainableNetwork, "gradients", no_memory)
    with pytest.raises(SoftREPAError, match="expected enough for one image-caption pair of 64 x"):
        train(models, "sd3")
    assert list(token_folder.iterdir()) == []


def test_interrupted_runs_keep_what_they_learned(models, token_folder, monkeypatch):
    import comfy.model_management as memory

    done = []
    step = Trainer.step
    monkeypatch.setattr(
        Trainer, "step", lambda self, micro_batch: done.append(record := step(self, micro_batch)) or record
    )

    def interrupt():
        if len(done) == 2:
            raise memory.InterruptProcessingException

    monkeypatch.setattr(memory, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(memory.InterruptProcessingException):
        train(models, "sd3", steps=10)
    (path,) = token_folder.glob("*.safetensors")
    assert token_files.load(path).metadata["steps"] == "2"


def test_going_on_from_tokens(models, token_folder):
    first = train(models, "sd3", steps=1)[0]
    again = train(models, "sd3", steps=1, learning_rate=0.0, init_tokens=first)[0]
    assert torch.equal(first.tokens, again.tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 8}, "n_tokens is 8, expected 4 as in init_tokens"),
        ({"blocks": "3"}, "blocks is 3, expected 5 as in init_tokens"),
        ({"time_table": "off"}, "time_table is False, expected True as in init_tokens"),
    ],
)
def test_what_init_tokens_are_not_is_refused(models, token_folder, options, message):
    first = train(models, "sd3", steps=1)[0]
    with pytest.raises(SoftREPAError, match=message):
        train(models, "sd3", steps=1, init_tokens=first, **options)


def test_a_second_bank_is_not_left_behind_silently(models, token_folder):
    first = train(models, "sd3", steps=1)[0]
    banks = replace(first, negative_tokens=first.tokens)
    with pytest.raises(SoftREPAError, match="have a second bank, expected one"):
        train(models, "sd3", steps=1, init_tokens=banks)


def test_a_small_bucket_does_not_slow_the_rest(models):
    sizes = []
    pairs = AdaptivePairs(SimpleNamespace(gradients=lambda rows, batch, size: sizes.append(size)))
    for images in (4, 2, 4):
        pairs.gradients(torch.zeros(1, 1, 1), StepBatch.of_all(torch.zeros(images, 1), None, [None] * images, 0), 64)
    assert sizes == [16, 4, 16]


def test_previews_that_cannot_work_are_refused_early(models, token_folder):
    narrow = [[torch.zeros(1, 77, 768), {}]]
    previews = {"preview_positive": narrow, "preview_negative": narrow, "vae": ToyVAE()}
    with pytest.raises(SoftREPAError, match="preview_positive holds text of width 768, expected width 4096 for SD3"):
        train(models, "sd3", **previews)


TEACHES_NOTHING = r"temperature is 0\.07, far below this model's errors \(about \d\.\d\d\), so that comparing captions"


def test_a_dead_contrast_stops_before_the_first_step(models, token_folder):
    with pytest.raises(SoftREPAError, match=TEACHES_NOTHING) as caught:
        train(models, "sd3", on_no_contrast="stop")
    for advice in (f'preset "{RELATIVE}"', "temperature_mode relative with temperature 1", "a new run", '"go on"'):
        assert advice in str(caught.value)
    assert not list(token_folder.rglob("*.safetensors"))


def test_the_advice_works(models, token_folder):
    """Both of it; and a run that was told to go on cannot be gone on with by it."""
    losses = [
        train(models, "sd3", steps=2, on_no_contrast="stop", **advice)[1]["loss"]
        for advice in ({"preset": RELATIVE}, {"temperature_mode": "relative", "temperature": 1.0})
    ]
    assert losses[0] == losses[1]
    train(models, "sd3", steps=1, filename_prefix="told")
    with pytest.raises(SoftREPAError, match="resume: .* is of another run"):
        train(models, "sd3", steps=2, filename_prefix="told", resume=True, preset=RELATIVE)


def test_a_dead_contrast_is_said_where_it_goes_on(models, token_folder, caplog):
    train(models, "sd3", steps=1, on_no_contrast="go on")
    assert re.search(TEACHES_NOTHING, caplog.text)
    caplog.clear()
    train(models, "sd3", steps=1, temperature=2.0, on_no_contrast="stop")
    assert "teaches nothing" not in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_other_weight_dtypes(token_folder, dtype):
    with torch.inference_mode():
        model = tiny_models.build("sd3")
    tiny_models.store_in(model, dtype)
    tokens = train({"sd3": model}, "sd3", temperature=2.0)[0]
    assert torch.isfinite(tokens.tokens).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 9}, 'Dataset "toy" has 6 images of one size with different captions, expected at least'),
        ({"blocks": "7"}, "blocks is 7, expected at most the model's 6 layers"),
        ({"blocks": "down"}, 'blocks is "down", expected the number of joint blocks'),
        ({"dataset": dataset("sd15")}, 'Dataset "toy" has text of width 768, expected 4096 for SD3'),
        ({"temperature": 0.0}, "temperature is 0.0, expected more than 0"),
    ],
)
def test_refused_early(models, token_folder, monkeypatch, options, message):
    monkeypatch.setattr(TrainableNetwork, "gradients", lambda *_: pytest.fail("the network ran"))
    with pytest.raises(SoftREPAError, match=message):
        train(models, "sd3", **options)
    assert list(token_folder.iterdir()) == []


def test_a_model_with_tokens_is_refused(models, token_folder):
    tokens = train(models, "sd3", steps=1)[0]
    patched = {"sd3": apply_tokens(models["sd3"], tokens)}
    with pytest.raises(SoftREPAError, match="Model has soft tokens on it, expected the plain model"):
        train(patched, "sd3")


def test_blocks_without_a_gradient_are_refused(models, token_folder):
    model = models["sd3"].clone()
    model.set_model_patch_replace(
        lambda args, extra: {"txt": args["txt"], "img": args["img"]}, "dit", "double_block", 4
    )
    with pytest.raises(SoftREPAError, match="Soft block 4 gets no gradient, expected one in each"):
        train({"sd3": model}, "sd3")


class ToyVAE:
    """Decodes to the first three latent channels."""

    def decode(self, samples):
        return samples[:, :3].movedim(1, -1).sigmoid()


def test_what_a_person_sees_while_it_runs(models, comfy_folders, token_folder):
    data = dataset("sd3")
    data.validation = dataset("sd3", 9).train[6:]
    cond = [[torch.zeros(1, 77, 4096), {"pooled_output": torch.zeros(1, 2048)}]]
    previews = {"preview_positive": cond, "preview_negative": cond, "vae": ToyVAE(), "preview_every": 2}
    plain = train(models, "sd3", dataset=data, steps=4, filename_prefix="plain")[0]
    tokens = train(models, "sd3", dataset=data, steps=4, filename_prefix="seen", **previews)[0]
    assert torch.equal(plain.tokens, tokens.tokens)
    logs = comfy_folders / "output" / "softrepa_training" / "seen_00001"
    lines = (logs / "steps.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("step,timestep,loss,accuracy")
    assert [line.split(",")[0] for line in lines[1:]] == ["1", "2", "3", "4"]
    for name in ("step_000002.png", "step_000004.png", "curves.png"):
        with Image.open(logs / name) as picture:
            assert min(picture.size) >= 8
    curves = (logs / "curves.png").read_bytes()
    train(models, "sd3", dataset=data, steps=5, filename_prefix="seen", resume=True, **previews)
    assert (logs / "curves.png").read_bytes() != curves
    assert [line.split(",")[0] for line in (logs / "steps.csv").read_text().splitlines()[1:]] == [
        "1",
        "2",
        "3",
        "4",
        "5",
    ]


class VideoVAE(ToyVAE):
    """Gives frames."""

    def decode(self, samples):
        return super().decode(samples)[:, None]


@pytest.mark.parametrize("vae", [ToyVAE, VideoVAE])
def test_previews_cost_their_own_sampling(models, comfy_folders, token_folder, monkeypatch, vae):
    calls, apply_model = [], BaseModel.apply_model
    monkeypatch.setattr(
        BaseModel, "apply_model", lambda *args, **options: calls.append(1) or apply_model(*args, **options)
    )
    cond = [[torch.zeros(1, 77, 4096), {"pooled_output": torch.zeros(1, 2048)}]]
    previews = {"preview_positive": cond, "preview_negative": cond, "vae": vae(), "preview_every": 2}
    train(models, "sd3", steps=6, **previews)
    assert len([*(comfy_folders / "output" / "softrepa_training").rglob("step_*.png")]) == 3
    assert len(calls) == PREVIEW_STEPS * (1 + 3)  # the picture without tokens is made once


def test_held_out_figures_outlive_a_resume(models, comfy_folders, token_folder):
    data = dataset("sd3")
    data.validation = dataset("sd3", 9).train[6:]
    checkpoints = []
    for prefix, stops in (("whole", (4,)), ("parts", (3, 4))):
        for steps in stops:
            options = {"resume": True, "preview_every": 1, "checkpoint_every": 1}
            train(models, "sd3", dataset=data, steps=steps, filename_prefix=prefix, **options)
        path = comfy_folders / "output" / "softrepa_training" / f"{prefix}_00001.checkpoint.safetensors"
        checkpoints.append(training_state.load(path).held_out)
    whole, parts = checkpoints
    assert [step for step, *_ in whole] == [1, 2, 3, 4]
    assert parts == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": -1}, "micro_batch is -1, expected 0 or more"),
        ({"n_tokens": -2}, "n_tokens is -2, expected 0 or more"),
        ({"checkpoint_every": -1}, "checkpoint_every is -1, expected 0 or more"),
        ({"preview_every": 0}, "preview_every is 0, expected 1 or more"),
        ({"denoising_weight": -3.0}, "denoising_weight is -3, expected 0 or more, or -1"),
        ({"on_no_contrast": "maybe"}, 'on_no_contrast is "maybe", expected one of stop, go on'),
    ],
)
def test_numbers_that_no_widget_would_allow(models, token_folder, options, message):
    with pytest.raises(SoftREPAError, match=message):
        train(models, "sd3", **options)


def test_what_matters_stays_readable(models, token_folder, monkeypatch):
    said = []
    monkeypatch.setattr(training_node, "show_on_node", lambda node, text: said.append(text))
    data = dataset("sd3")
    data.validation = dataset("sd3", 9).train[6:]
    large = 2**63 - 1
    train(models, "sd3", dataset=data, steps=3, temperature=0.07, preview_every=1, seed=large)
    progress, *notices = said[-1].splitlines()
    assert progress.startswith("step 3/3")
    assert any(re.match(TEACHES_NOTHING, line) for line in notices)
    assert any(line.startswith("step 3, held out: loss") for line in notices)
    assert not any("could not be" in line for line in notices)


def test_previews_need_all_their_inputs(models, token_folder):
    with pytest.raises(SoftREPAError, match="preview_negative, vae is not connected, expected all of"):
        train(models, "sd3", preview_positive=[])
