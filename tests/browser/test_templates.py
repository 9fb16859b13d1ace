"""Every template as a person meets it: found, opened, run."""

import json
from itertools import combinations

import pytest
from comfyui_softrepa.softrepa.training.presets import RELATIVE
from playwright.sync_api import expect
from softrepa_tests.conftest import ROOT

from tools.frontend import read_graph
from tools.workflows import BLUEPRINTS, WORKFLOWS
from tools.workflows.layout import UNTELLING

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
RUN = {
    "small_world": ("Save Image",),
    "text_to_image_sd3": ("Save Image",),
    "small_world_edit": ("Save Image",),
    "small_world_training": ("SoftREPA Alignment Score",),
    "flowedit_sd3_mask": ("Save Image",),
    "train_sd3": ("Plot Loss Graph", "Preview SoftREPA Tokens"),
    "score_sd3": ("Score without and with tokens",),
    "convert_tokens": ("Preview SoftREPA Tokens",),
}
"""Nodes that show pictures after a run, a template of each kind. The smallest SDXL is too large to make up, and so are
newer models."""
PICTURED = """titles => titles.every(title => app.graph._nodes.some(
    node => node.title === title && (node.imgs ?? []).some(image => image.naturalWidth > 1)
))"""
UNDER_NODES = """() => {
    // links that are drawn under nodes which they do not belong to: the frontend's own paths against its own boxes
    const graph = app.canvas.graph, scale = 0.25, margin = 400, found = []
    const [left, top] = [0, 1].map(axis => Math.min(...graph._nodes.map(node => node.pos[axis])) - margin)
    const [right, bottom] = [0, 1].map(axis => Math.max(...graph._nodes.map(node => node.pos[axis] + node.size[axis])))
    const size = [right - left + margin, bottom - top + margin].map(length => Math.ceil(length * scale))
    const context = new OffscreenCanvas(...size).getContext('2d', {willReadFrequently: true})
    const pixel = (x, y) => [Math.round((x - left) * scale), Math.round((y - top) * scale)]
    for (const link of graph.links.values()) {
        const paths = [link.path]
        for (let id = link.parentId; id != null; id = graph.reroutes.get(id).parentId)
            paths.push(graph.reroutes.get(id).path)
        context.setTransform(1, 0, 0, 1, 0, 0)
        context.clearRect(0, 0, ...size)
        context.setTransform(scale, 0, 0, scale, -left * scale, -top * scale)
        context.lineWidth = 4
        for (const path of paths) context.stroke(path)
        for (const node of graph._nodes.filter(node => ![link.origin_id, link.target_id].includes(node.id))) {
            const [x, y] = pixel(node.pos[0] + 8, node.pos[1] - 22)
            const [x2, y2] = pixel(node.pos[0] + node.size[0] - 8, node.pos[1] + node.size[1] - 8)
            if (context.getImageData(x, y, x2 - x, y2 - y).data.some(value => value > 60))
                found.push(`${link.origin_id} to ${link.target_id} under ${node.title}`)
        }
    }
    return found
}"""
BOXES_IN_NODES_2 = """[...document.querySelectorAll('[data-node-id]')].map(element => {
    const {left, top, width, height} = element.getBoundingClientRect()
    const title = app.graph.getNodeById(element.dataset.nodeId)?.title ?? element.dataset.nodeId
    return {title, pos: [left, top], size: [width, height]}
})"""
APPS = ("small_world", "small_world_edit", "flowedit_sd3")
"""Those that say what app mode shows; the other edits show the same."""
SET_VIEW = "is_new => app.ui.settings.setSettingValueAsync('Comfy.VueNodes.Enabled', is_new)"
INSIDE = """app.canvas.graph._nodes.map(node => ({
    title: node.title, pos: [...node.pos], size: [...node.size], known: node.type in LiteGraph.registered_node_types,
    linked: node.inputs.filter(input => input.link != null).map(input => input.name),
}))"""
SET_ALL = """() => {
    // another value in every number and text of the only node; what it then has
    const node = app.graph._nodes[0]
    for (const widget of node.widgets) {
        if (widget.type === 'number') widget.value += 1
        if (widget.type === 'customtext') widget.value = `words of ${widget.name}`
    }
    const [inputs, outputs] = [node.inputs, node.outputs].map(slots => slots.map(slot => slot.name))
    const values = Object.fromEntries(node.widgets.map(widget => [widget.name, widget.value]))
    return {id: String(node.id), title: node.title, inputs, outputs, values}
}"""
LETTERS = """() => {
    // height of the letters of a note's steps, on the screen
    const heading = document.querySelector('.comfy-markdown .tiptap h1')
    return parseFloat(getComputedStyle(heading).fontSize) * app.canvas.ds.scale
}"""


def overlaps(nodes: list[dict], lift: int = 30) -> list[tuple[str, str]]:
    """Pairs of titles; a title stands `lift` above its node."""
    return [
        (first["title"], second["title"]) for first, second in combinations(nodes, 2) if overlap(first, second, lift)
    ]


def overlap(first: dict, second: dict, lift: int) -> bool:
    return all(
        first["pos"][axis] - above < second["pos"][axis] + second["size"][axis]
        and second["pos"][axis] - above < first["pos"][axis] + first["size"][axis]
        for axis, above in ((0, 0), (1, lift))
    )


@pytest.fixture
def usual_view(frontend):
    """The view is kept on the server."""
    yield
    frontend.page.evaluate(SET_VIEW, False)


def comparable(prompt: dict) -> dict:
    return {
        key: (node["class_type"], node["_meta"]["title"], {k: v for k, v in node["inputs"].items() if k != "upload"})
        for key, node in prompt.items()
    }


def test_listed_with_their_pictures(frontend):
    frontend.browse_templates()
    frontend.page.wait_for_timeout(1000)
    frontend.screenshot("templates")
    listed = [title for title in frontend.page.locator("[role=dialog] h3").all_inner_texts() if title[:2].isdecimal()]
    assert listed == [workflow.title for workflow in WORKFLOWS][: len(listed)]
    for workflow in WORKFLOWS:
        card = frontend.page.get_by_text(workflow.title, exact=True).first
        card.scroll_into_view_if_needed()  # pictures are fetched as they come into sight
        picture = card.locator("xpath=ancestor::*[.//img][1]").locator("img").first
        expect(picture).to_have_js_property("naturalWidth", 768, timeout=20_000)


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda workflow: workflow.name)
def test_opens(frontend, info, workflow):
    frontend.open_template(workflow.title)
    frontend.screenshot(f"template_{workflow.name}")
    nodes = frontend.nodes()
    assert len(nodes) == len(workflow.nodes) + 1  # and the note
    assert [node for node in nodes if not node["known"] or node["wrong"]] == []
    assert overlaps(nodes) == []
    assert frontend.page.evaluate(UNDER_NODES) == []
    assert frontend.page.evaluate(LETTERS) > 8
    assert not frontend.page.evaluate("app.canvas.low_quality")  # then no text is written
    assert not frontend.page.get_by_text("errors found").count()
    twin = read_graph(ROOT / "workflows" / "api" / f"{workflow.name}.json")
    assert comparable(frontend.prompt()) == comparable(twin)
    for node in twin.values():
        known = info[node["class_type"]]["input"]
        assert node["inputs"].keys() <= {**known.get("required", {}), **known.get("optional", {})}.keys()


@pytest.mark.parametrize("workflow", [w for w in WORKFLOWS if w.name in RUN], ids=lambda workflow: workflow.name)
def test_runs(frontend, workflow):
    frontend.load(read_graph(ROOT / "workflows" / f"{workflow.title}.json"))
    if "small_world" not in workflow.name:
        frontend.set_widgets(SMALL | {"SoftREPALoadTokens": {"tokens_name": "softrepa_sd3.safetensors"}})
    if workflow.name == "small_world_training":  # its own forty steps take a minute
        few = {"SoftREPASmallWorldPictures": {"count": 16}, "SoftREPAScore": {"batch_size": 2, "batches": 1}}
        frontend.set_widgets(few | {"SoftREPATrainTokens": {"steps": 4, "preview_every": 2}})
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


@pytest.mark.usefixtures("usual_view")
def test_nodes_2(frontend):
    """One page for all: what overlaps, as the browser has laid it out."""
    frontend.page.evaluate(SET_VIEW, True)
    for workflow in WORKFLOWS:
        frontend.load(read_graph(ROOT / "workflows" / f"{workflow.title}.json"))
        frontend.page.locator("[data-node-id]").nth(len(workflow.nodes)).wait_for()
        frontend.screenshot(f"template_{workflow.name}_nodes_2")
        assert overlaps(frontend.page.evaluate(BOXES_IN_NODES_2), lift=0) == [], workflow.title


@pytest.mark.usefixtures("usual_view")
@pytest.mark.parametrize("workflow", [w for w in WORKFLOWS if w.name in APPS], ids=lambda workflow: workflow.name)
def test_app_mode(frontend, workflow):
    """What the app shows to set is what the template names, by a name that tells what it is."""
    frontend.load(read_graph(ROOT / "workflows" / f"{workflow.title}.json"))
    frontend.command("Comfy.ToggleLinear")
    frontend.page.get_by_text("Number of runs").wait_for()
    frontend.screenshot(f"app_{workflow.name}")
    shown = frontend.page.inner_text("body").splitlines()
    frontend.command("Comfy.ToggleLinear")
    named = [workflow.nodes[key].title if name in UNTELLING else name for key, name in workflow.app.inputs]
    assert [line for line in shown if line in named] == named


def test_what_is_missing_is_said_as_a_graph_opens(frontend):
    for name, place in (("train_sd3", "below ComfyUI's input"), ("convert_tokens", "in models/softrepa")):
        graph = read_graph(ROOT / "workflows" / f"{next(w.title for w in WORKFLOWS if w.name == name)}.json")
        frontend.load(graph)
        assert not frontend.page.get_by_text('There is no "').count()
        text = json.dumps(graph).replace('"my_pictures"', '"gone"').replace('"sd3"', '"gone"')
        frontend.load(json.loads(text))
        frontend.page.get_by_text(f'There is no "gone" {place}').first.wait_for()
        frontend.screenshot(f"missing_{name}")
        frontend.load(graph)
        frontend.page.get_by_text('There is no "').first.wait_for(state="detached")


@pytest.mark.parametrize("blueprint", BLUEPRINTS, ids=lambda blueprint: blueprint.name)
def test_blueprints(frontend, blueprint):
    """Found by search, added as one node with its sockets and widgets, whole inside; Run sends what is set on it."""
    frontend.search(blueprint.name)
    frontend.page.get_by_text(blueprint.name, exact=True).first.click()
    frontend.put_down(700, 300)
    frontend.settle()
    frontend.screenshot(f"blueprint_{blueprint.name.replace(' ', '_')}")
    node = frontend.page.evaluate(SET_ALL)
    assert node["title"] == blueprint.name
    assert sorted(node["inputs"]) == sorted(name for name, *_ in blueprint.inputs)
    assert node["outputs"] == [name for name, *_ in blueprint.outputs]
    sent = {inner["_meta"]["title"]: inner["inputs"] for inner in frontend.prompt().values()}
    for name, *targets in blueprint.inputs:
        if name in node["values"]:
            for key, target in targets:
                assert sent[blueprint.nodes[key].title][target] == node["values"][name] is not None, name
    box = frontend.box(node["id"], margin=0)
    frontend.page.mouse.dblclick(box["x"] + box["width"] / 2, box["y"] + 50 * frontend.scale())  # between its sockets
    frontend.page.wait_for_function("app.canvas.graph !== app.rootGraph")
    frontend.settle()
    frontend.screenshot(f"blueprint_{blueprint.name.replace(' ', '_')}_inside")
    inside = frontend.page.evaluate(INSIDE)
    assert [one for one in inside if not one["known"]] == []
    assert {one["title"] for one in inside} == {one.title for one in blueprint.nodes.values()}
    assert overlaps(inside) == []
    for one in inside:  # from the blueprint's own sockets, or from a node inside
        key = next(key for key, described in blueprint.nodes.items() if described.title == one["title"])
        outside = {name for _, *targets in blueprint.inputs for target, name in targets if target == key}
        links = {name for name, value in blueprint.nodes[key].inputs.items() if isinstance(value, list)}
        assert set(one["linked"]) == outside | links


def test_an_error_is_shown_on_its_node(frontend):
    """The published tokens of SD3 medium do not fit the stand-in's width."""
    frontend.open_template(next(w.title for w in WORKFLOWS if w.name == "text_to_image_sd3"))
    frontend.set_widgets(SMALL | {"SoftREPALoadTokens": {"tokens_name": "sd3"}})
    seen = frontend.run()
    assert seen["error"]["node_type"] == "SoftREPALoadTokens"
    sentence = seen["error"]["exception_message"].strip()
    assert "(5 layers x 1536), but this model is SD3" in sentence
    frontend.page.get_by_role("button", name="View details").click()
    frontend.page.get_by_text(sentence[:60]).first.wait_for()
    frontend.screenshot("error")
    frontend.errors.clear()  # the frontend says it in the console too
