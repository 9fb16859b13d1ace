"""The templates' files: complete, and with what ComfyUI's manager and its missing-model dialog read."""

import json

import pytest
from comfyui_softrepa.softrepa import __version__
from PIL import Image
from softrepa_tests.conftest import ROOT

from tools.workflow_descriptions import WORKFLOWS

FOLDER = ROOT / "workflows"


def test_no_file_is_left_over():
    titles = {workflow.title for workflow in WORKFLOWS}
    assert {path.stem for path in FOLDER.glob("*.json")} == titles
    assert {path.stem for path in FOLDER.glob("*.jpg")} == titles
    assert {path.stem for path in (FOLDER / "api").glob("*.json")} == {workflow.name for workflow in WORKFLOWS}


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
            assert model["directory"] == "checkpoints"
    checkpoints = [node for node in graph["nodes"] if node["type"] == "CheckpointLoaderSimple"]
    assert all(node["properties"]["models"] for node in checkpoints)
    with Image.open(FOLDER / f"{workflow.title}.jpg") as picture:
        assert picture.size == (768, 576)
