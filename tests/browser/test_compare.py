"""A comparison as a person sees it: while it runs, and its grid and table at the node's own size, on dark and light."""

import json

import numpy as np
import pytest
from PIL import Image

PROMPTS = "two small red circles left of a blue square\nthree green crosses\na yellow triangle above a purple diamond"
COMPARE = {
    "prompts": PROMPTS, "seeds": "0, 1", "steps": 4, "cfg": 2.0, "scheduler": "simple", "width": 96, "height": 96,
}  # fmt: skip

SHOWS_THE_GRID = """() => {
    const {imgs} = app.graph._nodes.find(node => node.type === 'SoftREPACompare')
    return imgs?.length === 1 && imgs[0].naturalHeight > 0.6 * imgs[0].naturalWidth
}"""
"""The whole grid and not one row of it, which is the last preview while it draws."""


@pytest.fixture
def compared(frontend):
    """The node on the small world, with a judge and the table beside it, after its run."""
    frontend.page.evaluate(
        """values => {
            const add = (type, x, size) => {
                const node = LiteGraph.createNode(type)
                node.pos = [x, 100]
                if (size) node.setSize(size)
                app.graph.add(node)
                return node
            }
            const world = add('SoftREPASmallWorld', 0)
            const judge = add('SoftREPAAlignmentJudge', 0)
            judge.pos = [0, 300]
            const compare = add('SoftREPACompare', 320, [520, 1400])
            const table = add('PreviewAny', 880, [520, 300])
            const slot = name => compare.inputs.findIndex(input => input.name === name)
            world.connect(0, compare, slot('model'))
            world.connect(1, compare, slot('clip'))
            world.connect(2, compare, slot('vae'))
            world.connect(3, compare, slot('tokens'))
            judge.connect(0, compare, slot('judge'))
            compare.connect(2, table, 0)
            for (const [name, value] of Object.entries(values))
                compare.widgets.find(widget => widget.name === name).value = value
        }""",
        COMPARE,
    )
    seen = frontend.run()
    assert seen["error"] is None, seen["error"]
    return seen


def node_of(frontend, kind):
    (node,) = (node for node in frontend.nodes() if node["type"] == kind)
    return node


def test_it_tells_how_far_it_is_and_what_it_found(frontend, compared):
    frontend.page.wait_for_function(SHOWS_THE_GRID, timeout=60_000)
    node = node_of(frontend, "SoftREPACompare")
    assert compared["previews"][node["id"]] > 500
    told = compared["texts"][node["id"]]
    assert told.startswith("alignment (own prompt fits better than another")
    assert "strength 1: " in told
    frontend.settle()
    for palette in ("dark", "light"):
        frontend.page.evaluate("name => app.ui.settings.setSettingValueAsync('Comfy.ColorPalette', name)", palette)
        frontend.page.wait_for_timeout(1000)
        frontend.screenshot(f"compare_{palette}")
        for kind in ("SoftREPACompare", "PreviewAny"):
            shown = node_of(frontend, kind)
            picture = frontend.screenshot(f"compare_{kind}_{palette}", frontend.box(shown["id"], margin=10))
            with Image.open(picture) as image:
                assert np.asarray(image.convert("L")).std() > 10
    frontend.page.evaluate("app.ui.settings.setSettingValueAsync('Comfy.ColorPalette', 'dark')")


def test_the_same_again_is_at_once(frontend, compared, server):
    """Everything is on disk: the second run draws nothing."""
    files = {path: path.stat().st_mtime_ns for path in (server.work / "output").rglob("*_*.png")}
    assert len([path for path in files if "softrepa_compare" in path.parts]) >= 12
    frontend.set_widgets({"SoftREPACompare": {"shown": 4}})
    seen = frontend.run()
    assert seen["error"] is None, json.dumps(seen["error"])
    assert {path: path.stat().st_mtime_ns for path in files} == files
