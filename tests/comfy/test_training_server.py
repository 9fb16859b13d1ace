"""From a folder of captioned images to tokens in a sampling graph, in one prompt on a real server."""

import json
import random

import pytest
from comfyui_softrepa.softrepa import checkpoint
from PIL import Image

from benchmarks.server import ComfyServer, PromptError
from benchmarks.standins import stand_in

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
    return {
        "load": node("CheckpointLoaderSimple", ckpt_name="standin_sd3.safetensors"),
        "data": node("SoftREPADataset", folder="my pictures", clip=["load", 1], vae=["load", 2], resolution=64),
        "train": node("SoftREPATrain", model=["load", 0], dataset=["data", 0], **train),
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
    tokens = checkpoint.load(path)
    assert (tokens.family.name, tokens.blocks, tokens.width) == ("sd3", 5, 384)
    assert tokens.metadata["steps"] == "2"
    assert json.loads(tokens.metadata["training"])["temperature"] == 2.0
    options = server.object_info("SoftREPALoadTokens")["input"]["required"]["tokens_name"][1]["options"]
    assert path.name in options


def test_a_refusal_is_shown_on_the_node(server):
    with pytest.raises(PromptError, match="expected at least batch_size, 20") as caught:
        server.run(graph(batch_size=20), timeout=600)
    assert caught.value.node_id == "train"
