"""The templates' files: complete, and with what ComfyUI's manager and its missing-model dialog read."""

import json
import re

import pytest
from comfyui_softrepa.softrepa import __version__
from PIL import Image
from softrepa_tests.conftest import ROOT

from tools.workflows import BLUEPRINTS, WORKFLOWS

FOLDER = ROOT / "workflows"
DIRECTORIES = {
    "CheckpointLoaderSimple": "checkpoints",
    "UNETLoader": "diffusion_models",
    "CLIPLoader": "text_encoders",
    "DualCLIPLoader": "text_encoders",
    "VAELoader": "vae",
}


def test_no_file_is_left_over():
    titles = {workflow.title for workflow in WORKFLOWS}
    assert {path.stem for path in FOLDER.glob("*.json")} == titles
    assert {path.stem for path in FOLDER.glob("*.jpg")} == titles
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == {workflow.name for workflow in WORKFLOWS}
    assert {path.stem for path in (ROOT / "subgraphs").glob("*")} == {blueprint.name for blueprint in BLUEPRINTS}


def test_listed_in_their_order():
    """The frontend lists them by the names of their files; what needs no download comes first."""
    titles = [workflow.title for workflow in WORKFLOWS]
    assert titles == sorted(titles)
    assert [title[3:] for title in titles[:3]] == [
        "Try it without a download",
        "Train and score without a download",
        "Edit without a download",
    ]


def test_what_a_note_bypasses_passes_something_on():
    """A bypassed node gives each output its first input of that type; without one, what needs it fails."""
    found = 0
    for workflow in WORKFLOWS:
        nodes = json.loads((FOLDER / f"{workflow.title}.json").read_text(encoding="utf-8"))["nodes"]
        text = " ".join(str(node["widgets_values"]) for node in nodes if node["type"] == "MarkdownNote")
        for title in re.findall(r"[Bb]ypass \*(.+?)\*", text):
            (node,) = (node for node in nodes if node.get("title") == title)
            assert {one["type"] for one in node["outputs"]} <= {one["type"] for one in node["inputs"]}
            found += 1
        assert text.lower().count("bypass ") == len(re.findall(r"[Bb]ypass \*", text))
    assert found


def test_thumbnails_differ():
    pictures = {(FOLDER / f"{workflow.title}.jpg").read_bytes() for workflow in WORKFLOWS}
    assert len(pictures) == len(WORKFLOWS)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_properties_and_thumbnail(workflow):
    graph = json.loads((FOLDER / f"{workflow.title}.json").read_text(encoding="utf-8"))
    for node in graph["nodes"]:
        if node["type"] == "MarkdownNote":
            continue
        properties = node["properties"]
        is_ours = node["type"].startswith("SoftREPA")
        assert properties["cnr_id"] == ("comfyui-softrepa" if is_ours else "comfy-core")
        if is_ours:
            assert properties["ver"] == __version__
        for model in properties.get("models", []):
            assert model["name"] in node["widgets_values"]
            assert model["url"].startswith("https://huggingface.co/") and model["url"].endswith(model["name"])
            assert model["directory"] == DIRECTORIES[node["type"]]
    loaders = [node for node in graph["nodes"] if node["type"] in DIRECTORIES]
    assert all(node["properties"]["models"] for node in loaders)
    with Image.open(FOLDER / f"{workflow.title}.jpg") as picture:
        assert picture.size == (768, 576)
