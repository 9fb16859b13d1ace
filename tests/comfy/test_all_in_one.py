"""The training node of earlier graphs, with all its settings in one: a template and a prompt of then mean the same."""

import json
import sys
from types import SimpleNamespace

import pytest
from softrepa_tests.conftest import ROOT

FOLDER = ROOT / "tests" / "data" / "all_in_one"
KINDS = {"INT": int, "FLOAT": float, "BOOLEAN": bool, "STRING": str, "COMBO": str}
NODE = "SoftREPATrain"


def of_the_node(nodes) -> dict:
    (found,) = (node for node in nodes if NODE in (node.get("type"), node.get("class_type")))
    return found


@pytest.fixture(scope="module")
def template() -> dict:
    """As the frontend saved it."""
    return of_the_node(json.loads((FOLDER / "template.json").read_text(encoding="utf-8"))["nodes"])


@pytest.fixture(scope="module")
def values() -> dict:
    """Of the prompt: what is no link."""
    inputs = of_the_node(json.loads((FOLDER / "prompt.json").read_text(encoding="utf-8")).values())["inputs"]
    return {name: value for name, value in inputs.items() if not isinstance(value, list)}


@pytest.fixture
def asked(monkeypatch, pack) -> list:
    """What the runs are asked for, which are not run."""
    seen = []

    def launch(model, dataset, say, inputs, *more):
        seen.append(inputs)
        return SimpleNamespace(tokens=None, records=[], path="nowhere")

    monkeypatch.setattr(sys.modules[pack[NODE].__module__], "launch", launch)
    return seen


def test_values_stand_in_the_places_of_their_widgets(pack, template, values):
    widgets = [entry for entry in pack[NODE].GET_SCHEMA().inputs if entry.io_type in KINDS]
    assert dict(zip((one.id for one in widgets), template["widgets_values"], strict=True)) == values
    for one in widgets:
        assert type(values[one.id]) is KINDS[one.io_type], one.id


def test_links_find_their_inputs_and_outputs(pack, template):
    schema = pack[NODE].GET_SCHEMA()
    sockets = [(one.id, one.io_type) for one in schema.inputs if one.io_type not in KINDS]
    assert [(one["name"], one["type"]) for one in template["inputs"]] == sockets
    assert [(one["name"], one["type"]) for one in template["outputs"]] == [
        (one.display_name, one.io_type) for one in schema.outputs
    ]


def test_the_values_mean_what_they_meant(pack, values, asked):
    pack[NODE].execute(None, None, **values)
    assert {name: getattr(asked[0], name) for name in values} == values
    assert asked[0].checkpointing is True


def test_it_goes_on_where_the_contrast_teaches_nothing(pack, asked):
    pack[NODE].execute(None, None)
    assert asked[0].on_no_contrast == "go on"
    pack["SoftREPATrainTokens"].execute(None, None)
    assert asked[1].on_no_contrast == "stop"


@pytest.mark.parametrize("given", [{}, {"checkpointing": True}, {"checkpointing": False}])
def test_checkpointing_is_on_unless_it_was_turned_off(pack, asked, given):
    pack[NODE].execute(None, None, **given)
    assert asked[0].checkpointing is given.get("checkpointing", True)


def test_it_is_not_offered_any_more(pack):
    assert pack[NODE].GET_SCHEMA().is_deprecated
    assert not pack["SoftREPATrainTokens"].GET_SCHEMA().is_deprecated


def test_options_are_those_of_the_training_node(pack, asked):
    (options,) = pack["SoftREPATrainingOptions"].execute(temperature=2.0, checkpointing="off").args
    pack["SoftREPATrainTokens"].execute(None, None, steps=7, options=options)
    assert (asked[0].steps, asked[0].config.temperature, asked[0].checkpointing) == (7, 2.0, "off")


def test_what_is_added_runs_when_model_and_dataset_are_given(pack):
    """A newcomer sets nothing else."""
    for entry in pack["SoftREPATrainTokens"].GET_SCHEMA().inputs:
        assert entry.optional or entry.id in ("model", "dataset") or entry.default is not None, entry.id
