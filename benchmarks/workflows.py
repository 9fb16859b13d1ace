"""The shipped workflows: graphs, layout and notes. `workflow_files.py` turns them into files."""

from dataclasses import dataclass

SEED = 20250311
POSITIVE = "a red apple on top of a blue book, next to a yellow mug with a green spoon, on a wooden table"
NEGATIVE = "blurry, low quality"
HUGGING_FACE = "https://huggingface.co"


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
    advice: str


MODELS = (
    Model(
        "sd15",
        "SD1.5",
        "v1-5-pruned-emaonly-fp16.safetensors",
        "Comfy-Org/stable-diffusion-v1-5-archive",
        "EmptyLatentImage",
        512,
        30,
        7.5,
        "",
    ),
    Model(
        "sdxl",
        "SDXL",
        "sd_xl_base_1.0.safetensors",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "EmptyLatentImage",
        1024,
        30,
        7.0,
        "",
    ),
    Model(
        "sd3",
        "SD3",
        "sd3_medium_incl_clips_t5xxlfp16.safetensors",
        "stabilityai/stable-diffusion-3-medium",
        "EmptySD3LatentImage",
        1024,
        28,
        4.0,
        "**T5 Tokenizer Options** pads the T5 text to 512 tokens, as in the training of the published tokens. With "
        "ComfyUI's shorter text the same soft tokens weigh almost four times more. Checkpoints without T5 ignore it.",
    ),
)


def text_to_image(model: Model) -> dict:
    """One seed sampled twice, without and with the tokens, side by side."""
    clip = ["4", 0] if model.family == "sd3" else ["1", 1]
    url = f"{HUGGING_FACE}/{model.repository}/resolve/main/{model.checkpoint}"
    nodes = {
        "1": node("CheckpointLoaderSimple", "Checkpoint", (40, 80), (380, 120), ckpt_name=model.checkpoint),
        "2": node(
            "SoftREPALoadTokens",
            "Load SoftREPA Tokens",
            (40, 260),
            (380, 300),
            model=["1", 0],
            tokens_name=f"softrepa_{model.family}.safetensors",
            strength=1.0,
            start_percent=0.0,
            end_percent=1.0,
            apply_to="both",
            blocks="auto",
            uncond_bank="positive",
        ),
        "3": node("PrimitiveInt", "Seed of both images", (40, 620), (380, 100), value=SEED),
        "4": node(
            "T5TokenizerOptions",
            "T5 Tokenizer Options",
            (500, 80),
            (400, 120),
            clip=["1", 1],
            min_padding=0,
            min_length=512,
        ),
        "5": node("CLIPTextEncode", "Positive prompt", (500, 260), (400, 170), clip=clip, text=POSITIVE),
        "6": node("CLIPTextEncode", "Negative prompt", (500, 480), (400, 130), clip=clip, text=NEGATIVE),
        "7": node(
            model.latent_node, "Image size", (500, 660), (400, 140), width=model.size, height=model.size, batch_size=1
        ),
        "8": sampler(model, "Sample without tokens", (980, 80), ["1", 0]),
        "9": sampler(model, "Sample with tokens", (980, 490), ["2", 0]),
        "10": node("VAEDecode", "Decode without tokens", (1380, 80), (260, 60), samples=["8", 0], vae=["1", 2]),
        "11": node("VAEDecode", "Decode with tokens", (1380, 490), (260, 60), samples=["9", 0], vae=["1", 2]),
        "12": node(
            "ImageStitch",
            "Left: without, right: with",
            (1720, 80),
            (520, 180),
            image1=["10", 0],
            image2=["11", 0],
            direction="right",
            match_image_size=False,
            spacing_width=0,
            spacing_color="white",
        ),
        "13": node(
            "SaveImage",
            "Save Image",
            (1720, 310),
            (520, 500),
            images=["12", 0],
            filename_prefix=f"SoftREPA_{model.family}",
        ),
    }
    if model.family != "sd3":
        del nodes["4"]
    nodes["1"]["properties"] = {"models": [{"name": model.checkpoint, "url": url, "directory": "checkpoints"}]}
    return {
        "name": f"text_to_image_{model.family}",
        "nodes": nodes,
        "groups": {
            "Model and tokens": [20, 20, 420, 720],
            "Prompt and size": [480, 20, 440, 800],
            "Without tokens": [960, 20, 700, 390],
            "With tokens": [960, 430, 700, 390],
            "Comparison": [1700, 20, 560, 810],
        },
        "notes": [
            {
                "title": "What to change",
                "pos": [-440, 20],
                "size": [420, 480],
                "text": note(model),
            }
        ],
    }


def note(model: Model) -> str:
    return "\n\n".join(
        part
        for part in (
            f"## {model.title} with soft text tokens",
            "Samples one seed twice, without and with the tokens, and saves both side by side.",
            f"**Checkpoint**: any {model.title} checkpoint in `models/checkpoints`, for example "
            f"[{model.checkpoint}]({HUGGING_FACE}/{model.repository}).",
            f"**Load SoftREPA Tokens**: choose your {model.title} token file. Files live in `models/softrepa`; the "
            "pack's README says where to get the published ones.",
            "**strength** 1 is the trained effect, 0 is the plain model.",
            "**Seed of both images** feeds both samplers. Give both the same steps, cfg, sampler and scheduler.",
            model.advice,
        )
        if part
    )


def sampler(model: Model, title: str, position: tuple[int, int], source: list) -> dict:
    return node(
        "KSampler",
        title,
        position,
        (360, 310),
        model=source,
        seed=["3", 0],
        steps=model.steps,
        cfg=model.cfg,
        sampler_name="euler",
        scheduler="normal",
        positive=["5", 0],
        negative=["6", 0],
        latent_image=["7", 0],
        denoise=1.0,
    )


def node(class_type: str, title: str, position: tuple[int, int], size: tuple[int, int], **inputs) -> dict:
    return {"class": class_type, "title": title, "pos": list(position), "size": list(size), "inputs": inputs}


WORKFLOWS = [text_to_image(model) for model in MODELS]
