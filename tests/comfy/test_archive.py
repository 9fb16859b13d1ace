"""The pack as the registry distributes it, in a fresh process of a real ComfyUI."""

import shutil

import pytest
from softrepa_tests.conftest import ROOT
from softrepa_tests.repository import shipped

from benchmarks.import_time import load_in_fresh_process

LIGHT = {"PIL.ImageCms", "PIL._imagingcms"}
"""What images of other colour spaces need; everything else the pack uses is there when ComfyUI has started."""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The archive's files, unpacked where Manager would put them."""
    pack = tmp_path_factory.mktemp("custom_nodes") / "comfyui-softrepa"
    for path in shipped():
        (pack / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, pack / path)
    return pack


@pytest.fixture(scope="module")
def load(installed):
    return load_in_fresh_process(installed)


def test_every_node_is_there(load, pack):
    assert load.nodes == sorted(pack)


def test_loads_nothing_but_itself(load, installed):
    """Start-up stays fast: nothing is imported that ComfyUI has not imported already."""
    foreign = {name for name, file in load.modules.items() if file is None or not file.startswith(str(installed))}
    assert foreign <= LIGHT
