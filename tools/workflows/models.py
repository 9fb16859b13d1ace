"""The models that templates are made for: their files, loaders and settings."""

from dataclasses import dataclass

from .layout import Node

HUGGING_FACE = "https://huggingface.co"


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
