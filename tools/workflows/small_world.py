"""Templates of the model that comes with the pack: they run without a download."""

from .layout import LINE, NOTE_WIDTH, App, Column, Group, Node, Note, Workflow
from .parts import (
    apply_tokens,
    dataset,
    decode,
    enlarge,
    flowedit_sampler,
    prompt,
    sampler,
    save_image,
    side_by_side,
    train,
)

SMALL_WORLD = {"1": Node("SoftREPASmallWorld", "Load Small World", {}, height=24)}
SMALL_WORLD_SAMPLING = {"steps": 20, "cfg": 2.0, "scheduler": "simple"}
SMALL_WORLD_WORDS = (
    "It knows circles, squares, triangles, diamonds and crosses; red, orange, yellow, green, blue, purple and black; "
    "small and large; one to four; and left of, right of, above and below."
)


def small_world() -> Workflow:
    """Without and with tokens, on the model that comes with the pack."""
    clip, vae = ["1", 1], ["1", 2]
    without_guidance = SMALL_WORLD_SAMPLING | {"cfg": 1.0}
    nodes = {
        **SMALL_WORLD,
        "2": apply_tokens(["1", 0], ["1", 3]),
        "5": prompt("Positive prompt", clip, "a square and a cross"),
        "6": prompt("Negative prompt", clip, ""),
        "3": Node("PrimitiveInt", "Seed of both images", {"value": 1}),
        "7": Node("EmptySD3LatentImage", "Image size", {"width": 96, "height": 96, "batch_size": 1}),
        "8": sampler("Sample without tokens", ["1", 0], without_guidance),
        "9": sampler("Sample with tokens", ["2", 0], without_guidance),
        "10": decode("Decode without tokens", "8", vae),
        "11": decode("Decode with tokens", "9", vae),
        "12": side_by_side("Left: without, right: with", ["10", 0], ["11", 0]),
        "18": enlarge("12"),
        "13": save_image("18", "SoftREPA_small_world"),
    }
    return Workflow(
        name="small_world",
        title="Try it without a download",
        note=Note(
            "A small world",
            (
                "Press Run: it takes seconds, on a CPU too.",
                'Then change the positive prompt: "three purple diamonds", "a black square above a yellow circle", or '
                "the seed.",
            ),
            (
                "A text-to-image model of 4M parameters comes with this pack, and tokens that **Train SoftREPA "
                "Tokens** made for it. It draws cleanly and reads loosely, as large models do.",
                SMALL_WORLD_WORDS,
                "The tokens act most without guidance, at *cfg* 1, and often nothing of them shows: a little more of "
                "what is asked for is drawn, now and then with something nobody asked for. Guidance, *cfg* 2, does "
                "more.",
            ),
        ),
        nodes=nodes,
        columns=(
            Column((Group("Model", ("1",)),), NOTE_WIDTH),
            Column((Group("Tokens", ("2",)), Group("Prompt, seed and size", ("5", "6", "3", "7")))),
            Column((Group("Without tokens", ("8",)), Group("With tokens", ("9",)))),
            Column((Group("Side by side", ("10", "11", "12", "18", "13")),), 420),
        ),
        app=App((("5", "text"), ("3", "value"), ("2", "strength")), ("13",)),
    )


def small_world_training() -> Workflow:
    """From a folder of pictures to tokens and their score, in some minutes, on the model that comes with the pack."""
    clip, vae = ["1", 1], ["1", 2]
    settings = {
        "steps": 40,
        "learning_rate": 0.002,
        "filename_prefix": "my_small_world_tokens",
        "preview_every": 20,
    }
    score = {
        "model": ["1", 0],
        "dataset": ["3", 0],
        "other_model": ["8", 0],
        "batch_size": 8,
        "batches": 4,
        "timesteps": "900,950",
        "seed": 0,
    }
    nodes = {
        **SMALL_WORLD,
        "2": Node("SoftREPASmallWorldPictures", "Small World Pictures", {"count": 128, "seed": 0}, height=LINE),
        "3": dataset(["2", 0], clip, vae, 96),
        "4": prompt("Positive prompt of the previews", clip, "a red circle and a blue square"),
        "5": prompt("Negative prompt of the previews", clip, ""),
        "6": train(["1", 0], "3", vae, settings),
        "8": apply_tokens(["1", 0], ["6", 0]),
        "9": Node("SoftREPAScore", "SoftREPA Alignment Score", score, height=420),
    }
    nodes["3"].inputs["validation_percent"] = 25.0
    return Workflow(
        name="small_world_training",
        title="Train and score without a download",
        note=Note(
            "Training, in some minutes",
            (
                "Press Run: pictures with captions are drawn into a folder, tokens learn from them, and a score says "
                "whether they help.",
                "Then look at ComfyUI's input folder: yours looks like small_world_128_0.",
            ),
            (
                "A quarter of the pictures is not trained on (*validation_percent*). The score asks for each of them "
                "which of eight captions is its own, without the tokens (model) and with them (other model), at the "
                "same noise, and says whether the difference is more than chance.",
                "So few steps change little, and the score often cannot tell; *steps* 300 learns more. "
                "The file is in *models/softrepa*.",
            ),
        ),
        nodes=nodes,
        columns=(
            Column((Group("Model", ("1",)), Group("Pictures", ("2",))), NOTE_WIDTH),
            Column((Group("Pictures and captions", ("3",)), Group("Preview", ("4", "5")))),
            Column((Group("Training", ("6",)),), 400),
            Column((Group("Does it help?", ("8", "9")),), 560),
        ),
    )


def small_world_edit() -> Workflow:
    """A drawn picture edited by FlowEdit, on the model that comes with the pack."""
    clip, vae = ["1", 1], ["1", 2]
    settings = {"seed": 1, "steps": 20, "source_cfg": 1.5, "target_cfg": 4.0, "n_max": 16}
    nodes = {
        **SMALL_WORLD,
        "3": Node("PrimitiveInt", "Seed of the picture", {"value": 1}),
        "5": prompt("What the picture shows", clip, "a red circle and a blue square"),
        "14": prompt("What it should show after the edit", clip, "a green circle and a blue square"),
        "6": prompt("Negative prompt", clip, ""),
        "7": Node("EmptySD3LatentImage", "Image size", {"width": 96, "height": 96, "batch_size": 1}),
        "8": sampler("Draw the picture", ["1", 0], SMALL_WORLD_SAMPLING),
        "15": flowedit_sampler(["1", 0], "5", "14", "6", "8", settings),
        "10": decode("Decode the picture", "8", vae),
        "16": decode("Decode the edit", "15", vae),
        "12": side_by_side("Left: source, right: edit", ["10", 0], ["16", 0]),
        "18": enlarge("12"),
        "13": save_image("18", "SoftREPA_small_world_edit"),
    }
    return Workflow(
        name="small_world_edit",
        title="Edit without a download",
        note=Note(
            "Edit by two prompts",
            (
                "Press Run: a picture is drawn, then edited to what the second prompt says.",
                "Then change one word of the second prompt.",
            ),
            (
                "**FlowEdit Sampler** goes from what the picture shows to what it should show, without inversion. "
                "*n_max*: lower keeps more of the picture. *target_cfg*: how strongly it is pulled.",
                "The model of 4M parameters comes with this pack. " + SMALL_WORLD_WORDS,
            ),
        ),
        nodes=nodes,
        columns=(
            Column((Group("Model", ("1",)),), NOTE_WIDTH),
            Column((Group("Prompts, seed and size", ("5", "14", "6", "3", "7")),)),
            Column((Group("Picture", ("8",)),)),
            Column((Group("Edit", ("15",)),)),
            Column((Group("Side by side", ("10", "16", "12", "18", "13")),), 420),
        ),
        app=App((("5", "text"), ("14", "text"), ("3", "value"), ("15", "n_max"), ("15", "target_cfg")), ("13",)),
    )
