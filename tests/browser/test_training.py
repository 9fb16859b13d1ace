"""A training run as a person watches it: live curves in the node, stopped from there, its file listed at once."""

from pathlib import Path

import pytest
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.training.presets import RELATIVE
from softrepa_tests.browser.test_templates import SET_VIEW, SMALL
from softrepa_tests.conftest import ROOT

from tools import environment
from tools.frontend import read_graph
from tools.workflows import WORKFLOWS

TEMPLATE = next(workflow.title for workflow in WORKFLOWS if workflow.name == "train_sd3")
ALL_IN_ONE = ROOT / "tests" / "data" / "all_in_one"
PREVIEW_TEXT = "$$node-text-preview"
BELOW = f"""app.graph._nodes.find(node => node.type === 'SoftREPATrainTokens')
    .widgets.find(widget => widget.name === '{PREVIEW_TEXT}')?.value"""
LISTED = "app.graph._nodes.find(node => node.type === 'SoftREPALoadTokens').widgets[0].options.values"


@pytest.fixture
def as_before(frontend, server):
    """Nothing runs on, and the view, which is kept on the server, is the usual one."""
    yield
    server.interrupt()
    frontend.page.evaluate(SET_VIEW, False)


def axis_end(panel) -> int:
    """The last step in sight."""
    return int(panel.locator("text").last.text_content())


def disconnect_previews(page) -> None:
    """They take longer than the steps."""
    page.evaluate(
        """() => {
            const node = app.graph._nodes.find(node => node.type === 'SoftREPATrainTokens')
            for (const name of ['preview_positive', 'preview_negative', 'vae']) {
                node.disconnectInput(node.inputs.findIndex(input => input.name === name))
            }
        }"""
    )


def wait_for_step(page, step: int) -> None:
    page.wait_for_function("step => window.run?.step >= step", arg=step, timeout=120_000)


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("view", ["classic", "nodes_2"])
def test_live_curves(frontend, server, view):
    page, prefix = frontend.page, f"watched_{view}"
    frontend.open_template(TEMPLATE)
    page.evaluate(SET_VIEW, view != "classic")
    frontend.settle()
    frontend.add("SoftREPALoadTokens", -400, -400)
    endless = {"steps": 100_000, "batch_size": 2, "filename_prefix": prefix, "preset": RELATIVE, "preview_every": 3}
    frontend.set_widgets(SMALL | {"SoftREPATrainTokens": endless})
    disconnect_previews(page)
    before = frontend.prompt()
    page.evaluate(
        """() => {
            window.run = null
            app.api.addEventListener('softrepa.training', event => { window.run = event.detail })
        }"""
    )
    frontend.start()
    wait_for_step(page, 5)
    curves = page.locator(".softrepa-curves")
    loss, retrieval = curves.locator("svg").all()
    assert loss.locator("polyline").first.get_attribute("points").count(",") >= 4
    assert retrieval.locator("circle").count() >= 1  # held out
    text = curves.locator("header div")
    assert "of 100000" in text.inner_text()
    assert "left" in text.inner_text()
    assert "GB" in text.inner_text()
    box = loss.bounding_box()
    middle = box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + 0.05 * box["width"], middle)  # left of the axis: its first step, however many there are
    page.wait_for_timeout(300)
    assert text.inner_text().splitlines()[1].startswith("step 1: loss")
    page.mouse.down()
    page.mouse.move(box["x"] + 0.6 * box["width"], middle, steps=4)
    page.mouse.up()
    frontend.screenshot(f"live_curves_{prefix}_zoomed")
    assert axis_end(loss) < page.evaluate("window.run.step")
    loss.dblclick()
    page.wait_for_timeout(300)
    frontend.screenshot(f"live_curves_{prefix}")
    assert axis_end(loss) >= 5
    page.get_by_role("button", name="Stop and keep").click()
    page.wait_for_function("window.seen.done", timeout=60_000)
    assert page.evaluate("window.seen.interrupted")
    page.get_by_role("button", name="Stop and keep").wait_for(state="detached")
    assert "stopped" in text.inner_text()
    if page.evaluate("window.__COMFYUI_FRONTEND_VERSION__") != environment.NEWEST_FRONTEND:  # takes such texts away
        assert page.evaluate(BELOW).startswith("stopped after step")  # the line that is in sight of a small node
        assert view == "classic" or page.locator(f"[aria-label='{PREVIEW_TEXT}'] br").count()  # each on its own
    kept = Path(server.work / "models" / "softrepa" / f"{prefix}_00001.safetensors")
    assert 5 <= int(token_files.load(kept).metadata["steps"]) < 1000
    page.wait_for_function(f"name => {LISTED}.includes(name)", arg=kept.name)  # without pressing R
    assert frontend.prompt() == before  # curves are no input
    values = page.evaluate("app.graph._nodes.find(n => n.type === 'SoftREPATrainTokens').serialize().widgets_values")
    assert len(values) == len([value for value in before["6"]["inputs"].values() if not isinstance(value, list)])


def test_advice_before_the_first_step(frontend):
    """A temperature that cannot work stops the run; with the settings that the error names it goes."""
    frontend.open_template(TEMPLATE)
    disconnect_previews(frontend.page)
    frontend.set_widgets(SMALL | {"SoftREPATrainTokens": {"steps": 2, "batch_size": 2}})
    frontend.page.evaluate(
        """() => {
            const options = LiteGraph.createNode('SoftREPATrainingOptions')
            options.pos = [500, 500]
            app.graph.add(options)
            const train = app.graph._nodes.find(node => node.type === 'SoftREPATrainTokens')
            options.connect(0, train, train.inputs.findIndex(input => input.name === 'options'))
        }"""
    )
    frontend.set_widgets({"SoftREPATrainingOptions": {"temperature": 0.001}})
    seen = frontend.run()
    frontend.screenshot("advice")
    assert "temperature_mode relative with temperature 1 in" in seen["error"]["exception_message"]
    assert frontend.page.locator(".softrepa-curves header div").inner_text().startswith("step 0 of 2 · stopped")
    frontend.errors.clear()  # the frontend says it in the console too
    frontend.set_widgets({"SoftREPATrainingOptions": {"temperature": 1.0, "temperature_mode": "relative"}})
    assert frontend.run()["error"] is None


def test_a_graph_of_the_node_with_all_settings_opens(frontend):
    frontend.load(read_graph(ALL_IN_ONE / "template.json"))
    frontend.screenshot("all_in_one")
    assert [node for node in frontend.nodes() if not node["known"] or node["wrong"]] == []
    inputs = {key: node["inputs"] for key, node in frontend.prompt().items()}
    expected = {key: node["inputs"] for key, node in read_graph(ALL_IN_ONE / "prompt.json").items()}
    assert inputs == expected
