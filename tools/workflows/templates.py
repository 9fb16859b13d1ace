"""A template of each kind, for any of the models."""

from .layout import LINE, NOTE_WIDTH, App, Column, Group, Node, Note, Workflow
from .models import Model
from .parts import (
    COMPARED,
    DRAWING,
    FOLDER_STEP,
    NEGATIVE,
    PICTURES,
    POSITIVE,
    REDRAWN,
    SEED,
    TOKENS_STEP,
    blend,
    dataset,
    decode,
    difference,
    flowedit_sampler,
    load_tokens,
    model_advice,
    model_group,
    model_step,
    prompt,
    sampler,
    save_image,
    side_by_side,
    tokens_advice,
    train,
)


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
