"""The nodes as a person finds them, adds them and reads about them."""

import pytest
from playwright.sync_api import expect
from softrepa_tests.conftest import ROOT

from tools.translations import LANGUAGES, NOTE, english, memory_of
from tools.workflows import WORKFLOWS

PAGES = sorted(path.stem for path in (ROOT / "nodes" / "web" / "docs").glob("*.md"))
READ = [
    *("SoftREPALoadTokens", "SoftREPAFlowEdit", "SoftREPATrainTokens", "SoftREPACompare"),
]
"""Pages that are opened here; `tests/comfy/test_help.py` looks at all of them."""
SEARCHES = {
    "SoftREPA": ("Load SoftREPA Tokens", "Train SoftREPA Tokens"),
    "prompt adherence": ("Load SoftREPA Tokens",),
    "soft tokens": ("Apply SoftREPA Tokens",),
    "export tokens": ("Save SoftREPA Tokens",),
    "inspect tokens": ("Preview SoftREPA Tokens",),
    "fine-tune prompt adherence": ("Train SoftREPA Tokens",),
    "FlowEdit Guider": ("FlowEdit Guider (for SamplerCustomAdvanced)",),
    "for SamplerCustomAdvanced": ("FlowEdit Sampler (for SamplerCustomAdvanced)",),
    "load training dataset": ("Dataset from Latents",),
    "inversion free": ("FlowEdit Sampler",),
    "image text folder": ("Caption-Image Folder",),
    "retrieval accuracy": ("SoftREPA Alignment Score",),
    "training options": ("SoftREPA Training Options",),
    "xy plot": ("Compare Tokens",),
    "aesthetic score": ("Compare Scores",),
    "denoising error": ("Judge: Alignment",),
    "vqascore": ("Judge: Questions",),
    "clip similarity": ("Judge: CLIP Score",),
    "demo model": ("Load Small World (demo model)",),
    "demo dataset": ("Small World Pictures",),
}
"""By name and by alias."""


FIRST = {
    "softrepa": "Load SoftREPA Tokens",
    "FlowEdit": "FlowEdit Sampler",
    "edit photo": "FlowEdit Sampler",
    "train": "Train SoftREPA Tokens",
    "train tokens": "Train SoftREPA Tokens",
    "load tokens": "Load SoftREPA Tokens",
}
"""What most people want, before all else that is ours."""


def ours(info: dict) -> dict:
    return {name: node for name, node in info.items() if node["category"] == "SoftREPA"}


@pytest.mark.parametrize("words", SEARCHES)
def test_found_by_search_and_added(frontend, words):
    page = frontend.page
    frontend.search(words)
    frontend.screenshot(f"search_{words.replace(' ', '_')}")
    for title in SEARCHES[words]:
        page.get_by_text(title, exact=True).first.wait_for()
    page.get_by_text(SEARCHES[words][0], exact=True).first.click()
    page.wait_for_function("app.graph._nodes.length > 0")
    (node,) = frontend.nodes()
    assert node["title"] == SEARCHES[words][0]


@pytest.mark.parametrize("words", FIRST)
def test_found_first(frontend, words):
    frontend.search(words)
    found = frontend.page.get_by_test_id("result-item").filter(has_text="comfyui-softrepa")
    expect(found.first).to_contain_text(FIRST[words], timeout=20_000)
    titles = [text.splitlines()[0] for text in found.all_inner_texts()]
    assert titles[0] == FIRST[words]
    assert "Train SoftREPA Tokens (all in one)" not in titles


def test_every_page_has_its_node(info):
    assert sorted(ours(info)) == PAGES


def test_every_node_is_searched_for(info):
    offered = {node["display_name"] for node in ours(info).values() if not node.get("deprecated")}
    assert offered == {titles[0] for titles in SEARCHES.values()}


def test_widgets_and_tooltips(frontend, info):
    for name, node in ours(info).items():
        frontend.clear()
        frontend.add(name)
        (added,) = frontend.nodes()
        inputs = node["input"].get("required", {}) | node["input"].get("optional", {})
        kinds = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
        expected = [key for key in node["input_order"].get("required", []) + node["input_order"].get("optional", [])]
        expected = [key for key in expected if inputs[key][0] in kinds or isinstance(inputs[key][0], list)]
        expected = [key for key in expected if not inputs[key][1].get("forceInput")]
        assert [widget for widget in added["widgets"] if widget in inputs] == expected, name
        on_canvas = [key for key in expected if not inputs[key][1].get("multiline")]  # a text box shows no tooltip
        if not on_canvas:
            continue
        widget = on_canvas[-1]
        frontend.page.mouse.move(10, 600)
        frontend.page.mouse.move(*frontend.widget_point(added["id"], widget))
        tip = frontend.page.locator(".node-tooltip")
        tip.wait_for()
        assert tip.inner_text().split() == inputs[widget][1]["tooltip"].split(), name


def test_cores_curve_weighs_the_tokens(frontend):
    """A graph that knows no curve gets a socket, never a widget of a curve; connected, it runs."""
    frontend.open_template(next(w.title for w in WORKFLOWS if w.name == "small_world"))
    frontend.set_widgets({"KSampler": {"steps": 2}, "SoftREPAFlowEdit": {"steps": 2, "n_max": 1}})

    def applied() -> dict:
        (node,) = (node for node in frontend.prompt().values() if node["class_type"] == "SoftREPAApplyTokens")
        return node["inputs"]

    assert "strength_curve" not in applied()
    frontend.page.evaluate(
        """() => {
            const curve = LiteGraph.createNode('CurveEditor')
            curve.pos = [-500, 700]
            app.graph.add(curve)
            const apply = app.graph._nodes.find(node => node.type === 'SoftREPAApplyTokens')
            curve.connect(0, apply, apply.inputs.findIndex(input => input.name === 'strength_curve'))
        }"""
    )
    frontend.settle()
    frontend.screenshot("strength_curve")
    source, slot = applied()["strength_curve"]
    assert (frontend.prompt()[source]["class_type"], slot) == ("CurveEditor", 0)
    assert frontend.run()["error"] is None


@pytest.mark.parametrize("name", READ)
def test_help(frontend, name):
    frontend.add(name)
    text = frontend.help()
    frontend.screenshot(f"help_{name}")
    page = (ROOT / "nodes" / "web" / "docs" / f"{name}.md").read_text(encoding="utf-8")
    assert page.splitlines()[0].removeprefix("# ") in text
    assert frontend.page.locator(".node-help-content img").count() == page.count("![")


@pytest.mark.parametrize("language", LANGUAGES)
def test_in_the_users_language(server, page_of, language):
    definitions, _ = english()
    node, memory = definitions["SoftREPAFlowEdit"], memory_of(language)
    with page_of(server, language) as frontend:
        frontend.clear()
        frontend.add("SoftREPAFlowEdit")
        (added,) = frontend.nodes()
        assert added["title"] == memory[node["display_name"]]
        labels = frontend.page.evaluate(
            """() => {
                const [node] = app.graph._nodes
                const shown = [...node.inputs, ...node.widgets].map(one => [one.name, one.label ?? one.localized_name])
                return Object.fromEntries(shown)
            }"""
        )
        assert {name: memory[name] for name in node["inputs"]}.items() <= labels.items()
        frontend.page.mouse.move(*frontend.widget_point(added["id"], "n_max"))
        tip = frontend.page.locator(".node-tooltip")
        tip.wait_for()
        assert tip.inner_text().split() == memory[node["inputs"]["n_max"]["tooltip"]].split()
        text = frontend.help()
        frontend.screenshot(f"help_{language}")
        assert {memory[node["display_name"]], memory[NOTE]} <= set(text.splitlines())
        assert "*" not in text
        assert frontend.errors == []
