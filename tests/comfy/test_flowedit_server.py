"""FlowEdit over HTTP in a real ComfyUI: the shipped workflows on small made-up photographs, and cancelling."""

import json

import numpy as np
import pytest
from PIL import Image
from softrepa_tests.conftest import ROOT

from benchmarks import photographs
from tools.server import ComfyServer, PromptError, PromptInterrupted
from tools.standins import stand_in

SIZE = 96


@pytest.fixture(autouse=True)
def inference():
    """Nothing runs in this process."""


def photograph(number: int) -> np.ndarray:
    """A hill under a sky with a sun and some grain, (H, W, 3) uint8; wider than high."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:80, 0:120]
    hill = (y > 45 + 12 * np.sin(x / 17 + number))[..., None]
    sky = np.stack([120 + y, 150 + y, 230 + 0 * y], axis=-1)
    picture = np.where(hill, [60, 110, 50], sky).astype(float)
    picture[(y - 18) ** 2 + (x - 25 * (1 + number)) ** 2 < 90] = (250, 230, 120)
    return (picture + rng.normal(0, 6, picture.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    work = tmp_path_factory.mktemp("server")
    with ComfyServer(work, extra_models={"checkpoints": [stand_in("sd3").checkpoint.parent]}) as running:
        alpha = np.full((80, 120), 255, np.uint8)
        alpha[:, 60:] = 0  # what ComfyUI's mask editor makes of a painted region
        picture = np.dstack([photograph(1), alpha])
        Image.fromarray(picture).save(running.work / "input" / "photograph.png")
        yield running


def workflow(name: str, **edit) -> dict:
    """The shipped workflow, on the stand-in, small and short, saving the unedited decode as well."""
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    small = {
        "CheckpointLoaderSimple": {"ckpt_name": "standin_sd3.safetensors"},
        "LoadImage": {"image": "photograph.png"},
        "ImageScale": {"width": SIZE, "height": SIZE},
        "SolidMask": {"width": SIZE // 4, "height": SIZE // 4},
        "MaskComposite": {"x": 5 * SIZE // 8, "y": SIZE // 4},  # inside what is painted
        "SoftREPAFlowEdit": {"steps": 4, "n_max": 3} | edit,
    }
    for node in graph.values():
        node["inputs"].update(small.get(node["class_type"], {}))
    graph["20"] = {"class_type": "VAEDecode", "inputs": {"samples": ["5", 0], "vae": ["1", 2]}}
    graph["21"] = {"class_type": "SaveImage", "inputs": {"images": ["20", 0], "filename_prefix": "source"}}
    return graph


def edited_and_source(server, graph) -> tuple[np.ndarray, np.ndarray]:
    images = server.run(graph, timeout=300).images
    both, source = (np.asarray(Image.open(images[node][0]).convert("RGB")).astype(int) for node in ("11", "21"))
    return both[:, SIZE : 2 * SIZE], source  # the workflow saves source, edit and difference side by side


def test_the_whole_picture(server):
    edited, source = edited_and_source(server, workflow("flowedit_sd3"))
    assert edited.shape == (SIZE, SIZE, 3)
    assert abs(edited - source).mean() > 1


def test_only_inside_the_mask(server):
    edited, source = edited_and_source(server, workflow("flowedit_sd3_mask"))
    changed = abs(edited - source).mean(axis=(0, 2))
    assert changed[: SIZE // 4].max() == 0  # the decoder looks some pixels beyond the mask's edge
    assert changed[-SIZE // 4 :].mean() > 1


def test_errors_are_on_the_node(server):
    with pytest.raises(PromptError, match="n_max is 5, expected at most steps, 4") as caught:
        server.run(workflow("flowedit_sd3", n_max=5), timeout=300)
    assert caught.value.node_id == "9"


def test_cancel_between_steps(server):
    steps = []  # those that the server reports; it leaves out some

    def stop_at_once(node, done, total):
        if node == "9" and done:
            if not steps:
                server.interrupt()
            steps.append(done)
            assert total == 300

    with pytest.raises(PromptInterrupted):
        server.run(workflow("flowedit_sd3", steps=300, n_max=300, seed=5), stop_at_once, timeout=300)
    assert 1 <= steps[0] <= steps[-1] < 100
    edited_and_source(server, workflow("flowedit_sd3", seed=6))


def test_the_photograph_run(tmp_path, capsys):
    for number in range(2):
        Image.fromarray(photograph(number)).save(tmp_path / f"hill{number}.jpg")
        (tmp_path / f"hill{number}.txt").write_text("a green hill under a blue sky")
    pictures = sorted(tmp_path.glob("*.jpg"))
    photographs.run(pictures, "sd3", 64, 2, tmp_path / "edited")
    assert "2 photographs at 64 px, 2 steps, no failure" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "edited").iterdir()) == ["hill0.png", "hill1.png"]
