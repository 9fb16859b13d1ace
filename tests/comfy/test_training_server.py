"""From a folder of captioned images to tokens in a sampling graph, in one prompt on a real server."""

import json
import random
import subprocess
import sys

import pytest
import torch
from comfyui_softrepa.nodes.training import OPTIONS
from comfyui_softrepa.softrepa import token_files
from PIL import Image
from softrepa_tests.conftest import ROOT

from tools.environment import steady_threads
from tools.server import ComfyServer, PromptError, PromptInterrupted, ServerError, has_accelerator
from tools.standins import stand_in

TRAIN = "SoftREPATrainTokens"
CAPTIONS = ("a red square", "a blue circle", "two cats", "a house by the sea", "an empty street", "green hills")


@pytest.fixture(autouse=True)
def inference():
    """Nothing runs in this process."""


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    work = tmp_path_factory.mktemp("training")
    folder = work / "input" / "my pictures"
    folder.mkdir(parents=True)
    colours = random.Random(0)
    for index, caption in enumerate(CAPTIONS):
        size = (64 + 16 * index, 80)
        colour = tuple(colours.randrange(256) for _ in range(3))
        Image.new("RGB", size, colour).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")
    with ComfyServer(work, extra_models={"checkpoints": [stand_in("sd3").checkpoint.parent]}) as running:
        yield running


def node(class_type: str, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def graph(**training) -> dict:
    train = {"steps": 2, "batch_size": 2, "learning_rate": 0.001, "seed": 0, "temperature": 2.0} | training
    rest = {name: train.pop(name) for name in OPTIONS if name in train}
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name="standin_sd3.safetensors"),
        "data": node("SoftREPADataset", folder="my pictures", clip=["load", 1], vae=["load", 2], resolution=64),
        "options": node("SoftREPATrainingOptions", **rest),
        "train": node(TRAIN, model=["load", 0], dataset=["data", 0], options=["options", 0], **train),
        "apply": node("SoftREPAApplyTokens", model=["load", 0], tokens=["train", 0]),
        "text": node("CLIPTextEncode", text="two cats", clip=["load", 1]),
        "empty": node("EmptySD3LatentImage", width=64, height=64, batch_size=1),
        "sample": node(
            "KSampler",
            model=["apply", 0],
            positive=["text", 0],
            negative=["text", 0],
            latent_image=["empty", 0],
            seed=0,
            steps=1,
            cfg=2.0,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        ),
        "decode": node("VAEDecode", samples=["sample", 0], vae=["load", 2]),
        "picture": node("SaveImage", images=["decode", 0], filename_prefix="trained"),
        "plot": node("LossGraphNode", loss=["train", 1], filename_prefix="loss"),
    }


def test_a_folder_becomes_tokens_and_a_picture(server):
    seen = []
    result = server.run(graph(), lambda name, value, total: seen.append((name, value, total)), timeout=600)
    assert result.images["picture"][0].is_file()
    assert result.images["plot"][0].is_file()
    assert ("train", 2, 2) in seen
    (path,) = (server.work / "models" / "softrepa").glob("trained_*.safetensors")
    tokens = token_files.load(path)
    assert (tokens.family.name, tokens.blocks, tokens.width) == ("sd3", 5, 384)
    assert tokens.metadata["steps"] == "2"
    assert json.loads(tokens.metadata["training"])["temperature"] == 2.0
    options = server.object_info("SoftREPALoadTokens")["input"]["required"]["tokens_name"][1]["options"]
    assert path.name in options


def test_a_prompt_of_the_node_with_all_settings_still_runs(server):
    prompt = json.loads((ROOT / "tests" / "data" / "all_in_one" / "prompt.json").read_text(encoding="utf-8"))
    del prompt["7"], prompt["8"]
    prompt["1"]["inputs"]["ckpt_name"] = "standin_sd3.safetensors"
    prompt["3"]["inputs"] |= {"folder": "my pictures", "resolution": 64}
    prompt["6"]["inputs"] |= {"steps": 1}
    server.run(prompt, timeout=600)
    asked = json.loads(trained(server, "my_sd3_tokens").metadata["inputs"])
    expected = {name: value for name, value in prompt["6"]["inputs"].items() if name in asked}
    assert {name: asked[name] for name in expected} == expected
    assert len(expected) > 20


def test_a_refusal_is_shown_on_the_node(server):
    with pytest.raises(PromptError, match="expected at least batch_size, 20") as caught:
        server.run(graph(batch_size=20), timeout=600)
    assert caught.value.node_id == "train"


def only_training(**training) -> dict:
    """Without the picture and the plot: core's plot divides by zero where all losses are equal."""
    return {name: part for name, part in graph(**training).items() if name in ("load", "data", "options", "train")}


def command_line(server, *arguments) -> str:
    """`python -m softrepa` on the server's folders; its standard output. Fails with what it said."""
    command = [sys.executable, "-m", "softrepa", *map(str, arguments)]
    command += ["--comfyui", str(server.comfyui), "--", "--base-directory", str(server.work)]
    if not has_accelerator():
        command.append("--use-pytorch-cross-attention")  # as the server is started
    done = subprocess.run(command, cwd=ROOT, env=steady_threads(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


def config(server, **training) -> dict:
    parts = graph(**training)
    inputs = parts["train"]["inputs"] | parts["options"]["inputs"]
    inputs = {name: value for name, value in inputs.items() if not isinstance(value, list)}
    return inputs | {"checkpoint": "standin_sd3.safetensors", "folder": "my pictures", "resolution": 64}


def trained(server, name: str):
    return token_files.load(server.work / "models" / "softrepa" / f"{name}_00001.safetensors")


def test_the_command_line_and_the_node_go_on_with_each_others_runs(server, tmp_path):
    extra = {"temperature": 2.0, "caption_dropout": 0.5}
    server.run(only_training(steps=4, filename_prefix="whole", **extra), timeout=600)
    server.run(only_training(steps=2, filename_prefix="node_first", **extra), timeout=600)
    folder = stand_in("sd3").checkpoint.parent
    files = {}
    for name, steps in (("node_first", 4), ("command_first", 2)):
        files[name] = tmp_path / f"{name}.json"
        inputs = config(server, steps=steps, filename_prefix=name, **extra)
        files[name].write_text(json.dumps(inputs | {"checkpoint": str(folder / "standin_sd3.safetensors")}))
    printed = command_line(server, "train", files["node_first"], "--resume")
    assert printed.strip().endswith("node_first_00001.safetensors")
    command_line(server, "train", files["command_first"])
    server.run(only_training(steps=4, filename_prefix="command_first", resume=True, **extra), timeout=600)
    whole = trained(server, "whole")
    for name in files:
        assert torch.equal(trained(server, name).tokens, whole.tokens), name
        assert torch.equal(trained(server, name).time_table, whole.time_table), name


def test_a_trained_file_is_a_config_and_scores(server):
    parts = only_training(steps=1, filename_prefix="first")
    parts["long"] = node("T5TokenizerOptions", clip=["load", 1], min_padding=0, min_length=90)
    parts["data"]["inputs"]["clip"] = ["long", 0]
    server.run(parts, timeout=600)
    file = server.work / "models" / "softrepa" / "first_00001.safetensors"
    checkpoint_path = stand_in("sd3").checkpoint
    command_line(server, "train", file, "--checkpoint", checkpoint_path)
    again = token_files.load(file.with_name("first_00002.safetensors"))
    assert torch.equal(again.tokens, token_files.load(file).tokens)
    options = ("--checkpoint", checkpoint_path, "--batch-size", "3", "--batches", "1", "--timesteps", "500")
    plain = json.loads(command_line(server, "score", file, *options))
    steered = json.loads(command_line(server, "score", file, "--tokens", file, *options))
    assert plain["images"] == steered["images"] == 3
    assert plain["by_timestep"]["information"] != steered["by_timestep"]["information"]


def test_cancelled_and_the_next_prompt_runs(server):
    def cancel(node_id, value, total):
        if node_id == "train" and value >= 2:
            server.interrupt()

    with pytest.raises(PromptInterrupted):  # ComfyUI tells progress by half percents: here every fifth step
        server.run(only_training(steps=1000, filename_prefix="cancelled"), cancel, timeout=600)
    steps = int(trained(server, "cancelled").metadata["steps"])
    assert 2 <= steps < 100
    server.run(only_training(steps=1, filename_prefix="after"), timeout=600)
    server.run(only_training(steps=steps + 1, filename_prefix="cancelled", resume=True), timeout=600)
    assert int(trained(server, "cancelled").metadata["steps"]) == steps + 1


def test_images_deleted_while_it_trains(server):
    folder = server.work / "input" / "short lived"
    folder.mkdir()
    for index in range(40):  # more than the first steps need, which are encoded together
        Image.new("RGB", (64, 64), (6 * index, 9, 9)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"number {index}", encoding="utf-8")
    prompt = only_training(steps=100, filename_prefix="deleted")
    prompt["data"]["inputs"] |= {"folder": "short lived", "cache_gb": 0.0}

    def delete(node_id, value, total):
        if node_id == "train" and value >= 2:
            for image in folder.glob("*.png"):
                image.unlink()

    with pytest.raises(PromptError, match=r"\d\.png") as caught:
        server.run(prompt, delete, timeout=600)
    assert caught.value.node_id == "train"
    assert int(trained(server, "deleted").metadata["steps"]) >= 2


def test_killed_and_gone_on_with(tmp_path):
    folder = tmp_path / "input" / "my pictures"
    folder.mkdir(parents=True)
    for index, caption in enumerate(CAPTIONS):
        Image.new("RGB", (64, 64), (40 * index, 90, 9)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption, encoding="utf-8")
    models = {"checkpoints": [stand_in("sd3").checkpoint.parent]}
    often = {"filename_prefix": "killed", "checkpoint_every": 1}

    def kill(node_id, value, total):
        if node_id == "train" and value >= 3:
            killed.process.kill()

    with ComfyServer(tmp_path, extra_models=models) as killed, pytest.raises((ServerError, OSError)):
        killed.run(only_training(steps=1000, **often), kill, timeout=600)
    with ComfyServer(tmp_path, extra_models=models) as again:
        steps = int(trained(again, "killed").metadata["steps"]) + 2
        again.run(only_training(steps=steps, resume=True, **often), timeout=600)
        again.run(only_training(steps=steps, filename_prefix="whole"), timeout=600)
        assert steps >= 4
        assert torch.equal(trained(again, "killed").tokens, trained(again, "whole").tokens)
