"""One list of inputs: what the nodes show, what the command line takes and what a file says are the same."""

from dataclasses import fields

import pytest
from comfyui_softrepa.softrepa.comparing.inputs import CompareInputs
from comfyui_softrepa.softrepa.configuration import ALL_KINDS, check_inputs
from comfyui_softrepa.softrepa.data.inputs import DatasetInputs
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training.inputs import DEFAULTS, KINDS, NOT_IN_THE_FILE, ScoreInputs, TrainingInputs

IO_TYPES = {int: {"INT"}, float: {"FLOAT"}, bool: {"BOOLEAN"}, str: {"STRING", "COMBO"}}
OTHER_KIND = {int: 1.5, float: "1", bool: 1, str: 1}
CONNECTED = {
    *("model", "dataset", "options", "folder", "clip", "vae"),
    *("tokens", "judge", "prompts_from", "other_model", "second_model", "second_tokens"),
}
"""What comes from elsewhere; the training node's `vae` is for its previews."""
WITHOUT_A_WIDGET = {
    *("weight_decay", "minimum_learning_rate", "schedule_steps", "restart_after"),
    *("agsm_temperature", "positive_guidance", "negative_guidance", "teacher_decay"),
}
"""Constants of the papers, which the command line takes."""
TRAINING = ("SoftREPATrainTokens", "SoftREPATrainingOptions")
NODES = {
    TRAINING: TrainingInputs,
    ("SoftREPADataset",): DatasetInputs,
    ("SoftREPAScore",): ScoreInputs,
    ("SoftREPACompare",): CompareInputs,
}


def inputs_of(pack, names: tuple[str, ...]) -> dict:
    """Of these nodes together; none has an input of another."""
    entries = [entry for name in names for entry in pack[name].GET_SCHEMA().inputs]
    found = {entry.id: entry for entry in entries}
    assert len(found) == len(entries)
    return found


@pytest.mark.parametrize("name", NODES, ids=" and ".join)
def test_every_field_is_an_input_of_its_node(pack, name):
    shown, known = set(inputs_of(pack, name)), {field.name for field in fields(NODES[name])}
    assert shown - known <= CONNECTED
    assert known - shown == (WITHOUT_A_WIDGET if name == TRAINING else set())


def test_graphs_that_were_saved_hold_the_options_in_this_order(pack):
    """What came later stands behind what was there."""
    saved = [
        *("n_tokens", "blocks", "time_table", "init_tokens"),
        *("objective", "temperature_mode", "temperature", "logit_scale", "symmetric", "denoising_weight"),
        *("guidance_scale", "negatives", "hard_negatives", "caption_dropout"),
        *("optimizer", "accumulation", "warmup_steps", "gradient_clip", "ema_decay"),
        *("checkpointing", "micro_batch", "checkpoint_every", "on_no_contrast", "preview_cfg"),
        *("contrast", "min_timestep", "max_timestep", "guidance_weight"),
    ]
    assert list(inputs_of(pack, TRAINING[1:]))[: len(saved)] == saved


@pytest.mark.parametrize("name", NODES, ids=" and ".join)
def test_defaults_and_kinds_are_the_lists(pack, name):
    entries = inputs_of(pack, name)
    for field in fields(NODES[name]):
        if field.default is None or field.name in WITHOUT_A_WIDGET:
            continue
        entry = entries[field.name]
        assert entry.default == field.default, field.name
        assert type(entry.default) is type(field.default), field.name
        assert entry.io_type in IO_TYPES[type(field.default)], field.name
        assert getattr(entry, "options", None) is None or field.default in entry.options
        assert entry.optional == (field.name not in NODES[name].REQUIRED), field.name


def test_the_command_line_takes_what_the_nodes_take(pack):
    taken = inputs_of(pack, TRAINING).keys() | inputs_of(pack, ("SoftREPADataset",)).keys()
    taken -= CONNECTED
    assert taken - ALL_KINDS.keys() == {"preview_positive", "preview_negative"}  # preview_prompt makes both
    check_inputs({name: DEFAULTS[name] for name in KINDS})
    for name, kind in KINDS.items():
        with pytest.raises(SoftREPAError, match=rf"CONFIG: {name} is .*, expected a value of type {kind.__name__}\."):
            check_inputs({name: OTHER_KIND[kind]})


@pytest.mark.parametrize("given", [{}, {"preset": "AGSM"}, {"denoising_weight": 2.0, "temperature": 1, "blocks": "3"}])
def test_what_a_file_says_makes_the_same_run(given):
    inputs = TrainingInputs(**given, micro_batch=3, resume=True)
    said = inputs.in_the_file()
    check_inputs(said)
    again = TrainingInputs(**said)
    assert again.config == inputs.config
    assert again.in_the_file() == said
    assert set(NOT_IN_THE_FILE) == DEFAULTS.keys() - said.keys() - {"init_tokens"}
    assert not {"micro_batch", "resume", "preset"} & said.keys()
