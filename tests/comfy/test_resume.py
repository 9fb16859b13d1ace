"""Runs that stop and go on: the same tokens, bit for bit, and nothing lost or half-written on the way."""

import random
import signal
from pathlib import Path

import pytest
import torch
from comfyui_softrepa.nodes.tokens import SaveTokens
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy import folders
from comfyui_softrepa.softrepa.comfy.identity import model_identity
from comfyui_softrepa.softrepa.comfy.training.reports import LogFile
from comfyui_softrepa.softrepa.comfy.training.trainable import TrainableNetwork
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.families import FAMILIES
from comfyui_softrepa.softrepa.training import state as training_state
from comfyui_softrepa.softrepa.training.trainer import Trainer, new_tokens
from safetensors.torch import save_file
from softrepa_tests.composing import lora_for
from softrepa_tests.learning import dataset, train
from softrepa_tests.tiny_models import HIDDEN


@pytest.fixture
def runs(comfy_folders):
    """The checkpoints' folder."""
    return comfy_folders / "output" / folders.RUNS


FORMAT = {"format": training_state.FORMAT, "format_version": training_state.VERSION}
OPTIONS = {"temperature": 2.0, "ema_decay": 0.9, "caption_dropout": 0.5, "checkpoint_every": 0}


def same(first, second) -> bool:
    tables = (first.time_table, second.time_table)
    return torch.equal(first.tokens, second.tokens) and (tables == (None, None) or torch.equal(*tables))


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
@pytest.mark.parametrize("optimizer", ["AdamW", "Prodigy"])
def test_resumed_at_half(models, token_folder, family, optimizer):
    options = OPTIONS | {"optimizer": optimizer}
    whole = train(models, family, steps=4, filename_prefix="whole", **options)
    half = train(models, family, steps=2, filename_prefix="half", **options)
    rest = train(models, family, steps=4, filename_prefix="half", resume=True, **options)
    assert not same(half[0], whole[0])
    assert same(rest[0], whole[0])
    assert rest[1] == whole[1]
    assert rest[3] == half[3]
    assert same(token_files.load(rest[3]), whole[0])


def test_interrupted_in_the_middle_of_twenty_steps(models, token_folder, monkeypatch):
    import comfy.model_management as memory

    whole = train(models, "sd3", steps=25, filename_prefix="whole", **OPTIONS)
    gradients, moments, fuse, reached = TrainableNetwork.gradients, random.Random(3), [0], []

    def interrupted(self, *args):
        found = gradients(self, *args)
        fuse[0] -= 1
        if fuse[0] == 0:
            raise memory.InterruptProcessingException
        return found

    with monkeypatch.context() as patch:
        patch.setattr(TrainableNetwork, "gradients", interrupted)
        for _ in range(20):
            fuse[0] = moments.choice([2, 3, 3])  # the first is the pre-flight's: one step, or none, is finished
            with pytest.raises(memory.InterruptProcessingException):
                train(models, "sd3", steps=25, filename_prefix="broken", resume=True, **OPTIONS)
            path = token_folder / "broken_00001.safetensors"
            reached.append(int(token_files.load(path).metadata["steps"]) if path.exists() else 0)
    rest = train(models, "sd3", steps=25, filename_prefix="broken", resume=True, **OPTIONS)
    assert reached == sorted(reached)
    assert 5 <= reached[-1] < 25
    assert same(rest[0], whole[0])
    assert rest[1] == whole[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.5}, r"learning_rate was 0\.01, is 0\.5"),
        ({"seed": 3}, "seed was 0, is 3"),
        ({"init_tokens": new_tokens(FAMILIES["sd3"], HIDDEN["sd3"], 4, 5, True, 1, None)}, "init_tokens was None, is"),
        ({"n_tokens": 2}, "n_tokens was 4, is 2"),
        ({"guidance_weight": 1.0}, r"guidance_scale was None, is 4\.0.*guidance_weight was None, is 1\.0"),
        ({"dataset": dataset("sd3", 5)}, "dataset was"),
    ],
)
def test_another_configuration_is_refused(models, token_folder, change, message):
    train(models, "sd3", steps=1, filename_prefix="run")
    with pytest.raises(SoftREPAError, match=rf"run_00001\.checkpoint\.safetensors is of another run.*{message}"):
        train(models, "sd3", steps=2, filename_prefix="run", resume=True, **change)
    assert token_files.load(token_folder / "run_00001.safetensors").metadata["steps"] == "1"


def test_settings_that_came_later_are_no_part_of_a_run_without_them(models, token_folder, runs):
    """Or checkpoints of before them would be of another run."""
    train(models, "sd3", steps=1, filename_prefix="run")
    identity = training_state.load(runs / "run_00001.checkpoint.safetensors").identity
    later = {"negatives", "guidance_scale", "guidance_weight", "contrast", "min_timestep", "max_timestep"}
    assert not later & identity.keys()
    assert {"objective", "hard_negatives"} <= identity.keys()


def test_nothing_to_resume_starts_anew(models, token_folder):
    assert train(models, "sd3", steps=1, filename_prefix="fresh", resume=True)[2] == 1


def test_the_newest_run_of_the_prefix_is_resumed(models, token_folder):
    train(models, "sd3", steps=1, filename_prefix="a")
    newest = train(models, "sd3", steps=2, filename_prefix="a")[3]
    train(models, "sd3", steps=1, filename_prefix="a_b")
    again = train(models, "sd3", steps=3, filename_prefix="a", resume=True)
    assert (again[2], again[3]) == (3, newest)


def test_broken_checkpoints_are_named(models, token_folder, runs):
    train(models, "sd3", steps=1, filename_prefix="run")
    path = runs / "run_00001.checkpoint.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(SoftREPAError, match=r'Checkpoint "run_00001\.checkpoint\.safetensors" cannot be read'):
        train(models, "sd3", steps=2, filename_prefix="run", resume=True)


def test_a_full_disk_is_said_and_training_goes_on(models, token_folder, monkeypatch, caplog):
    save = training_state.save
    full = [True]

    def sometimes(state, path):
        if full[0]:
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(training_state, "save", sometimes)
    step = Trainer.step

    def freed(self, micro_batch):
        full[0] = self.step_index < 2
        return step(self, micro_batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", freed)
        tokens = train(models, "sd3", steps=4, checkpoint_every=1, filename_prefix="run")
    assert "step 1 could not be saved" in caplog.text
    assert "No space left on device" in caplog.text
    assert same(token_files.load(tokens[3]), tokens[0])
    full[0] = True
    with pytest.raises(SoftREPAError, match=r"could not be written.*No space left.*saved until now: step 0 of 1"):
        train(models, "sd3", steps=1, filename_prefix="other")
    assert not Path(token_folder / "other_00001.safetensors").exists()


def test_a_loss_that_is_no_number_keeps_what_was_learned(models, token_folder, monkeypatch):
    gradients = TrainableNetwork.gradients
    calls = []

    def poisoned(self, *args):
        errors, found = gradients(self, *args)
        calls.append(1)
        return (errors * float("nan") if len(calls) == 4 else errors), found

    monkeypatch.setattr(TrainableNetwork, "gradients", poisoned)
    with pytest.raises(SoftREPAError, match="The loss is nan at step 3, expected a number"):
        train(models, "sd3", steps=9, filename_prefix="run")
    assert token_files.load(token_folder / "run_00001.safetensors").metadata["steps"] == "2"


def test_what_led_to_no_number_does_not_replace_what_was_saved(models, token_folder):
    with pytest.raises(SoftREPAError, match=r"The (loss|gradient) is .* at step \d+, expected a number"):
        train(models, "sd3", steps=9, filename_prefix="run", optimizer="SGD", learning_rate=1e30, checkpoint_every=1)
    saved = token_files.load(token_folder / "run_00001.safetensors")
    state = training_state.load(folders.state_path(token_folder / "run_00001.safetensors"))
    assert saved.metadata["steps"] == str(state.step)
    assert all(value.isfinite().all() for key, value in state.tensors.items() if key.startswith("parameter/"))


def test_a_disk_that_is_really_full(models, token_folder):
    """The system refuses to write; libraries say so in words of their own."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(SoftREPAError, match=r"run_00001.*could not be written.*saved until now: step 0 of 2"):
            train(models, "sd3", steps=2, filename_prefix="run")
        with pytest.raises(SoftREPAError, match=r"mine_00001.*could not be written.*expected a folder with room"):
            SaveTokens.execute(new_tokens(FAMILIES["sd3"], HIDDEN["sd3"], 4, 5, True, 1, None), "mine")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(token_folder.rglob("*.safetensors")) == []


def test_other_encoders_are_another_run(models, token_folder):
    train(models, "sd3", steps=1, filename_prefix="run")
    longer = dataset("sd3")
    longer.encodings.identity = "with more text"
    with pytest.raises(SoftREPAError, match="encoders was seeded, is with more text"):
        train(models, "sd3", steps=2, filename_prefix="run", resume=True, dataset=longer)


def test_the_newest_run_of_the_same_configuration_is_resumed(models, token_folder):
    first = train(models, "sd3", steps=1, filename_prefix="run", seed=1)[3]
    train(models, "sd3", steps=1, filename_prefix="run", seed=2)
    again = train(models, "sd3", steps=2, filename_prefix="run", seed=1, resume=True)
    assert (again[2], again[3]) == (2, first)


def test_a_run_that_has_begun_keeps_its_name(models, token_folder, monkeypatch):
    step, inside = Trainer.step, []

    def another(self, micro_batch):
        if not inside:
            inside.append(1)
            inside.append(train(models, "sd3", steps=1, filename_prefix="race")[3])
        return step(self, micro_batch)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", another)
        outer = train(models, "sd3", steps=1, filename_prefix="race")[3]
    assert Path(outer).name == "race_00001.safetensors"
    assert Path(inside[1]).name == "race_00002.safetensors"


def test_a_checkpoint_without_a_part_is_named(models, token_folder, runs):
    train(models, "sd3", steps=1, filename_prefix="run")
    save_file({"records": torch.zeros(0, 6)}, runs / "run_00001.checkpoint.safetensors", FORMAT)
    with pytest.raises(
        SoftREPAError, match="lacks held_out, identity, optimizer, position, step, expected a whole one"
    ):
        train(models, "sd3", steps=2, filename_prefix="run", resume=True)


def test_fewer_steps_than_are_done_are_refused(models, token_folder):
    train(models, "sd3", steps=3, filename_prefix="run")
    with pytest.raises(SoftREPAError, match="steps is 2, expected at least the 3 that run_00001"):
        train(models, "sd3", steps=2, filename_prefix="run", resume=True)


def test_a_lost_token_file_is_written_again(models, token_folder):
    first = train(models, "sd3", steps=2, filename_prefix="run")
    Path(first[3]).unlink()
    again = train(models, "sd3", steps=2, filename_prefix="run", resume=True)
    assert same(token_files.load(again[3]), first[0])


def test_a_log_that_cannot_be_written_does_not_stop_a_run(models, token_folder, monkeypatch, caplog):
    def held(self, record, session):
        raise PermissionError("steps.csv is held by another program")

    monkeypatch.setattr(LogFile, "after", held)
    assert train(models, "sd3", steps=2)[2] == 2
    assert "step 2 could not be reported by LogFile (steps.csv is held by another program)" in caplog.text


def test_a_refused_run_leaves_the_shared_model_alone(models, token_folder):
    train(models, "sd3", steps=1, filename_prefix="run")
    with pytest.raises(SoftREPAError, match="of another run"):
        train(models, "sd3", steps=2, filename_prefix="run", resume=True, temperature=3.0)
    assert models["sd3"].model.current_patcher is None


def test_a_model_is_known_by_its_weights_and_loras_whatever_is_loaded(models):
    import comfy.model_management as memory
    import comfy.sd

    def with_lora(strength):
        return comfy.sd.load_lora_for_models(models["sd15"], None, lora_for(models["sd15"], "sd15"), strength, 0.0)[0]

    plain = model_identity(models["sd15"])
    whole, half = with_lora(1.0), with_lora(0.5)
    before = [model_identity(whole), model_identity(half)]
    assert len({plain, *before}) == 3
    for model in (whole, half, models["sd15"]):
        memory.load_models_gpu([model], force_full_load=True)
        assert [model_identity(models["sd15"]), model_identity(whole), model_identity(half)] == [plain, *before]
    assert model_identity(with_lora(0.5)) == before[1]
