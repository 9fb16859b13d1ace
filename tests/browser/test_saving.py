"""Graphs that are saved: the same after a restart, and with files that have gone."""

import shutil

import pytest
from softrepa_tests.browser.conftest import fill
from softrepa_tests.conftest import ROOT

from tools.frontend import read_graph
from tools.server import ComfyServer
from tools.standins import stand_in
from tools.workflows import WORKFLOWS
from tools.workflows.models import SD3

NAME = next(workflow.title for workflow in WORKFLOWS if workflow.name == "text_to_image_sd3")


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saving")
    fill(folder)
    return folder


def test_a_graph_outlives_a_restart_and_other_models(work, page_of):
    with ComfyServer(work) as server, page_of(server) as frontend:
        frontend.load(read_graph(ROOT / "workflows" / f"{NAME}.json"))
        frontend.set_widgets({"SoftREPALoadTokens": {"strength": 0.7, "blocks": "3"}, "KSampler": {"steps": 2}})
        saved, before = frontend.page.evaluate("app.graph.serialize()"), frontend.prompt()
    shutil.copy(stand_in("sd3").tokens, work / "models" / "softrepa" / "another.safetensors")
    (work / "models" / "checkpoints" / "another.safetensors").symlink_to(stand_in("sd3").checkpoint)
    with ComfyServer(work) as server, page_of(server) as frontend:
        frontend.load(saved)
        assert frontend.prompt() == before
        assert [node for node in frontend.nodes() if node["wrong"]] == []
        assert frontend.errors == []


def test_a_missing_token_file_is_said_by_comfyui_and_by_us(server, page_of):
    gone = server.work / "models" / "softrepa" / SD3.tokens
    kept = gone.rename(gone.with_suffix(".kept"))
    try:
        with page_of(server) as frontend:
            frontend.load(read_graph(ROOT / "workflows" / f"{NAME}.json"))
            frontend.page.wait_for_function("app.graph._nodes.some(node => node.has_errors)")  # it asks the server
            frontend.screenshot("missing_tokens")
            (wrong,) = (node for node in frontend.nodes() if node["wrong"])
            assert wrong["type"] == "SoftREPALoadTokens"
            prompt = {"prompt": frontend.prompt()}
            assert prompt["prompt"][wrong["id"]]["inputs"]["tokens_name"] == SD3.tokens  # kept, not replaced
            status, answer = server.request("POST", "/prompt", prompt)
            assert status == 400
            (error,) = answer["node_errors"][wrong["id"]]["errors"]
            assert f'Tokens "{SD3.tokens}": not in models/softrepa' in error["details"]
    finally:
        kept.rename(gone)
