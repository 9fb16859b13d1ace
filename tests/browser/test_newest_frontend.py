"""The newest frontend on the same server: what CI has time for of all that `--frontend` runs."""

import pytest
from softrepa_tests.browser import test_nodes, test_training
from softrepa_tests.browser.conftest import fill

from tools import environment
from tools.server import ComfyServer
from tools.workflows import WORKFLOWS

TEMPLATE = next(workflow for workflow in WORKFLOWS if workflow.name == "small_world")
as_before = test_training.as_before


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    work = tmp_path_factory.mktemp("newest_frontend")
    fill(work)
    frontend = environment.fetch_frontend(environment.NEWEST_FRONTEND)
    arguments = ("--preview-method", "latent2rgb", "--front-end-root", str(frontend))
    with ComfyServer(work, arguments=arguments) as running:
        yield running


@pytest.mark.usefixtures("as_before")
@pytest.mark.parametrize("view", ["classic", "nodes_2"])
def test_a_template_opens(frontend, view):
    frontend.open_template(TEMPLATE.title)
    frontend.page.evaluate(test_training.SET_VIEW, view != "classic")
    frontend.settle()
    frontend.screenshot(f"newest_{view}")
    nodes = frontend.nodes()
    assert len(nodes) == len(TEMPLATE.nodes) + 1  # and the note
    assert [node for node in nodes if not node["known"] or node["wrong"]] == []
    version = frontend.page.evaluate("window.__COMFYUI_FRONTEND_VERSION__")
    assert version == environment.NEWEST_FRONTEND


@pytest.mark.usefixtures("as_before")
def test_live_curves(frontend, server):
    test_training.test_live_curves(frontend, server, "nodes_2")


def test_found_by_search(frontend):
    test_nodes.test_found_first(frontend, "edit photo")
