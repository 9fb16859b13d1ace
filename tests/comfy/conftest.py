"""A real ComfyUI in this process, on the CPU unless there is a GPU, with its folders in a temporary place."""

import asyncio
import os

import pytest
import torch
from softrepa_tests.conftest import ROOT

if "COMFYUI_PATH" not in os.environ:
    pytest.exit("tests/comfy needs COMFYUI_PATH; `python3 -m tests.run` prepares one", returncode=2)

from comfy.cli_args import args

args.cpu = not torch.cuda.is_available()
args.use_pytorch_cross_attention = True  # as on a GPU; what a CPU has by default is several times slower

# main.py imports it first; on 0.3.75 another module takes the name otherwise.
import utils.extra_config  # noqa: E402, F401, I001

import folder_paths  # noqa: E402
import nodes  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def comfy_folders(tmp_path_factory):
    """models/, output/, input/ and temp/ below a temporary folder, with the pack's own model folder in it."""
    base = tmp_path_factory.mktemp("comfyui")
    folder_paths.models_dir = str(base / "models")
    for name in ("output", "input", "temp"):
        (base / name).mkdir()
        getattr(folder_paths, f"set_{name}_directory")(str(base / name))
    from comfyui_softrepa.softrepa.comfy import folders

    folders.register()
    return base


@pytest.fixture(autouse=True)
def inference():
    """Nodes run in inference mode."""
    with torch.inference_mode():
        yield


@pytest.fixture
def token_folder(comfy_folders):
    """models/softrepa, emptied after the test, and with it what runs left in the output folder."""
    import shutil

    from comfyui_softrepa.softrepa.comfy import folders

    folder = comfy_folders / "models" / "softrepa"
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    shutil.rmtree(folder)
    folder.mkdir()
    shutil.rmtree(comfy_folders / "output" / folders.RUNS, ignore_errors=True)


class Models(dict):
    """By family, each built when it is asked for; tests clone, never change them."""

    def __init__(self, build):
        super().__init__()
        self.build = build

    def __missing__(self, family: str):
        with torch.inference_mode():
            self[family] = self.build(family)
        return self[family]


@pytest.fixture(scope="session")
def models() -> Models:
    from softrepa_tests import tiny_models

    return Models(tiny_models.build)


@pytest.fixture(scope="session")
def golden_models() -> Models:
    from softrepa_tests import tiny_models

    return Models(tiny_models.golden)


@pytest.fixture(scope="session")
def pack(comfy_folders):
    """Our node classes by id, as ComfyUI's own loader registers them."""
    before = set(nodes.NODE_CLASS_MAPPINGS)
    assert asyncio.run(nodes.load_custom_node(str(ROOT))), "the pack failed to load"
    return {name: nodes.NODE_CLASS_MAPPINGS[name] for name in set(nodes.NODE_CLASS_MAPPINGS) - before}
