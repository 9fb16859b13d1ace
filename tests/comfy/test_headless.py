"""What the command line does with ComfyUI's own options, a configuration's CLIP and Ctrl+C."""

import os
import signal
from types import SimpleNamespace

import comfy.model_management as memory
import pytest
from comfyui_softrepa.softrepa.comfy import headless, startup
from comfyui_softrepa.softrepa.comfy.identity import clip_identity
from comfyui_softrepa.softrepa.errors import SoftREPAError

import nodes
from tools.standins import stand_in

NO_CHOICE = {"default_device": None, "cuda_device": None, "oneapi_device_selector": None, "deterministic": False}


def test_devices_are_chosen_as_the_server_does(monkeypatch):
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG"):
        monkeypatch.setenv(name, "before")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    startup.choose_devices(SimpleNamespace(**NO_CHOICE))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "before"
    startup.choose_devices(SimpleNamespace(**NO_CHOICE | {"cuda_device": 1, "deterministic": True}))
    assert os.environ["CUDA_VISIBLE_DEVICES"] == os.environ["HIP_VISIBLE_DEVICES"] == "1"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    startup.choose_devices(SimpleNamespace(**NO_CHOICE | {"default_device": 2}))
    assert os.environ["CUDA_VISIBLE_DEVICES"].startswith("2,0,1,3,")


def test_the_clip_is_as_the_nodes_had_set_it():
    _, clip, _ = headless.load_checkpoint(str(stand_in("sd15").checkpoint))
    changed = nodes.CLIPSetLastLayer().set_last_layer(clip, -2)[0]
    changed.set_tokenizer_option("t5xxl_min_length", 512)
    inputs = {"clip_layer": -2, "tokenizer_options": {"t5xxl_min_length": 512}, "folder": "x"}
    found = headless.set_clip(inputs, clip)
    assert inputs == {"folder": "x"}
    assert clip_identity(found) == clip_identity(changed) != clip_identity(clip)
    with pytest.raises(SoftREPAError, match="tokenizer_options has t5xxl_min_length 'long', expected a whole number"):
        headless.set_clip({"tokenizer_options": {"t5xxl_min_length": "long"}}, clip)


@pytest.fixture
def ctrl_c():
    """As in a terminal, wherever the tests run; and no interrupt is left behind."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
    memory.interrupt_current_processing(False)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_lets_a_step_end():
    done = []
    with pytest.raises(KeyboardInterrupt), headless.interrupted_between_steps():
        signal.raise_signal(signal.SIGINT)
        done.append("the step")
        memory.throw_exception_if_processing_interrupted()
    assert done
    with pytest.raises(KeyboardInterrupt), headless.interrupted_between_steps():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # at once
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("ctrl_c")
def test_an_ignored_ctrl_c_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with headless.interrupted_between_steps():
        signal.raise_signal(signal.SIGINT)
        memory.throw_exception_if_processing_interrupted()
