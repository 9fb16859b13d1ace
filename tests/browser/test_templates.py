"""Every template as a person meets it: found, opened, run."""

from itertools import combinations

import pytest
from comfyui_softrepa.softrepa.training.presets import RELATIVE
from softrepa_tests.conftest import ROOT

from tools.frontend import read_graph
from tools.workflow_descriptions import WORKFLOWS

SMALL = {
    "EmptyLatentImage": {"width": 128, "height": 128},
    "EmptySD3LatentImage": {"width": 128, "height": 128},
    "ImageScale": {"width": 96, "height": 96},
    "MaskComposite": {"x": 32, "y": 32},
    "SolidMask": {"width": 40, "height": 40},
    "KSampler": {"steps": 3},
    "SoftREPACompare": {"prompts": "a cat\na dog", "seeds": "0", "width": 128, "height": 128, "steps": 2},
    "SoftREPADataset": {"resolution": 64},
    "SoftREPAFlowEdit": {"steps": 4, "n_max": 3},
    "SoftREPAScore": {"batch_size": 2, "batches": 1, "timesteps": "500,900"},
    "SoftREPATrainTokens": {"steps": 4, "batch_size": 2, "preview_every": 2, "preset": RELATIVE},
}
WIDTH_OF_PICTURE = """card => {
    while (!card.querySelector('img')) card = card.parentElement
    return card.querySelector('img').naturalWidth
}"""
RUN = {
    "small_world": ("Save Image",),
    "text_to_image_sd15": ("Save Image",),
    "text_to_image_sd3": ("Save Image",),
    "flowedit_sd3": ("Save Image",),
    "flowedit_sd3_mask": ("Save Image",),
    "train_sd3": ("Plot Loss Graph", "Preview SoftREPA Tokens"),
    "score_sd3": ("Score without tokens", "Score with tokens"),
    "compare_sd3": ("Compare Tokens",),
    "convert_tokens": ("Preview SoftREPA Tokens",),
}
"""Nodes that show pictures after a run. SDXL's smallest checkpoint is too large to make up."""
PICTURED = """titles => titles.every(title => app.graph._nodes.some(
    node => node.title === title && (node.imgs ?? []).some(image => image.naturalWidth > 1)
))"""


def overlaps(nodes: list[dict]) -> list[tuple[str, str]]:
    return [(first["title"], second["title"]) for first, second in combinations(nodes, 2) if overlap(first, second)]


def overlap(first: dict, second: dict) -> bool:
    """Of two nodes with their titles."""
    return all(
        first["pos"][axis] - lift < second["pos"][axis] + second["size"][axis]
        and second["pos"][axis] - lift < first["pos"][axis] + first["size"][axis]
        for axis, lift in ((0, 0), (1, 30))
    )


def comparable(prompt: dict) -> dict:
    return {
        key: (node["class_type"], node["_meta"]["title"], {k: v for k, v in node["inputs"].items() if k != "upload"})
        for key, node in prompt.items()
    }


def test_listed_with_their_pictures(frontend):
    frontend.browse_templates()
    frontend.page.wait_for_timeout(1000)
    frontend.screenshot("templates")
    for workflow in WORKFLOWS:
        card = frontend.page.get_by_text(workflow.title, exact=True).first
        card.scroll_into_view_if_needed()
        frontend.page.wait_for_timeout(500)
        assert card.evaluate(WIDTH_OF_PICTURE) == 768, workflow.title


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_opens(frontend, info, workflow):
    frontend.open_template(workflow.title)
    frontend.screenshot(f"template_{workflow.name}")
    nodes = frontend.nodes()
    assert len(nodes) == len(workflow.nodes) + 1  # and the note
    assert [node for node in nodes if not node["known"] or node["wrong"]] == []
    assert overlaps(nodes) == []
    assert not frontend.page.get_by_text("errors found").count()
    twin = read_graph(ROOT / "workflows" / "api" / f"{workflow.name}.json")
    assert comparable(frontend.prompt()) == comparable(twin)
    for node in twin.values():
        known = info[node["class_type"]]["input"]
        assert node["inputs"].keys() <= {**known.get("required", {}), **known.get("optional", {})}.keys()


@pytest.mark.parametrize("workflow", [w for w in WORKFLOWS if w.name in RUN], ids=lambda workflow: workflow.name)
def test_runs(frontend, workflow):
    frontend.open_template(workflow.title)
    if workflow.name != "small_world":
        tokens = {"tokens_name": f"softrepa_{'sd15' if 'sd15' in workflow.name else 'sd3'}.safetensors"}
        frontend.set_widgets(SMALL | {"SoftREPALoadTokens": tokens})
    seen = frontend.run()
    assert seen["error"] is None
    frontend.page.wait_for_function(PICTURED, arg=list(RUN[workflow.name]), timeout=60_000)
    frontend.screenshot(f"run_{workflow.name}")
    nodes = frontend.nodes()
    assert overlaps(nodes) == []  # with previews, texts and curves
    shown = {node["title"]: node["images"] for node in nodes}
    for title in RUN[workflow.name]:
        assert shown[title] >= 1, title
    by_class = {node["id"]: node["type"] for node in nodes}
    progressed = {by_class[key] for key in seen["progress"]}
    previewed = {by_class[key] for key in seen["previews"]}
    for class_type in ("KSampler", "SoftREPAFlowEdit", "SoftREPATrainTokens"):
        if class_type in by_class.values():
            assert class_type in progressed
            assert class_type in previewed
    if workflow.name == "train_sd3":
        (text,) = (text for key, text in seen["texts"].items() if by_class[key] == "SoftREPATrainTokens")
        assert "step 4/4" in text


def test_an_error_is_shown_on_its_node(frontend):
    """The published tokens of SD3 medium do not fit the stand-in's width."""
    frontend.open_template(next(w.title for w in WORKFLOWS if w.name == "convert_tokens"))
    seen = frontend.run()
    assert seen["error"]["node_type"] == "SoftREPALoadTokens"
    sentence = seen["error"]["exception_message"].strip()
    assert "(5 layers x 1536), but this model is SD3" in sentence
    frontend.page.get_by_role("button", name="View details").click()
    frontend.page.get_by_text(sentence[:60]).first.wait_for()
    frontend.screenshot("error")
    frontend.errors.clear()  # the frontend says it in the console too
