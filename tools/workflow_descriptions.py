"""The shipped workflows: graphs, layout and notes. `make_workflows.py` turns them into files."""

from dataclasses import dataclass

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
LINE, PREVIEW = 60, 220
LIVE_CURVES = 420


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
    width: int = 400


@dataclass(frozen=True)
class Workflow:
    """`name` is the headless file's; `title` the template's, as ComfyUI lists it."""

    name: str
    title: str
    note: tuple[str, ...]
    nodes: dict[str, Node]
    columns: tuple[Column, ...]


@dataclass(frozen=True)
class Model:
    """A checkpoint that newcomers have, and the settings its own workflows use."""

    family: str
    title: str
    checkpoint: str
    repository: str
    latent_node: str
    size: int
    steps: int
    cfg: float
    n_max: int
    advice: str = ""

    @property
    def url(self) -> str:
        return f"{HUGGING_FACE}/{self.repository}/resolve/main/{self.checkpoint}"

    @property
    def tokens(self) -> str:
        return f"softrepa_{self.family}.safetensors"


T5_ADVICE = (
    "**T5 Tokenizer Options** pads the T5 text to 512 tokens, as in the training of the published tokens. With "
    "ComfyUI's shorter text the same soft tokens weigh almost four times more. Checkpoints without T5 ignore it."
)
SD15 = Model(
    "sd15",
    "SD1.5",
    "v1-5-pruned-emaonly-fp16.safetensors",
    "Comfy-Org/stable-diffusion-v1-5-archive",
    "EmptyLatentImage",
    size=512,
    steps=30,
    cfg=7.5,
    n_max=41,
)
SDXL = Model(
    "sdxl",
    "SDXL",
    "sd_xl_base_1.0.safetensors",
    "stabilityai/stable-diffusion-xl-base-1.0",
    "EmptyLatentImage",
    size=1024,
    steps=30,
    cfg=7.0,
    n_max=41,
)
SD3 = Model(
    "sd3",
    "SD3",
    "sd3_medium_incl_clips_t5xxlfp16.safetensors",
    "stabilityai/stable-diffusion-3-medium",
    "EmptySD3LatentImage",
    size=1024,
    steps=28,
    cfg=4.0,
    n_max=33,
    advice=T5_ADVICE,
)
MODELS = (SD15, SDXL, SD3)


# ---------------------------------------------------------------- parts


def checkpoint(model: Model) -> Node:
    link = {"name": model.checkpoint, "url": model.url, "directory": "checkpoints"}
    return Node("CheckpointLoaderSimple", "Checkpoint", {"ckpt_name": model.checkpoint}, models=(link,))


def tokenizer_options(clip: list) -> Node:
    return Node("T5TokenizerOptions", "T5 Tokenizer Options", {"clip": clip, "min_padding": 0, "min_length": 512})


def load_tokens(model: Model, source: list) -> Node:
    inputs = {
        "model": source,
        "tokens_name": model.tokens,
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "apply_to": "both",
        "blocks": "auto",
        "uncond_bank": "positive",
    }
    return Node("SoftREPALoadTokens", "Load SoftREPA Tokens", inputs, height=LINE)


def prompt(title: str, clip: list, text: str) -> Node:
    return Node("CLIPTextEncode", title, {"clip": clip, "text": text}, height=90)


def sampler(title: str, model: list, scheduler: str, steps: int, cfg: float, sources: tuple[str, str, str]) -> Node:
    positive, negative, latent = sources
    inputs = {
        "model": model,
        "seed": ["3", 0],
        "steps": steps,
        "cfg": cfg,
        "sampler_name": "euler",
        "scheduler": scheduler,
        "positive": [positive, 0],
        "negative": [negative, 0],
        "latent_image": [latent, 0],
        "denoise": 1.0,
    }
    return Node("KSampler", title, inputs, height=PREVIEW)


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


def save_image(source: str, prefix: str) -> Node:
    return Node("SaveImage", "Save Image", {"images": [source, 0], "filename_prefix": prefix}, height=330)


def dataset(clip: list, vae: list, validation_percent: float) -> Node:
    inputs = {
        "folder": "my_pictures",
        "clip": clip,
        "vae": vae,
        "resolution": 512,
        "bucketing": False,
        "validation_percent": validation_percent,
        "cache_gb": 50.0,
    }
    return Node("SoftREPADataset", "Caption-Image Folder", inputs, height=2 * LINE)


FOLDER_ADVICE = (
    "**Caption-Image Folder**: put pictures with captions (`name.jpg` beside `name.txt`) into a folder below ComfyUI's "
    "`input`, press `R`, and choose the folder."
)


def checkpoint_advice(model: Model) -> str:
    return (
        f"**Checkpoint**: any {model.title} checkpoint in `models/checkpoints`, for example "
        f"[{model.checkpoint}]({HUGGING_FACE}/{model.repository})."
    )


def tokens_advice(model: Model) -> str:
    return (
        f"**Load SoftREPA Tokens**: choose your {model.title} token file. Files live in `models/softrepa`; {README} "
        "says where to get the published ones."
    )


# ---------------------------------------------------------------- workflows


def text_to_image(model: Model) -> Workflow:
    """One seed sampled twice, without and with the tokens, side by side."""
    has_t5 = model.family == "sd3"
    clip, vae = ["4", 0] if has_t5 else ["1", 1], ["1", 2]
    size = {"width": model.size, "height": model.size, "batch_size": 1}
    settings = ("normal", model.steps, model.cfg, ("5", "6", "7"))
    nodes = {
        "1": checkpoint(model),
        "2": load_tokens(model, ["1", 0]),
        "3": Node("PrimitiveInt", "Seed of both images", {"value": SEED}),
        "4": tokenizer_options(["1", 1]),
        "5": prompt("Positive prompt", clip, POSITIVE),
        "6": prompt("Negative prompt", clip, NEGATIVE),
        "7": Node(model.latent_node, "Image size", size),
        "8": sampler("Sample without tokens", ["1", 0], *settings),
        "9": sampler("Sample with tokens", ["2", 0], *settings),
        "10": decode("Decode without tokens", "8", vae),
        "11": decode("Decode with tokens", "9", vae),
        "12": side_by_side("Left: without, right: with", ["10", 0], ["11", 0]),
        "13": save_image("12", f"SoftREPA_{model.family}"),
    }
    if not has_t5:
        del nodes["4"]
    return Workflow(
        name=f"text_to_image_{model.family}",
        title=f"Image with soft tokens ({model.title})",
        note=(
            f"## {model.title} with soft text tokens",
            "Samples one seed twice, without and with the tokens, and saves both side by side.",
            checkpoint_advice(model),
            tokens_advice(model),
            "**strength** 1 is the trained effect, 0 is the plain model.",
            "**Seed of both images** feeds both samplers. Give both the same steps, cfg, sampler and scheduler.",
            model.advice,
        ),
        nodes=nodes,
        columns=(
            Column((Group("Model and tokens", ("1", "2", "3")),)),
            Column((Group("Prompt and size", ("4", "5", "6", "7") if has_t5 else ("5", "6", "7")),)),
            Column((Group("Without tokens", ("8", "10")), Group("With tokens", ("9", "11")))),
            Column((Group("Comparison", ("12", "13")),), width=520),
        ),
    )


def small_world() -> Workflow:
    """Everything on the model that comes with the pack: without and with tokens, and an edit."""
    clip, vae = ["1", 1], ["1", 2]
    settings = ("simple", 20, 2.0, ("5", "6", "7"))
    edit = {
        "model": ["2", 0],
        "source_positive": ["5", 0],
        "source_negative": ["6", 0],
        "target_positive": ["14", 0],
        "target_negative": ["6", 0],
        "latent_image": ["9", 0],
        "seed": 1,
        "steps": 20,
        "scheduler": "normal",
        "source_cfg": 1.5,
        "target_cfg": 4.0,
        "n_max": 16,
        "n_min": 0,
        "n_avg": 1,
    }
    tokens = {
        "model": ["1", 0],
        "tokens": ["1", 3],
        "strength": 1.0,
        "start_percent": 0.0,
        "end_percent": 1.0,
        "apply_to": "both",
        "blocks": "auto",
        "uncond_bank": "positive",
    }
    nodes = {
        "1": Node("SoftREPASmallWorld", "Load Small World", {}),
        "2": Node("SoftREPAApplyTokens", "Apply SoftREPA Tokens", tokens, height=LINE),
        "3": Node("PrimitiveInt", "Seed of both images", {"value": 1}),
        "5": prompt("Positive prompt", clip, "a red circle and a blue square"),
        "6": prompt("Negative prompt", clip, ""),
        "14": prompt("What it should show after the edit", clip, "a green circle and a blue square"),
        "7": Node("EmptySD3LatentImage", "Image size", {"width": 96, "height": 96, "batch_size": 1}),
        "8": sampler("Sample without tokens", ["1", 0], *settings),
        "9": sampler("Sample with tokens", ["2", 0], *settings),
        "10": decode("Decode without tokens", "8", vae),
        "11": decode("Decode with tokens", "9", vae),
        "15": Node("SoftREPAFlowEdit", "FlowEdit Sampler", edit, height=PREVIEW),
        "16": decode("Decode the edit", "15", vae),
        "12": side_by_side("Without | with", ["10", 0], ["11", 0]),
        "17": side_by_side("Without | with | edited", ["12", 0], ["16", 0]),
        "18": Node("ImageScaleBy", "Enlarge", {"image": ["17", 0], "upscale_method": "nearest-exact", "scale_by": 4.0}),
        "13": save_image("18", "SoftREPA_small_world"),
    }
    return Workflow(
        name="small_world",
        title="Try it without a download",
        note=(
            "## Small world",
            "A text-to-image model of 4M parameters comes with this pack, and tokens trained for it by **Train "
            "SoftREPA Tokens**. Press **Run**: it takes seconds, on a CPU too.",
            "It knows circles, squares, triangles, diamonds and crosses; red, orange, yellow, green, blue, purple and "
            "black; small and large; one to four; and left of, right of, above and below. It draws cleanly and reads "
            'loosely, as large models do: try "three purple diamonds" or "a black square above a yellow circle".',
            "Three pictures are saved: without tokens, with tokens, and the second one **edited** by FlowEdit into "
            "what the third prompt says.",
            "After their short training these tokens mostly change how well the model tells captions apart, and the "
            "pictures hardly.",
        ),
        nodes=nodes,
        columns=(
            Column((Group("Model and tokens", ("1", "2", "3")),)),
            Column((Group("Prompts and size", ("5", "6", "14", "7")),)),
            Column((Group("Without tokens", ("8", "10")), Group("With tokens", ("9", "11")))),
            Column((Group("Edit", ("15", "16")),)),
            Column((Group("Comparison", ("12", "17", "18", "13")),), width=520),
        ),
    )


def flowedit(model: Model, is_masked: bool = False) -> Workflow:
    """An image edited by two prompts, beside its source."""
    has_t5 = model.family == "sd3"
    clip, vae = ["2", 0] if has_t5 else ["1", 1], ["1", 2]
    size = {"width": model.size, "height": model.size, "crop": "center"}
    edit = {
        "model": ["1", 0],
        "source_positive": ["6", 0],
        "source_negative": ["8", 0],
        "target_positive": ["7", 0],
        "target_negative": ["8", 0],
        "latent_image": ["15", 0] if is_masked else ["5", 0],
        "seed": SEED,
        "steps": 50,
        "scheduler": "normal",
        "source_cfg": 3.5,
        "target_cfg": 13.5,
        "n_max": model.n_max,
        "n_min": 0,
        "n_avg": 1,
    }
    nodes = {
        "1": checkpoint(model),
        "2": tokenizer_options(["1", 1]),
        "3": Node(
            "LoadImage", "Image, masked where it may change" if is_masked else "Image", {"image": "example.png"}, 300
        ),
        "4": Node("ImageScale", "Size", {"image": ["3", 0], "upscale_method": "lanczos"} | size),
        "5": Node("VAEEncode", "Encode", {"pixels": ["4", 0], "vae": vae}),
        "6": prompt("Source prompt: what the image shows", clip, DRAWING),
        "7": prompt("Target prompt: what it should show", clip, REDRAWN),
        "8": prompt("Negative prompt of both", clip, ""),
        "9": Node("SoftREPAFlowEdit", "FlowEdit Sampler", edit, height=PREVIEW),
        "10": decode("Decode", "9", vae),
        "16": side_by_side("Left: source, right: edit", ["4", 0], ["10", 0]),
        "19": difference("Darker now", ["4", 0], ["10", 0]),
        "20": difference("Brighter now", ["10", 0], ["4", 0]),
        "21": blend("Difference", ["19", 0], ["20", 0], "screen"),
        "22": side_by_side("Source, edit, difference", ["16", 0], ["21", 0]),
        "11": save_image("22", "SoftREPA_flowedit"),
        "23": Node(
            "ImageCompare",
            "Slide between source and edit",
            {"image_a": ["4", 0], "image_b": ["10", 0], "compare_view": {"__value__": ["", ""]}},
            height=420,
        ),
    }
    mask = {
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
    }
    if is_masked:
        nodes |= mask
    if not has_t5:
        del nodes["2"]
    image = [Group("Image", ("3", "4", "5"))]
    return Workflow(
        name=f"flowedit_{model.family}" + "_mask" * is_masked,
        title=f"Edit with FlowEdit{', masked' * is_masked} ({model.title})",
        note=(
            f"## FlowEdit on {model.title}" + ", inside a mask" * is_masked,
            "Changes what an image shows by two prompts, without inversion.",
            "**Mask**: only what it covers may change, everything else stays exactly as it is. The rectangle "
            "covers the dress of the example. For your own image bypass *Painted, and the rectangle*, right-click the "
            "image, *Open in MaskEditor*, and paint."
            if is_masked
            else "**Image**: load your own.",
            "**Source prompt** says what it shows, **target prompt** is the same sentence with the words changed that "
            "should change.",
            "**Comparison**: source, edit and what differs, where black is what stayed; below it a slider between the "
            "two (with Nodes 2.0 switched on).",
            "**n_max**: how deep the edit reaches. Lower keeps more of the image, higher changes more. "
            "**target_cfg**: how strongly it is pulled to the target prompt.",
            "**With soft tokens**: put *Load SoftREPA Tokens* between the checkpoint and the sampler; then "
            "a lower `target_cfg` is enough (SD3: 10 to 12).",
            checkpoint_advice(model),
            model.advice,
        ),
        nodes=nodes,
        columns=(
            Column((Group("Model", ("1", "2") if has_t5 else ("1",)), *image)),
            *([Column((Group("Mask", ("12", "13", "14", "17", "18", "15")),))] if is_masked else []),
            Column((Group("Prompts", ("6", "7", "8")),)),
            Column((Group("Edit", ("9", "10")), Group("Difference", ("19", "20", "21")))),
            Column((Group("Comparison", ("16", "22", "11", "23")),), width=520),
        ),
    )


def training(model: Model) -> Workflow:
    """A folder becomes a token file; previews in the node, the loss beside it."""
    clip, vae = ["2", 0], ["1", 2]
    train = {
        "model": ["1", 0],
        "dataset": ["3", 0],
        "preview_positive": ["4", 0],
        "preview_negative": ["5", 0],
        "vae": vae,
        "steps": 2000,
        "batch_size": 4,
        "learning_rate": 0.001,
        "seed": 0,
        "filename_prefix": f"my_{model.family}_tokens",
        "preview_every": 250,
    }
    nodes = {
        "1": checkpoint(model),
        "2": tokenizer_options(["1", 1]),
        "3": dataset(clip, vae, 10.0),
        "4": prompt("Positive prompt of the previews", clip, POSITIVE),
        "5": prompt("Negative prompt of the previews", clip, NEGATIVE),
        "6": Node("SoftREPATrainTokens", "Train SoftREPA Tokens", train, height=LIVE_CURVES + PREVIEW + 2 * LINE),
        "7": Node(
            "LossGraphNode", "Plot Loss Graph", {"loss": ["6", 1], "filename_prefix": "SoftREPA_loss"}, height=300
        ),
        "8": Node("SoftREPAPreviewTokens", "Preview SoftREPA Tokens", {"tokens": ["6", 0]}, height=260),
    }
    return Workflow(
        name=f"train_{model.family}",
        title=f"Train tokens from a folder ({model.title})",
        note=(
            f"## Train {model.title} tokens",
            FOLDER_ADVICE,
            checkpoint_advice(model),
            "**Train SoftREPA Tokens** shows curves of loss and retrieval, and below them the preview prompt without "
            "and with the tokens every `preview_every` steps; both are kept in `output/softrepa_training`. Without the "
            "three preview inputs it shows the curves alone.",
            "**SoftREPA Training Options**, connected to `options`, has what few people set.",
            "**resolution** 512 is the paper's. Less is much faster and needs less memory.",
            "**Stop and keep** ends the run and keeps what is learned; `resume` goes on. The file is in "
            "`models/softrepa`, for *Load SoftREPA Tokens*.",
            "A tenth of the pictures (`validation_percent`) is not trained on, and measured instead: see *held out* in "
            "the curves.",
            model.advice,
        ),
        nodes=nodes,
        columns=(
            Column((Group("Model", ("1", "2")), Group("Pictures and captions", ("3",)))),
            Column((Group("Preview", ("4", "5")),)),
            Column((Group("Training", ("6",)),), width=460),
            Column((Group("Result", ("7", "8")),), width=520),
        ),
    )


def scoring(model: Model) -> Workflow:
    """The alignment score of a model without and with tokens on the same pictures."""
    clip, vae = ["2", 0], ["1", 2]

    def score(title: str, source: list) -> Node:
        inputs = {
            "model": source,
            "dataset": ["4", 0],
            "batch_size": 8,
            "batches": 16,
            "timesteps": "100,300,500,700,900",
            "seed": 0,
        }
        return Node("SoftREPAScore", title, inputs, height=260)

    nodes = {
        "1": checkpoint(model),
        "2": tokenizer_options(["1", 1]),
        "3": load_tokens(model, ["1", 0]),
        "4": dataset(clip, vae, 10.0),
        "5": score("Score without tokens", ["1", 0]),
        "6": score("Score with tokens", ["3", 0]),
    }
    return Workflow(
        name=f"score_{model.family}",
        title=f"Score tokens on a dataset ({model.title})",
        note=(
            "## Do the tokens help?",
            "Measures how well the model finds the right caption among those of a batch, without and with tokens, by "
            "its own denoising errors. Both use the same noise, so small differences mean something.",
            FOLDER_ADVICE,
            "Use pictures that the tokens were not trained on: the same folder with the same `validation_percent` as "
            "in training, or another one, all of it with 0.",
            "**accuracy**: share of images whose own caption fits best; chance is 1 / `batch_size`. **batches** says "
            "how many images are measured: more are slower and surer.",
            checkpoint_advice(model),
            tokens_advice(model),
        ),
        nodes=nodes,
        columns=(
            Column((Group("Model", ("1", "2")), Group("Tokens", ("3",)))),
            Column((Group("Pictures and captions", ("4",)),)),
            Column((Group("Without tokens", ("5",)),), width=560),
            Column((Group("With tokens", ("6",)),), width=560),
        ),
    )


def comparing(model: Model) -> Workflow:
    """The same prompts and seeds without and with tokens, and what the model itself says of it."""
    compare = {
        "model": ["1", 0],
        "tokens": ["3", 1],
        "clip": ["2", 0],
        "vae": ["1", 2],
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
        "1": checkpoint(model),
        "2": tokenizer_options(["1", 1]),
        "3": load_tokens(model, ["1", 0]),
        "4": Node("SoftREPAAlignmentJudge", "Judge: Alignment", {}),
        "5": Node("SoftREPACompare", "Compare Tokens", compare, height=760),
        "6": Node("PreviewAny", "Table", {"source": ["5", 2]}, height=260),
    }
    return Workflow(
        name=f"compare_{model.family}",
        title=f"Compare tokens ({model.title})",
        note=(
            "## Does it help?",
            "Draws every prompt and seed without tokens and with them, from the same noise, and says whether the "
            "difference is more than chance.",
            "**prompts**: what you care about, a line each. Eight show something, some hundred prove it: the table "
            "says how many prompts it takes to see an effect of the size found.",
            "**Cancel** keeps what is drawn. Run again and it goes on; more prompts, seeds or strengths draw only what "
            "is new. All pictures are in `output/softrepa_compare`.",
            "**Judge**: the model itself here, which needs nothing else. *Judge: Questions* asks Qwen3-VL, which is "
            "surer; *Judge: CLIP Score* is everybody's number. Put several in a row.",
            checkpoint_advice(model),
            tokens_advice(model),
        ),
        nodes=nodes,
        columns=(
            Column((Group("Model", ("1", "2")), Group("Tokens", ("3",)), Group("Judge", ("4",)))),
            Column((Group("Comparison", ("5",)),), width=760),
            Column((Group("What it says", ("6",)),), width=520),
        ),
    )


def converting(model: Model) -> Workflow:
    """A published pair of .pth files, or any token file, as one .safetensors file."""
    load = load_tokens(model, ["1", 0])
    load.inputs["tokens_name"] = model.family
    nodes = {
        "1": checkpoint(model),
        "2": load,
        "3": Node(
            "SoftREPASaveTokens",
            "Save SoftREPA Tokens",
            {"tokens": ["2", 1], "filename_prefix": f"softrepa_{model.family}"},
            height=LINE,
        ),
        "4": Node("SoftREPAPreviewTokens", "Preview SoftREPA Tokens", {"tokens": ["2", 1]}, height=330),
    }
    return Workflow(
        name="convert_tokens",
        title=f"Convert published tokens ({model.title})",
        note=(
            "## Published tokens as one safe file",
            "The authors publish `dc_tokens.pth` and `dc_t_tokens.pth` for each model. Put both into a folder of "
            f"their own below `models/softrepa`, for example `models/softrepa/{model.family}`; **Load SoftREPA "
            "Tokens** lists the folder. No code in a `.pth` file is executed.",
            f"**Save SoftREPA Tokens** writes `softrepa_{model.family}_00001.safetensors` beside it, which says in its "
            "metadata what it is for.",
            "The published files have no licence: fetch them yourself and keep them to yourself.",
            checkpoint_advice(model),
        ),
        nodes=nodes,
        columns=(
            Column((Group("Published tokens", ("1", "2")),)),
            Column((Group("One file", ("3", "4")),), width=520),
        ),
    )


WORKFLOWS = (
    small_world(),
    *(text_to_image(model) for model in MODELS),
    flowedit(SD3),
    flowedit(SDXL),
    flowedit(SD3, is_masked=True),
    training(SD3),
    scoring(SD3),
    comparing(SD3),
    converting(SD3),
)
