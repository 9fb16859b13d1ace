"""The shipped workflows: graphs, layout and notes. `make_workflows.py` turns them into files."""

from dataclasses import dataclass, replace

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
HUGGING_FACE = "https://huggingface.co"
README = "the pack's README"
# room below a node's widgets, in pixels: a line of text, a live preview, a training run's curves
LINE, PREVIEW = 60, 230
LIVE_CURVES = 420
NOTE_WIDTH = 420
PICTURES = "my_pictures"
UNTELLING = ("text", "value", "image")
"""Names of widgets that say nothing without their node's title."""
PUBLISHED = ("sd15", "sdxl", "sd3")


@dataclass(frozen=True)
class Node:
    """`inputs` are values, or [node, output] for a connection. `height` is for text and pictures, in pixels."""

    class_type: str
    title: str
    inputs: dict
    height: int = 0
    models: tuple[dict, ...] = ()


@dataclass(frozen=True)
class Group:
    """Nodes below each other under a title."""

    title: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    groups: tuple[Group, ...]
    width: int = 320


@dataclass(frozen=True)
class Note:
    """`steps` are in large type, to be read as the template opens; `details` are small."""

    title: str
    steps: tuple[str, ...]
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class App:
    """What app mode shows: (node, widget) to set, and nodes whose pictures are shown."""

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Workflow:
    """`name` is the headless file's; `title` the template's, as ComfyUI lists it.

    `columns` stand beside each other, the note on top of the first.
    """

    name: str
    title: str
    note: Note
    nodes: dict[str, Node]
    columns: tuple[Column, ...]
    app: App | None = None


@dataclass(frozen=True)
class Blueprint:
    """A part of a graph as one node. inputs: its sockets and widgets, (name, (node, input), ...), each for all inputs
    that it feeds; outputs: (name, node, output)."""

    name: str
    description: str
    nodes: dict[str, Node]
    columns: tuple[Column, ...]
    inputs: tuple[tuple, ...]
    outputs: tuple[tuple[str, str, int], ...]


@dataclass(frozen=True)
class File:
    """A model's file, as a loader names it, and where it is published."""

    name: str
    repository: str
    directory: str = "checkpoints"
    folder: str = ""

    @property
    def link(self) -> dict:
        url = f"{HUGGING_FACE}/{self.repository}/resolve/main/{self.folder}{self.name}"
        return {"name": self.name, "url": url, "directory": self.directory}

    @property
    def page(self) -> str:
        return f"[{self.name}]({HUGGING_FACE}/{self.repository})"


@dataclass(frozen=True)
class Model:
    """A model that newcomers have, its loaders, and the settings its own workflows use.

    loaders: nodes by key; clip and vae: (node, output); plain: the node whose first output is the MODEL.
    edit: inputs of FlowEdit; has_negative: whether it is sampled with a negative prompt.
    """

    family: str
    title: str
    files: tuple[File, ...]
    loaders: dict[str, Node]
    clip: tuple[str, int]
    vae: tuple[str, int]
    latent_node: str
    size: int
    steps: int
    cfg: float
    edit: dict
    plain: str = "1"
    sampler: str = "euler"
    scheduler: str = "normal"
    has_negative: bool = True
    licence: str = ""
    advice: tuple[str, ...] = ()
    drawing_advice: tuple[str, ...] = ()
    editing_advice: tuple[str, ...] = ()
    flux_guidance: tuple[float, float] | None = None

    @property
    def tokens(self) -> str:
        return f"softrepa_{self.family}.safetensors"


# ---------------------------------------------------------------- models


def checkpoint(file: File) -> dict[str, Node]:
    node = Node("CheckpointLoaderSimple", "Checkpoint", {"ckpt_name": file.name}, models=(file.link,))
    return {"1": node}


def separate_files(network: File, text: tuple[File, ...], kind: str, vae: File, shift: float | None = None) -> dict:
    """Loaders of a model whose parts are files of their own; `kind` is how the text encoder is used."""
    names = ("clip_name1", "clip_name2") if len(text) == 2 else ("clip_name",)
    encoders = dict(zip(names, (file.name for file in text), strict=True)) | {"type": kind, "device": "default"}
    loader = "DualCLIPLoader" if len(text) == 2 else "CLIPLoader"
    nodes = {
        "1": Node(
            "UNETLoader", "Model", {"unet_name": network.name, "weight_dtype": "default"}, models=(network.link,)
        ),
        "31": Node(loader, "Text encoder", encoders, models=tuple(file.link for file in text)),
        "32": Node("VAELoader", "VAE", {"vae_name": vae.name}, models=(vae.link,)),
    }
    if shift:
        nodes["33"] = Node("ModelSamplingAuraFlow", "Shift of the noise levels", {"model": ["1", 0], "shift": shift})
    return nodes


T5_ADVICE = (
    "**T5 Tokenizer Options** pads the T5 text to 512 tokens, as in the training of the published tokens. With "
    "ComfyUI's shorter text the same soft tokens weigh almost four times more. Checkpoints without T5 ignore it."
)
NO_LICENCE = "Its download needs no account."
AS_FOR_SD3 = (
    "The guidance is that of FlowEdit's authors for SD3, and *n_max* begins at the same noise. Nobody has measured "
    "them on this model: they are where to start."
)
SD15_FILE = File("v1-5-pruned-emaonly-fp16.safetensors", "Comfy-Org/stable-diffusion-v1-5-archive")
SDXL_FILE = File("sd_xl_base_1.0.safetensors", "stabilityai/stable-diffusion-xl-base-1.0")
SD3_FILE = File("sd3_medium_incl_clips_t5xxlfp16.safetensors", "stabilityai/stable-diffusion-3-medium")
SD15 = Model(
    "sd15",
    "SD1.5",
    (SD15_FILE,),
    checkpoint(SD15_FILE),
    clip=("1", 1),
    vae=("1", 2),
    latent_node="EmptyLatentImage",
    size=512,
    steps=30,
    cfg=7.5,
    edit={"n_max": 41},
    licence=NO_LICENCE,
)
SDXL = Model(
    "sdxl",
    "SDXL",
    (SDXL_FILE,),
    checkpoint(SDXL_FILE),
    clip=("1", 1),
    vae=("1", 2),
    latent_node="EmptyLatentImage",
    size=1024,
    steps=30,
    cfg=7.0,
    edit={"n_max": 41},
    licence=NO_LICENCE,
)
SD3 = Model(
    "sd3",
    "SD3",
    (SD3_FILE,),
    checkpoint(SD3_FILE)
    | {
        "30": Node(
            "T5TokenizerOptions", "T5 Tokenizer Options", {"clip": ["1", 1], "min_padding": 0, "min_length": 512}
        )
    },
    clip=("30", 0),
    vae=("1", 2),
    latent_node="EmptySD3LatentImage",
    size=1024,
    steps=28,
    cfg=4.0,
    edit={"n_max": 33},
    licence="**Before its download** log in to Hugging Face and accept the licence on its page.",
    advice=(T5_ADVICE,),
    editing_advice=("With *Load SoftREPA Tokens* before the sampler a *target_cfg* of 10 to 12 is enough.",),
)
FLUX_FILES = (
    File("flux1-dev.safetensors", "Comfy-Org/flux1-dev", "diffusion_models"),
    File("clip_l.safetensors", "comfyanonymous/flux_text_encoders", "text_encoders"),
    File("t5xxl_fp16.safetensors", "comfyanonymous/flux_text_encoders", "text_encoders"),
    File("ae.safetensors", "Comfy-Org/Lumina_Image_2.0_Repackaged", "vae", "split_files/vae/"),
)
FLUX = Model(
    "flux",
    "Flux",
    FLUX_FILES,
    separate_files(FLUX_FILES[0], FLUX_FILES[1:3], "flux", FLUX_FILES[3]),
    clip=("31", 0),
    vae=("32", 0),
    latent_node="EmptySD3LatentImage",
    size=1024,
    steps=20,
    cfg=1.0,
    edit={"steps": 28, "n_max": 24, "source_cfg": 1.0, "target_cfg": 1.0, "scheduler": "simple"},
    scheduler="simple",
    has_negative=False,
    licence="**FLUX.1 [dev]** is licensed for non-commercial use: read and accept [its licence]"
    "(https://huggingface.co/black-forest-labs/FLUX.1-dev); its makers' own page asks you to log in for that.",
    editing_advice=("Its guidance is part of the prompts: *Source guidance* and *Target guidance*.",),
    flux_guidance=(1.5, 5.5),
)
Z_IMAGE_FILES = (
    File("z_image_bf16.safetensors", "Comfy-Org/z_image", "diffusion_models", "split_files/diffusion_models/"),
    File("qwen_3_4b.safetensors", "Comfy-Org/z_image_turbo", "text_encoders", "split_files/text_encoders/"),
    File("ae.safetensors", "Comfy-Org/z_image_turbo", "vae", "split_files/vae/"),
)
Z_IMAGE = Model(
    "zimage",
    "Z-Image",
    Z_IMAGE_FILES,
    separate_files(Z_IMAGE_FILES[0], Z_IMAGE_FILES[1:2], "lumina2", Z_IMAGE_FILES[2], shift=3.0),
    clip=("31", 0),
    vae=("32", 0),
    latent_node="EmptySD3LatentImage",
    size=1024,
    steps=25,
    cfg=4.0,
    edit={"n_max": 33},
    plain="33",
    sampler="res_multistep",
    scheduler="simple",
    licence=NO_LICENCE,
    advice=("**Z-Image-Turbo** is another model: train and draw with the same one of the two.",),
    drawing_advice=("**Z-Image-Turbo** draws with 8 steps and cfg 1.",),
    editing_advice=(AS_FOR_SD3,),
)
QWEN_IMAGE_FILES = tuple(
    File(name, "Comfy-Org/Qwen-Image_ComfyUI", folder, f"split_files/{folder}/")
    for name, folder in (
        ("qwen_image_fp8_e4m3fn.safetensors", "diffusion_models"),
        ("qwen_2.5_vl_7b_fp8_scaled.safetensors", "text_encoders"),
        ("qwen_image_vae.safetensors", "vae"),
    )
)
QWEN_IMAGE = Model(
    "qwenimage",
    "Qwen-Image",
    QWEN_IMAGE_FILES,
    separate_files(QWEN_IMAGE_FILES[0], QWEN_IMAGE_FILES[1:2], "qwen_image", QWEN_IMAGE_FILES[2], shift=3.1),
    clip=("31", 0),
    vae=("32", 0),
    latent_node="EmptySD3LatentImage",
    size=1328,
    steps=20,
    cfg=4.0,
    edit={"n_max": 32},
    plain="33",
    scheduler="simple",
    licence=NO_LICENCE,
    advice=("The image's sides are multiples of 16, about 1328 x 1328 pixels in all.",),
    editing_advice=(AS_FOR_SD3,),
)
MODELS = (SD15, SDXL, SD3, FLUX, Z_IMAGE, QWEN_IMAGE)


# ---------------------------------------------------------------- parts


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


# ---------------------------------------------------------------- workflows


def text_to_image(model: Model) -> Workflow:
    """One seed sampled twice, without and with the tokens, side by side."""
    clip, vae, plain = [*model.clip], [*model.vae], [model.plain, 0]
    settings = {
        "steps": model.steps,
        "cfg": model.cfg,
        "sampler_name": model.sampler,
        "scheduler": model.scheduler,
    }
    negative = prompt("Negative prompt", clip, NEGATIVE)
    nodes = {
        **model.loaders,
        "2": load_tokens(model.tokens, plain),
        "5": prompt("Positive prompt", clip, POSITIVE),
        "6": negative if model.has_negative else prompt("Negative prompt, not used at cfg 1", clip, ""),
        "3": Node("PrimitiveInt", "Seed of both images", {"value": SEED}),
        "7": Node(model.latent_node, "Image size", {"width": model.size, "height": model.size, "batch_size": 1}),
        "8": sampler("Sample without tokens", plain, settings),
        "9": sampler("Sample with tokens", ["2", 0], settings),
        "10": decode("Decode without tokens", "8", vae),
        "11": decode("Decode with tokens", "9", vae),
        "12": side_by_side("Left: without, right: with", ["10", 0], ["11", 0]),
        "13": save_image("12", f"SoftREPA_{model.family}"),
    }
    return Workflow(
        name=f"text_to_image_{model.family}",
        title=f"Image with soft tokens ({model.title})",
        note=Note(
            f"{model.title} with soft tokens",
            (
                model_step(model),
                TOKENS_STEP,
                "Press Run: one seed without and with the tokens, side by side.",
            ),
            (
                "**strength** 1 is the trained effect, 0 is the plain model.",
                "**Seed of both images** feeds both samplers. Give both the same steps, cfg, sampler and scheduler.",
                tokens_advice(model),
                *model.drawing_advice,
                *model_advice(model),
            ),
        ),
        nodes=nodes,
        columns=(
            Column((model_group(model),), NOTE_WIDTH),
            Column((Group("Tokens", ("2",)), Group("Prompt, seed and size", ("5", "6", "3", "7")))),
            Column((Group("Without tokens", ("8",)), Group("With tokens", ("9",)))),
            Column((Group("Side by side", ("10", "11", "12", "13")),), 420),
        ),
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


def flowedit(model: Model, is_masked: bool = False) -> Workflow:
    """An image edited by two prompts, beside its source; where it is masked, with what differs."""
    clip, vae = [*model.clip], [*model.vae]
    side = model.size
    source, target = ("24", "25") if model.flux_guidance else ("6", "7")
    size = {"width": side, "height": side, "crop": "center"}
    image = "Image, masked where it may change" if is_masked else "Image"
    nodes = {
        **model.loaders,
        "3": Node("LoadImage", image, {"image": "example.png"}, 300),
        "4": Node("ImageScale", "Size", {"image": ["3", 0], "upscale_method": "lanczos"} | size),
        "5": Node("VAEEncode", "Encode", {"pixels": ["4", 0], "vae": vae}),
        "6": prompt("Source prompt: what the image shows", clip, DRAWING),
        "7": prompt("Target prompt: what it should show", clip, REDRAWN),
        "8": prompt("Negative prompt of both", clip, ""),
        "9": flowedit_sampler([model.plain, 0], source, target, "8", "15" if is_masked else "5", model.edit),
        "10": decode("Decode", "9", vae),
        "16": side_by_side("Left: source, right: edit", ["4", 0], ["10", 0]),
        "11": save_image("22" if is_masked else "16", "SoftREPA_flowedit"),
    }
    if model.flux_guidance:
        for key, title, cond, guidance in zip(
            ("24", "25"), ("Source guidance", "Target guidance"), ("6", "7"), model.flux_guidance, strict=True
        ):
            nodes[key] = Node("FluxGuidance", title, {"conditioning": [cond, 0], "guidance": guidance})
    if is_masked:
        nodes |= {
            "12": Node("MaskToImage", "Mask as image", {"mask": ["3", 1]}),
            "13": Node("ImageScale", "Size of the mask", {"image": ["12", 0], "upscale_method": "bilinear"} | size),
            "14": Node("ImageToMask", "Image as mask", {"image": ["13", 0], "channel": "red"}),
            "17": Node("SolidMask", "Rectangle", {"value": 1.0, "width": 320, "height": 500}),
            "18": Node(
                "MaskComposite",
                "Painted, and the rectangle",
                {"destination": ["14", 0], "source": ["17", 0], "x": 380, "y": 420, "operation": "add"},
            ),
            "15": Node("SetLatentNoiseMask", "Edit only here", {"samples": ["5", 0], "mask": ["18", 0]}),
            "19": difference("Darker now", ["4", 0], ["10", 0]),
            "20": difference("Brighter now", ["10", 0], ["4", 0]),
            "21": blend("Difference", ["19", 0], ["20", 0], "screen"),
            "22": side_by_side("Source, edit, difference", ["16", 0], ["21", 0]),
        }
    masks = (
        "Paint what may change: right-click the image, Open in MaskEditor. Bypass *Painted, and the rectangle*: the "
        "rectangle covers the example's dress."
    )
    columns = [
        Column((Group("Image", ("3",)),), NOTE_WIDTH),
        Column((model_group(model), Group("Size", ("4",))), 360),
        Column((Group("Encode", ("5",)), Group("Prompts", ("6", "7", "8")))),
        Column((Group("Edit", ("9",)),)),
        Column((Group("Side by side", ("10", "16", "11")),), 420),
    ]
    if model.flux_guidance:
        columns.insert(3, Column((Group("Guidance", ("24", "25")),), 220))
    if is_masked:
        columns[1:] = [
            Column((model_group(model), Group("Size", ("4",)), Group("Mask, its size", ("12", "13"))), 360),
            Column((Group("Mask, and a rectangle", ("14", "17", "18")), Group("Encode", ("5", "15")))),
            Column((Group("Prompts", ("6", "7", "8")),)),
            Column((Group("Edit", ("9",)),)),
            Column((Group("Side by side, and the difference", ("10", "16", "19", "20", "21", "22", "11")),), 420),
        ]
    return Workflow(
        name=f"flowedit_{model.family}" + "_mask" * is_masked,
        title=f"Edit with FlowEdit{', masked' * is_masked} ({model.title})",
        note=Note(
            f"FlowEdit on {model.title}" + ", inside a mask" * is_masked,
            (
                model_step(model),
                masks if is_masked else "Load your image.",
                "Say what it shows; say it again with the words changed that should change. Press Run.",
            ),
            (
                *(
                    ("What the mask does not cover stays exactly as it is. **Difference**: black is what stayed.",)
                    if is_masked
                    else ()
                ),
                "**n_max**: how deep the edit reaches. Lower keeps more of the image, higher changes more. "
                "**target_cfg**: how strongly it is pulled to the target prompt.",
                *model.editing_advice,
                *model_advice(model),
            ),
        ),
        nodes=nodes,
        columns=(*columns,),
        app=App(
            (("3", "image"), ("6", "text"), ("7", "text"), ("9", "n_max"), ("9", "target_cfg"), ("9", "seed")),
            ("11",),
        ),
    )


def training(model: Model) -> Workflow:
    """A folder becomes a token file; previews in the node, the loss beside it."""
    clip, vae = [*model.clip], [*model.vae]
    settings = {"steps": 2000, "filename_prefix": f"my_{model.family}_tokens", "preview_every": 250}
    nodes = {
        **model.loaders,
        "3": dataset(PICTURES, clip, vae),
        "4": prompt("Positive prompt of the previews", clip, POSITIVE),
        "5": prompt("Negative prompt of the previews", clip, NEGATIVE),
        "6": train([model.plain, 0], "3", vae, settings),
        "7": Node(
            "LossGraphNode", "Plot Loss Graph", {"loss": ["6", 1], "filename_prefix": "SoftREPA_loss"}, height=300
        ),
        "8": Node("SoftREPAPreviewTokens", "Preview SoftREPA Tokens", {"tokens": ["6", 0]}, height=260),
    }
    return Workflow(
        name=f"train_{model.family}",
        title=f"Train tokens from a folder ({model.title})",
        note=Note(
            f"Train {model.title} tokens",
            (model_step(model), FOLDER_STEP, "Press Run. Stop and keep ends it early; resume goes on."),
            (
                "**Train SoftREPA Tokens** shows curves, and every *preview_every* steps the preview prompt without "
                "and with the tokens; both are kept in *output/softrepa_training*. **SoftREPA Training Options**, "
                "connected to *options*, has what few people set.",
                "*resolution* 512 is the paper's; less is much faster and needs less memory. A tenth of the pictures "
                "(*validation_percent*) is not trained on: see *held out* in the curves.",
                "The file is in *models/softrepa*, for *Load SoftREPA Tokens*.",
                *model_advice(model),
            ),
        ),
        nodes=nodes,
        columns=(
            Column((model_group(model),), NOTE_WIDTH),
            Column((Group("Pictures and captions", ("3",)), Group("Preview", ("4", "5")))),
            Column((Group("Training", ("6",)),), 400),
            Column((Group("Result", ("7", "8")),), 480),
        ),
    )


def scoring(model: Model) -> Workflow:
    """The alignment score of a model without and with tokens on the same pictures."""
    clip, vae, plain = [*model.clip], [*model.vae], [model.plain, 0]
    score = {
        "model": plain,
        "dataset": ["4", 0],
        "other_model": ["3", 0],
        "batch_size": 8,
        "batches": 16,
        "timesteps": "100,300,500,700,900",
        "seed": 0,
    }
    nodes = {
        **model.loaders,
        "3": load_tokens(model.tokens, plain),
        "4": dataset(PICTURES, clip, vae),
        "5": Node("SoftREPAScore", "Score without and with tokens", score, height=420),
    }
    return Workflow(
        name=f"score_{model.family}",
        title=f"Score tokens on a dataset ({model.title})",
        note=Note(
            "Do the tokens help?",
            (model_step(model), TOKENS_STEP, FOLDER_STEP, "Press Run."),
            (
                "Measures how well the model finds the right caption among those of a batch, without the tokens "
                "(model) and with them (other model), by its own denoising errors and at the same noise, and says "
                "whether the difference is more than chance.",
                "Use pictures that the tokens were not trained on: the same folder with the same *validation_percent* "
                "as in training, or another one, all of it with 0.",
                "**accuracy**: share of images whose own caption fits best; chance is 1 / *batch_size*. **batches**: "
                "how many are measured.",
                tokens_advice(model),
                *model_advice(model),
            ),
        ),
        nodes=nodes,
        columns=(
            Column((model_group(model),), NOTE_WIDTH),
            Column((Group("Tokens", ("3",)), Group("Pictures and captions", ("4",)))),
            Column((Group("Score", ("5",)),), 640),
        ),
    )


def comparing(model: Model) -> Workflow:
    """The same prompts and seeds without and with tokens, and what the model itself says of it."""
    compare = {
        "model": [model.plain, 0],
        "tokens": ["3", 1],
        "clip": [*model.clip],
        "vae": [*model.vae],
        "judge": ["4", 0],
        "prompts": "\n".join(COMPARED),
        "negative_prompt": "",
        "seeds": "0, 1",
        "strengths": "0, 1",
        "steps": model.steps,
        "cfg": model.cfg,
        "width": model.size,
        "height": model.size,
        "filename_prefix": f"{model.family}",
    }
    nodes = {
        **model.loaders,
        "3": load_tokens(model.tokens, [model.plain, 0]),
        "4": Node("SoftREPAAlignmentJudge", "Judge: Alignment", {}, height=24),
        "5": Node("SoftREPACompare", "Compare Tokens", compare, height=640),
        "6": Node("PreviewAny", "Table", {"source": ["5", 2]}, height=260),
    }
    return Workflow(
        name=f"compare_{model.family}",
        title=f"Compare tokens ({model.title})",
        note=Note(
            "Does it help?",
            (model_step(model), TOKENS_STEP, "Write the prompts that you care about, a line each. Press Run."),
            (
                "Draws every prompt and seed without tokens and with them, from the same noise, and says whether the "
                "difference is more than chance. Eight prompts show something, some hundred prove it: the table says "
                "how many it takes to see an effect of the size found.",
                "**Cancel** keeps what is drawn. Run again and it goes on; more prompts, seeds or strengths draw only "
                "what is new. All pictures are in *output/softrepa_compare*.",
                "**Judge**: the model itself here, which needs nothing else. *Judge: Questions* asks Qwen3-VL, which "
                "is surer; *Judge: CLIP Score* is everybody's number. Put several in a row.",
                tokens_advice(model),
                *model_advice(model),
            ),
        ),
        nodes=nodes,
        columns=(
            Column((model_group(model),), NOTE_WIDTH),
            Column((Group("Tokens", ("3",)), Group("Judge", ("4",)))),
            Column((Group("Comparison", ("5",)),), 640),
            Column((Group("What it says", ("6",)),), 480),
        ),
    )


def converting() -> Workflow:
    """A published pair of .pth files, or any token file, as one .safetensors file."""
    nodes = {
        "2": load_tokens("sd3", None),
        "3": Node(
            "SoftREPASaveTokens",
            "Save SoftREPA Tokens",
            {"tokens": ["2", 1], "filename_prefix": "softrepa_sd3"},
            height=LINE,
        ),
        "4": Node("SoftREPAPreviewTokens", "Preview SoftREPA Tokens", {"tokens": ["2", 1]}, height=330),
    }
    return Workflow(
        name="convert_tokens",
        title="Convert published tokens",
        note=Note(
            "Two .pth files to one safe file",
            (
                "Put dc_tokens.pth, and dc_t_tokens.pth where there is one, into a folder below models/softrepa, such "
                "as sd3. Press R, choose the folder.",
                "Press Run. No model is needed.",
            ),
            (
                "The authors publish both files for SD1.5 and SD3, the first one for SDXL. No code in a *.pth* file is "
                "executed. **Save SoftREPA Tokens** writes a *.safetensors* file into *models/softrepa*, which says in "
                "its metadata what it is for.",
                "The published files have no licence: fetch them yourself and keep them to yourself.",
            ),
        ),
        nodes=nodes,
        columns=(
            Column((Group("Published tokens", ("2",)),), NOTE_WIDTH),
            Column((Group("One file", ("3", "4")),), 560),
        ),
    )


NEWER = (FLUX, Z_IMAGE, QWEN_IMAGE)


def in_order(*workflows: Workflow) -> tuple[Workflow, ...]:
    """Numbered, for templates are listed by the names of their files."""
    return tuple(
        replace(workflow, title=f"{number:02} {workflow.title}") for number, workflow in enumerate(workflows, start=1)
    )


WORKFLOWS = in_order(
    small_world(),
    small_world_training(),
    small_world_edit(),
    *(text_to_image(model) for model in MODELS),
    *(flowedit(model) for model in (SDXL, SD3)),
    flowedit(SD3, is_masked=True),
    *(flowedit(model) for model in NEWER),
    *(training(model) for model in (SD3, *NEWER)),
    scoring(SD3),
    comparing(SD3),
    converting(),
)


# ---------------------------------------------------------------- blueprints


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


BLUEPRINTS = (sampling_blueprint(), editing_blueprint(), training_blueprint())
