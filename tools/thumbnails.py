"""The pictures of the templates and help pages: each shipped workflow run on the small world, in a real ComfyUI.

    python3 -m tools.thumbnails [NAME ...]

writes workflows/*.jpg and nodes/web/docs/*.jpg. A workflow keeps its graph; its model, tokens, prompts, pictures and
sizes become the small world's. Needs Chromium.
"""

import argparse
import json
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from . import environment

ROOT = Path(__file__).absolute().parents[1]
HELP = ROOT / "nodes" / "web" / "docs"
GRAPH = ROOT / "workflows" / "api" / "small_world.jpg"
FOLDER = "my_pictures"
SOURCE = "a red circle and a blue square"
TARGET = "a red circle and a green square"
COMPARED = (
    "two small red circles left of a blue square",
    "three green crosses",
    "a yellow triangle above a purple diamond",
    "a black square and an orange circle",
    "four blue diamonds",
    "a red cross",
    "a green circle right of a black cross",
    "two purple squares and a yellow circle",
)
WIDTH = 768
SMALLEST_SHOWN = 576
CAPTIONS = {
    "small_world_training": "without, with tokens",
    "small_world_edit": "before, after",
    "small_world": "without, with tokens",
    "text_to_image": "without, with tokens",
    "flowedit_sd3_mask": "before, after, difference",
    "flowedit": "before, after",
    "train": "training",
    "score": "without, with tokens",
    "compare": "without, with tokens",
    "convert": "what is in the file",
}
"""By how the workflow's name begins."""
QUALITY = 75  # of screenshots: the archive that ComfyUI Manager installs is small
TALLEST_NODE = 1600  # pixels, of the page that nodes are photographed in
SHAPE = 4 / 3  # of a thumbnail: a template's card cuts off what is higher or wider


@dataclass(frozen=True)
class Picture:
    """What a workflow's run leaves: `output` is the node's title, or a file below ComfyUI's output folder.

    run: the workflow whose run it is, where that is another one.
    """

    output: str
    prompts: dict[str, str] = field(default_factory=dict)
    help_page: str | None = None
    run: str | None = None


PICTURES = {
    "small_world": Picture("Save Image", help_page="SoftREPASmallWorld"),
    "small_world_training": Picture("SoftREPA Alignment Score"),
    "small_world_edit": Picture("Save Image"),
    "text_to_image_sd15": Picture("Save Image", {"Positive prompt": "a large green triangle"}),
    "text_to_image_sdxl": Picture("Save Image", {"Positive prompt": "a small red circle"}),
    "text_to_image_sd3": Picture("Save Image", {"Positive prompt": "two blue squares"}),
    "text_to_image_flux": Picture("Save Image", {"Positive prompt": "three orange triangles"}),
    "text_to_image_zimage": Picture("Save Image", {"Positive prompt": "a purple diamond above a green cross"}),
    "text_to_image_qwenimage": Picture("Save Image", {"Positive prompt": "four small black circles"}),
    "flowedit_sd3": Picture("Save Image", help_page="SoftREPAFlowEdit"),
    "flowedit_sdxl": Picture("Save Image", {"Target": "a red circle and a purple triangle"}),
    "flowedit_sd3_mask": Picture("Save Image", {"Target": "a green circle and a green square"}),
    "flowedit_flux": Picture("Save Image", {"Target": "a red circle and a blue triangle"}),
    "flowedit_zimage": Picture("Save Image", {"Target": "a yellow circle and a blue square"}),
    "flowedit_qwenimage": Picture("Save Image", {"Target": "a red circle and a black square"}),
    "train_sd3": Picture("curves.png", help_page="SoftREPATrainTokens"),
    "train_flux": Picture("Plot Loss Graph", run="train_sd3"),
    "train_zimage": Picture("Preview SoftREPA Tokens", run="train_sd3"),
    "train_qwenimage": Picture("step_000060.png", run="train_sd3"),
    "score_sd3": Picture("Score without and with tokens", help_page="SoftREPAScore"),
    "compare_sd3": Picture("Compare Tokens", help_page="SoftREPACompare"),
    "convert_tokens": Picture("Preview SoftREPA Tokens", help_page="SoftREPAPreviewTokens"),
}


NODES = (
    "SoftREPALoadTokens",
    "SoftREPAApplyTokens",
    "SoftREPADataset",
    "SoftREPASmallWorldPictures",
    "SoftREPADatasetFromLatents",
    "SoftREPAFlowEditGuider",
    "SoftREPAFlowEditSampler",
    "SoftREPASaveTokens",
    "SoftREPATrainingOptions",
    "SoftREPACompareScores",
    "SoftREPAAlignmentJudge",
    "SoftREPAQuestionJudge",
    "SoftREPACLIPJudge",
)


def on_the_small_world(graph: dict, picture: Picture) -> dict:
    """The shipped graph with the small world's model, tokens, prompts, pictures and sizes."""
    from softrepa.smallworld.checkpoint import CHECKPOINT_NAME, TOKENS

    settings = {
        "CheckpointLoaderSimple": {"ckpt_name": CHECKPOINT_NAME},
        "SoftREPALoadTokens": {"tokens_name": TOKENS.name},
        "EmptyLatentImage": {"width": 96, "height": 96},
        "EmptySD3LatentImage": {"width": 96, "height": 96},
        "LoadImage": {"image": "source.png"},
        "ImageScale": {"width": 96, "height": 96},
        "SolidMask": {"width": 40, "height": 40},
        "MaskComposite": {"x": 56, "y": 28},
        "PrimitiveInt": {"value": 1},
        "KSampler": {"steps": 20, "cfg": 1.0, "scheduler": "simple"},
        "SoftREPAFlowEdit": {"steps": 20, "n_max": 16, "source_cfg": 1.5, "target_cfg": 4.0, "scheduler": "normal"},
        "SoftREPADataset": {"folder": FOLDER, "resolution": 96},
        "SoftREPATrainTokens": {"steps": 60, "preview_every": 20, "filename_prefix": "thumbnail"},
        "SoftREPACompare": {
            "prompts": "\n".join(COMPARED),
            "seeds": "0, 1",
            "width": 96,
            "height": 96,
            "steps": 20,
            "cfg": 1.0,
            "scheduler": "simple",
        },
        "SoftREPAScore": {"batch_size": 4, "batches": 24, "timesteps": "500,700,800,900,950"},
    }
    prompts = {"Source": SOURCE, "Target": TARGET, "previews": SOURCE} | picture.prompts
    as_a_checkpoint(graph)
    for node in graph.values():
        node["inputs"] |= settings.get(node["class_type"], {})
        if node["class_type"] == "CLIPTextEncode":
            title = node["_meta"]["title"]
            texts = [text for words, text in prompts.items() if words in title]
            node["inputs"]["text"] = "" if "egative" in title else (texts or [node["inputs"]["text"]])[-1]
    return graph


def as_a_checkpoint(graph: dict) -> None:
    """Loaders of separate files give way to the checkpoint's, and what shifts a model's noise levels to the model."""
    outputs = {"UNETLoader": 0, "ModelSamplingAuraFlow": 0, "CLIPLoader": 1, "DualCLIPLoader": 1, "VAELoader": 2}
    places = {key: outputs[node["class_type"]] for key, node in graph.items() if node["class_type"] in outputs}
    for key in places:
        del graph[key]
    for node in graph.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in places:
                node["inputs"][name] = ["1", places[value[0]]]
    if places:
        graph["1"] = {"class_type": "CheckpointLoaderSimple", "inputs": {}, "_meta": {"title": "Checkpoint"}}


def prepare(work: Path) -> None:
    """The small world's tokens, a folder of drawn pictures with captions, and a picture to edit with a mask."""
    import shutil

    import numpy as np
    from PIL import Image

    from softrepa.smallworld.checkpoint import TOKENS
    from softrepa.smallworld.pictures import write_pictures
    from softrepa.smallworld.world import Scene, Thing, draw

    (work / "models" / "softrepa").mkdir(parents=True)
    shutil.copy(TOKENS, work / "models" / "softrepa")
    write_pictures(work / "input" / FOLDER, 240, seed=0)
    things = (Thing("circle", "red", "large", 16.0, 48.0), Thing("square", "blue", "large", 80.0, 48.0))
    scene = Scene(things, (0.9, 0.92, 0.9, 0.0, 0.03))
    alpha = np.ones((96, 96, 1))
    alpha[:, 56:] = 0  # what ComfyUI's mask editor makes of a painted region
    pixels = np.concatenate([draw(scene), alpha], axis=-1)
    Image.fromarray((pixels * 255).round().astype(np.uint8)).save(work / "input" / "source.png")


def photograph_graph(server) -> None:
    """The first template after its run."""
    from PIL import Image

    from .frontend import Frontend, chromium
    from .workflows import WORKFLOWS

    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        page = Frontend(browser.new_page(viewport={"width": 1800, "height": 1000}), server.port, Path(folder))
        page.open()
        page.open_template(WORKFLOWS[0].title)
        page.run()
        with Image.open(page.screenshot("graph")) as image:
            image.convert("RGB").save(GRAPH, quality=QUALITY)


def photograph_nodes(server, class_types: list[str]) -> None:
    """Nodes whose runs leave no picture, as they are added to a graph."""
    from PIL import Image

    from .frontend import Frontend, chromium

    with chromium() as browser, tempfile.TemporaryDirectory() as folder:
        page = Frontend(browser.new_page(viewport={"width": 1800, "height": TALLEST_NODE}), server.port, Path(folder))
        page.open()
        for class_type in class_types:
            page.clear()
            page.add(class_type)
            page.zoom(1.6, (-150, -120))
            with Image.open(page.screenshot(class_type, page.box(page.nodes()[0]["id"], margin=40))) as image:
                image.convert("RGB").save(HELP / f"{class_type}.jpg", quality=QUALITY)


def run(server, name: str, results: dict) -> Path:
    """Runs the workflow, if it has not run for another picture; returns the picture that it left."""
    picture = PICTURES[name]
    name = picture.run or name
    graph = json.loads((ROOT / "workflows" / "api" / f"{name}.json").read_text(encoding="utf-8"))
    if name not in results:
        results[name] = server.run(on_the_small_world(graph, picture))
    result = results[name]
    if picture.output.endswith(".png"):
        return max((server.work / "output").rglob(picture.output), key=lambda path: path.stat().st_mtime)
    (key,) = (key for key, node in graph.items() if node["_meta"]["title"] == picture.output)
    return result.images[key][0]


def thumbnail(source: Path, label: str):
    """The picture on a card of its own: enlarged without smoothing where it is small; below it, whose model it is."""
    from PIL import Image

    height = round(WIDTH / SHAPE)
    from PIL import ImageDraw, ImageFont

    with Image.open(source) as file:
        image = file.convert("RGB")
    scale = min(WIDTH / image.width, height / image.height)
    method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    image = image.resize((round(image.width * scale), round(image.height * scale)), method)
    card = Image.new("RGB", (WIDTH, height), (24, 24, 27))
    card.paste(image, ((WIDTH - image.width) // 2, (height - image.height) // 2))
    if label:
        draw, font = ImageDraw.Draw(card), ImageFont.load_default(44)
        width = draw.textlength(label, font)
        draw.rectangle((0, height - 68, width + 40, height), (24, 24, 27))
        draw.text((20, height - 34), label, (240, 240, 240), font, anchor="lm")
    return card


def caption(workflow) -> str:
    """Whose model it is for, and what the picture shows from left to right."""
    model = re.search(r"\((.*)\)$", workflow.title)
    shown = next((words for start, words in CAPTIONS.items() if workflow.name.startswith(start)), "")
    return ": ".join(filter(None, (model and model[1], shown)))


def readable(image):
    """As it is, or enlarged without smoothing."""
    from PIL import Image

    factor = max(1, SMALLEST_SHOWN // image.width)
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tools.thumbnails", description=__doc__.splitlines()[0])
    parser.add_argument(
        "names",
        nargs="*",
        metavar="NAME",
        choices=[*PICTURES, *NODES, "graph", []],
        help="workflows, nodes, or graph; all of them",
    )
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    environment.enter("tools.thumbnails", arguments.comfyui, arguments.python)

    from PIL import Image

    from softrepa.smallworld.checkpoint import cached_checkpoint

    from .server import ComfyServer
    from .workflows import WORKFLOWS

    checkpoint = cached_checkpoint(environment.cache_folder())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        prepare(work)
        with ComfyServer(work, extra_models={"checkpoints": [checkpoint.parent]}) as server:
            results: dict = {}
            for workflow in WORKFLOWS:
                if arguments.names and workflow.name not in arguments.names:
                    continue
                source = run(server, workflow.name, results)
                thumbnail(source, caption(workflow)).save(ROOT / "workflows" / f"{workflow.title}.jpg", quality=88)
                if page := PICTURES[workflow.name].help_page:
                    with Image.open(source) as image:
                        readable(image.convert("RGB")).save(HELP / f"{page}.jpg", quality=90)
                print(workflow.title, flush=True)
            if not arguments.names or "graph" in arguments.names:
                photograph_graph(server)
            if class_types := [name for name in NODES if not arguments.names or name in arguments.names]:
                photograph_nodes(server, class_types)


if __name__ == "__main__":
    main()
