"""A real ComfyUI server over HTTP: the shipped workflows, saving and listing, and errors on the right node."""

import json

import numpy as np
import pytest
from PIL import Image
from softrepa_tests.conftest import ROOT

from tools.server import ComfyServer, PromptError
from tools.standins import stand_in

OPTIONS = ["strength", "start_percent", "end_percent", "apply_to", "blocks", "uncond_bank", "strength_curve"]


@pytest.fixture(autouse=True)
def inference():
    """Nothing runs in this process."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    work = tmp_path_factory.mktemp("server")
    folders = {"checkpoints": [], "softrepa": []}
    for family in ("sd15", "sd3"):
        files = stand_in(family)
        folders["checkpoints"].append(files.checkpoint.parent)
        folders["softrepa"].append(files.tokens.parent)
    folders = {kind: sorted(set(paths)) for kind, paths in folders.items()}
    with ComfyServer(work, extra_models=folders) as running:
        yield running


def workflow(family: str, **tokens) -> dict:
    """The shipped workflow, on the stand-in, small and short."""
    graph = json.loads((ROOT / "workflows" / "api" / f"text_to_image_{family}.json").read_text(encoding="utf-8"))
    small = {
        "CheckpointLoaderSimple": {"ckpt_name": f"standin_{family}.safetensors"},
        "SoftREPALoadTokens": {"tokens_name": f"standin_{family}.safetensors"} | tokens,
        "KSampler": {"steps": 2},
        "EmptyLatentImage": {"width": 64, "height": 64},
        "EmptySD3LatentImage": {"width": 64, "height": 64},
    }
    for node in graph.values():
        node["inputs"].update(small.get(node["class_type"], {}))
    return graph


def picture(server, graph) -> np.ndarray:
    (saved,) = [path for paths in server.run(graph, timeout=300).images.values() for path in paths]
    return np.asarray(Image.open(saved).convert("RGB")).astype(int)


def halves(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    middle = image.shape[1] // 2
    return image[:, :middle], image[:, -middle:]


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_shipped_workflows(server, family):
    without, with_tokens = halves(picture(server, workflow(family)))
    assert without.std() > 1
    assert abs(without - with_tokens).mean() > 0.5
    without, same = halves(picture(server, workflow(family, strength=0.0)))
    assert abs(without - same).max() == 0


def test_the_optional_inputs_may_be_left_out(server):
    graph = workflow("sd15")
    for node in graph.values():
        if node["class_type"] == "SoftREPALoadTokens":
            node["inputs"] = {key: value for key, value in node["inputs"].items() if key not in OPTIONS}
    picture(server, graph)


def test_core_draws_the_strength_over_the_sampling(server):
    """0 throughout is the plain model, and less than 1 neither that nor full strength."""

    def drawn(points) -> np.ndarray:
        graph = workflow("sd15", strength_curve=["curve", 0])
        graph["curve"] = {"class_type": "CurveEditor", "inputs": {"curve": {"points": points}}}
        return picture(server, graph)

    without, with_tokens = halves(picture(server, workflow("sd15")))
    plain, weighed = (halves(drawn(points))[1] for points in ([[0, 0], [1, 0]], [[0, 0.3], [1, 0]]))
    assert abs(plain - without).max() == 0
    assert min(abs(weighed - without).mean(), abs(weighed - with_tokens).mean()) > 0.05


def test_object_info(server):
    info = server.object_info("SoftREPALoadTokens")
    assert info["display_name"] == "Load SoftREPA Tokens"
    assert info["category"] == "SoftREPA"
    assert list(info["input"]["required"]) == ["tokens_name"]
    assert list(info["input"]["optional"]) == ["model", *OPTIONS]
    defaults = [info["input"]["optional"][name][1].get("default") for name in OPTIONS]
    flat = {"points": [[0, 1], [1, 1]], "interpolation": "linear"}
    assert defaults == [1.0, 0.0, 1.0, "both", "auto", "positive", flat]
    assert info["input"]["optional"]["strength_curve"][1]["forceInput"]  # core has a widget of that type
    assert info["output"] == ["MODEL", "SOFTREPA_TOKENS"]
    for name in ("SoftREPALoadTokens", "SoftREPAApplyTokens", "SoftREPASaveTokens", "SoftREPAPreviewTokens"):
        status, _ = text(server, f"/extensions/comfyui-softrepa/docs/{name}.md")
        assert status == 200


def text(server, path: str) -> tuple[int, str]:
    import http.client

    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read().decode()


def load_node(graph: dict) -> str:
    return next(key for key, node in graph.items() if node["class_type"] == "SoftREPALoadTokens")


def test_save_is_listed_at_once_and_preview_shows(server):
    graph = workflow("sd15")
    load = load_node(graph)
    graph = {key: node for key, node in graph.items() if key == load or node["class_type"] == "CheckpointLoaderSimple"}
    graph["save"] = {
        "class_type": "SoftREPASaveTokens",
        "inputs": {"tokens": [load, 1], "filename_prefix": "made/copy"},
    }
    graph["look"] = {"class_type": "SoftREPAPreviewTokens", "inputs": {"tokens": [load, 1]}}
    result = server.run(graph, timeout=300)
    assert result.images["look"][0].is_file()
    options = server.object_info("SoftREPALoadTokens")["input"]["required"]["tokens_name"][1]["options"]
    assert any(name.replace("\\", "/") == "made/copy_00001.safetensors" for name in options)


@pytest.mark.parametrize(
    ("family", "inputs", "message"),
    [
        ("sd15", {"tokens_name": "gone.safetensors"}, 'Tokens "gone.safetensors": not in models/softrepa'),
        ("sd15", {"tokens_name": "standin_sd3.safetensors"}, "but this model is SD1.5 (context width 768)."),
        ("sd3", {"tokens_name": "standin_sd15.safetensors"}, "are for sd15 (context width 768), but this model is SD3"),
        ("sd15", {"blocks": "left"}, 'blocks is "left", expected a comma list'),
        ("sd15", {"start_percent": 0.9, "end_percent": 0.1}, "expected at most end_percent"),
        ("sd15", {"strength": 99.0}, "bigger than max"),
    ],
)
def test_errors_name_their_node(server, family, inputs, message):
    graph = workflow(family, **inputs)
    with pytest.raises(PromptError, match=r".") as caught:
        server.run(graph, timeout=300)
    assert message in caught.value.message
    assert caught.value.node_id == load_node(graph)


def test_a_merge_that_drops_tokens_says_so_under_the_node_also_when_it_is_cached(server):
    graph = workflow("sd15")
    load = load_node(graph)
    checkpoint = next(key for key, node in graph.items() if node["class_type"] == "CheckpointLoaderSimple")
    sampler = next(key for key, node in graph.items() if node["class_type"] == "KSampler")
    for _ in range(2):
        graph["merge"] = {
            "class_type": "ModelMergeSimple",
            "inputs": {"model1": [checkpoint, 0], "model2": [load, 0], "ratio": 1.0},
        }
        graph[sampler]["inputs"]["model"] = ["merge", 0]
        texts = server.run(graph, timeout=300).texts[load]
        assert any(
            "ModelMergeSimple takes only the weights of model2: the tokens will not be" in text for text in texts
        )
    graph["merge"]["inputs"] = {"model1": [load, 0], "model2": [checkpoint, 0], "ratio": 1.0}
    assert not any("takes only the weights" in text for text in server.run(graph, timeout=300).texts.get(load, []))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda nodes: nodes["load"].update(blocks="\udcff"), r'blocks is "\\udcff", expected a comma list'),
        (lambda nodes: nodes["save"].update(filename_prefix="caf\udce9"), r'filename_prefix is "caf\\udce9", expected'),
        (lambda nodes: nodes["load"].update(tokens_name="\ud800"), r'Tokens "\\ud800": not in models/softrepa'),
    ],
    ids=["blocks", "filename_prefix", "tokens_name"],
)
def test_text_that_cannot_be_encoded_does_not_stop_the_queue(server, change, message):
    def saving(prefix: str) -> dict:
        graph = workflow("sd15")
        load = load_node(graph)
        graph = {key: node for key, node in graph.items() if key == load or "Checkpoint" in node["class_type"]}
        inputs = {"tokens": [load, 1], "filename_prefix": prefix}
        return graph | {"save": {"class_type": "SoftREPASaveTokens", "inputs": inputs}}

    graph = saving("broken")
    change({"load": graph[load_node(graph)]["inputs"], "save": graph["save"]["inputs"]})
    with pytest.raises(PromptError, match=message):
        server.run(graph, timeout=300)
    assert server.run(saving("after"), timeout=300).outputs["save"]
