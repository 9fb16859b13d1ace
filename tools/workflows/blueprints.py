"""Parts of graphs that people put down as one node."""

from .layout import LINE, LIVE_CURVES, Blueprint, Column, Group, Node
from .parts import (
    COMPARED,
    PICTURES,
    dataset,
    flowedit_sampler,
    side_by_side,
)


def sampling_blueprint() -> Blueprint:
    samplers, both = ("8", "9"), ("10", "11")
    shared = ("seed", "steps", "cfg", "sampler_name", "scheduler")
    settings = {"seed": 0, "steps": 28, "cfg": 4.5, "sampler_name": "euler", "scheduler": "normal"}
    nodes = {
        "2": Node("SoftREPAApplyTokens", "Apply SoftREPA Tokens", {}, height=LINE),
        "8": Node("KSampler", "Sample without tokens", settings),
        "9": Node("KSampler", "Sample with tokens", settings | {"model": ["2", 0]}),
        "10": Node("VAEDecode", "Decode without tokens", {"samples": ["8", 0]}),
        "11": Node("VAEDecode", "Decode with tokens", {"samples": ["9", 0]}),
        "12": side_by_side("Left: without, right: with", ["10", 0], ["11", 0]),
    }
    return Blueprint(
        name="Sample with and without tokens",
        description="Draws one seed with the model as it is and with soft tokens, and puts both beside each other.",
        nodes=nodes,
        columns=(
            Column((Group("Tokens", ("2",)),)),
            Column((Group("Sample", samplers),)),
            Column((Group("Side by side", (*both, "12")),)),
        ),
        inputs=(
            ("model", ("2", "model"), ("8", "model")),
            ("tokens", ("2", "tokens")),
            *((name, *((key, name) for key in samplers)) for name in ("positive", "negative", "latent_image")),
            ("vae", *((key, "vae") for key in both)),
            ("strength", ("2", "strength")),
            *((name, *((key, name) for key in samplers)) for name in shared),
        ),
        outputs=(("side by side", "12", 0), ("without", "10", 0), ("with", "11", 0)),
    )


def editing_blueprint() -> Blueprint:
    prompts = ("6", "7", "8")
    nodes = {
        "4": Node(
            "ImageScaleToTotalPixels",
            "Size",
            {"upscale_method": "lanczos", "megapixels": 1.0, "resolution_steps": 16},
        ),
        "5": Node("VAEEncode", "Encode", {"pixels": ["4", 0]}),
        "6": Node("CLIPTextEncode", "Source prompt", {"text": ""}, height=70),
        "7": Node("CLIPTextEncode", "Target prompt", {"text": ""}, height=70),
        "8": Node("CLIPTextEncode", "Negative prompt of both", {"text": ""}, height=70),
        "9": flowedit_sampler([], "6", "7", "8", "5", {"seed": 0}),
        "10": Node("VAEDecode", "Decode", {"samples": ["9", 0]}),
        "16": side_by_side("Left: source, right: edit", ["4", 0], ["10", 0]),
    }
    del nodes["9"].inputs["model"]
    return Blueprint(
        name="Edit a photograph",
        description="Changes what an image of about one megapixel shows, by a prompt that says what it shows and one "
        "that says what it should show (FlowEdit).",
        nodes=nodes,
        columns=(
            Column((Group("Image", ("4",)),)),
            Column((Group("Encode", ("5",)), Group("Prompts", prompts))),
            Column((Group("Edit", ("9",)),)),
            Column((Group("Side by side", ("10", "16")),)),
        ),
        inputs=(
            ("model", ("9", "model")),
            ("clip", *((key, "clip") for key in prompts)),
            ("vae", ("5", "vae"), ("10", "vae")),
            ("image", ("4", "image")),
            ("what it shows", ("6", "text")),
            ("what it should show", ("7", "text")),
            *((name, ("9", name)) for name in ("seed", "steps", "source_cfg", "target_cfg", "n_max")),
        ),
        outputs=(("edit", "10", 0), ("side by side", "16", 0)),
    )


def training_blueprint() -> Blueprint:
    compare = {
        "tokens": ["6", 0],
        "judge": ["4", 0],
        "prompts": "\n".join(COMPARED),
        "seeds": "0, 1",
        "filename_prefix": "trained",
    }
    nodes = {
        "3": dataset(PICTURES, [], []),
        "4": Node("SoftREPAAlignmentJudge", "Judge: Alignment", {}, height=24),
        "6": Node("SoftREPATrainTokens", "Train SoftREPA Tokens", {"dataset": ["3", 0]}, height=LIVE_CURVES),
        "5": Node("SoftREPACompare", "Compare Tokens", compare, height=200),
    }
    for name in ("clip", "vae"):
        del nodes["3"].inputs[name]
    return Blueprint(
        name="Train and compare",
        description="Trains soft tokens on a folder of captioned pictures, then draws prompts without and with them "
        "and says whether the difference is more than chance.",
        nodes=nodes,
        columns=(
            Column((Group("Pictures and captions", ("3",)), Group("Judge", ("4",)))),
            Column((Group("Training", ("6",)),), 400),
            Column((Group("Comparison", ("5",)),), 480),
        ),
        inputs=(
            ("model", ("6", "model"), ("5", "model")),
            ("clip", ("3", "clip"), ("5", "clip")),
            ("vae", ("3", "vae"), ("5", "vae")),
            ("folder", ("3", "folder")),
            ("resolution", ("3", "resolution")),
            ("training steps", ("6", "steps")),
            ("preset", ("6", "preset")),
            ("prompts", ("5", "prompts")),
            ("sampling steps", ("5", "steps")),
            *((name, ("5", name)) for name in ("cfg", "width", "height")),
        ),
        outputs=(("tokens", "6", 0), ("grid", "5", 0), ("table", "5", 2)),
    )
