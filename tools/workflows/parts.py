"""Nodes, prompts and sentences that several workflows have."""

from .layout import LINE, LIVE_CURVES, PREVIEW, Group, Node
from .models import Model

SEED = 20250311
POSITIVE = "a red apple on top of a blue book, next to a yellow mug with a green spoon, on a wooden table"
NEGATIVE = "blurry, low quality"
DRAWING = "a child's drawing of a girl in a pink dress on a green hill"
REDRAWN = "a child's drawing of a girl in a red dress on a green hill"
COMPARED = (
    POSITIVE,
    "three cats on a red sofa, one of them black",
    "a green bird to the left of a white teapot",
    "two yellow umbrellas and a blue bicycle in the rain",
    "a man in a purple hat, holding a small brown dog",
    "a stack of four books, the top one orange",
    "a glass of milk behind a bowl of cherries",
    "a wooden sign that says OPEN above a red door",
)
PICTURES = "my_pictures"
README = "the pack's README"
PUBLISHED = ("sd15", "sdxl", "sd3")


def load_tokens(tokens_name: str, source: list | None) -> Node:
    inputs = {"model": source} if source else {}
    return Node("SoftREPALoadTokens", "Load SoftREPA Tokens", inputs | {"tokens_name": tokens_name}, height=LINE)


def apply_tokens(model: list, tokens: list) -> Node:
    return Node("SoftREPAApplyTokens", "Apply SoftREPA Tokens", {"model": model, "tokens": tokens}, height=LINE)


def prompt(title: str, clip: list, text: str) -> Node:
    return Node("CLIPTextEncode", title, {"clip": clip, "text": text}, height=70)


def sampler(title: str, model: list, settings: dict) -> Node:
    inputs = {
        "model": model,
        "seed": ["3", 0],
        "positive": ["5", 0],
        "negative": ["6", 0],
        "latent_image": ["7", 0],
        "sampler_name": "euler",
        "denoise": 1.0,
    }
    return Node("KSampler", title, inputs | settings, height=PREVIEW)


def decode(title: str, samples: str, vae: list) -> Node:
    return Node("VAEDecode", title, {"samples": [samples, 0], "vae": vae})


def side_by_side(title: str, left: list, right: list) -> Node:
    inputs = {
        "image1": left,
        "image2": right,
        "direction": "right",
        "match_image_size": False,
        "spacing_width": 0,
        "spacing_color": "white",
    }
    return Node("ImageStitch", title, inputs)


def blend(title: str, one: list, other: list, mode: str) -> Node:
    return Node("ImageBlend", title, {"image1": one, "image2": other, "blend_factor": 1.0, "blend_mode": mode})


def difference(title: str, one: list, other: list) -> Node:
    """What `one` has more; below 0 it is black."""
    return blend(title, one, other, "difference")


def enlarge(source: str) -> Node:
    return Node("ImageScaleBy", "Enlarge", {"image": [source, 0], "upscale_method": "nearest-exact", "scale_by": 4.0})


def save_image(source: str, prefix: str) -> Node:
    return Node("SaveImage", "Save Image", {"images": [source, 0], "filename_prefix": prefix}, height=240)


def flowedit_sampler(model: list, source: str, target: str, negative: str, latent: str, settings: dict) -> Node:
    inputs = {
        "model": model,
        "source_positive": [source, 0],
        "source_negative": [negative, 0],
        "target_positive": [target, 0],
        "target_negative": [negative, 0],
        "latent_image": [latent, 0],
        "seed": SEED,
        "steps": 50,
        "scheduler": "normal",
        "source_cfg": 3.5,
        "target_cfg": 13.5,
        "n_max": 33,
        "n_min": 0,
        "n_avg": 1,
    }
    return Node("SoftREPAFlowEdit", "FlowEdit Sampler", inputs | settings, height=PREVIEW)


def dataset(folder: str | list, clip: list, vae: list, resolution: int = 512) -> Node:
    inputs = {
        "folder": folder,
        "clip": clip,
        "vae": vae,
        "resolution": resolution,
        "bucketing": False,
        "validation_percent": 10.0,
        "cache_gb": 50.0,
    }
    return Node("SoftREPADataset", "Caption-Image Folder", inputs, height=2 * LINE)


def train(model: list, dataset: str, vae: list, settings: dict) -> Node:
    inputs = {
        "model": model,
        "dataset": [dataset, 0],
        "preview_positive": ["4", 0],
        "preview_negative": ["5", 0],
        "vae": vae,
        "batch_size": 4,
        "learning_rate": 0.001,
        "seed": 0,
    }
    return Node("SoftREPATrainTokens", "Train SoftREPA Tokens", inputs | settings, height=LIVE_CURVES + PREVIEW + LINE)


def model_group(model: Model) -> Group:
    return Group("Model", tuple(model.loaders))


FOLDER_STEP = (
    "Put pictures with captions (cat.jpg beside cat.txt) into a folder below ComfyUI's input, press R, choose it."
)
TOKENS_STEP = "Choose your token file in Load SoftREPA Tokens."


def model_step(model: Model) -> str:
    kind = "checkpoint" if len(model.files) == 1 else "model files"
    return f"Choose your {model.title} {kind}."


def model_advice(model: Model) -> tuple[str, ...]:
    """Where its files are published, and what that asks."""
    links = ", ".join(file.page for file in model.files)
    return (f"**{model.title}**, for example: {links}. {model.licence}", *model.advice)


def tokens_advice(model: Model) -> str:
    if model.family in PUBLISHED:
        return f"Token files live in *models/softrepa*; {README} says where to get the published ones."
    return f"Token files live in *models/softrepa*. Nobody has published any for {model.title}: train your own."
