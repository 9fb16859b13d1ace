"""Captioned images for training: a folder, or what ComfyUI's own training nodes encode."""

from functools import partial

from comfy_api.latest import io

from ..softrepa.comfy.data import dataset_folders
from ..softrepa.comfy.data.assembly import dataset_of_folder
from ..softrepa.data.captions import CAPTION_LINES
from ..softrepa.data.inputs import DatasetInputs
from ..softrepa.data.latent_lists import dataset_of_lists
from ..softrepa.errors import SoftREPAError
from .schema import ADVANCED, ON_CANVAS, Dataset, schema, show_on_node
from .schema import widget as input_widget

widget = partial(input_widget, DatasetInputs)
ALIASES = ["dataset", "training images", "captions", "image text folder", "coco"]


class CaptionImageFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPADataset",
            display_name="Caption-Image Folder",
            search_aliases=ALIASES,
            description="Reads a folder of images with captions and encodes both for training, a large one while it is "
            "trained on. What is encoded is kept on disk, so that the next run starts at once.",
            inputs=[
                io.Combo.Input(
                    "folder",
                    options=dataset_folders.dataset_names(),
                    tooltip="A folder of captioned images below ComfyUI's input folder, or below softrepa_datasets of "
                    "extra_model_paths.yaml. Folders inside it belong to it.",
                ),
                io.Clip.Input(
                    "clip", tooltip="The text encoder of the model to train on. For SD3 after T5TokenizerOptions."
                ),
                io.Vae.Input("vae", tooltip="The VAE of the model to train on."),
                widget(
                    "resolution",
                    "Side of the training images in pixels: the shorter side is resized to it, the centre cut "
                    "out. The paper trains at 512; SDXL looks best at 1024.",
                    min=64,
                    max=4096,
                    step=64,
                ),
                widget(
                    "bucketing",
                    "Keeps the shape of wide and tall images: each gets the nearest of several sizes with as "
                    "many pixels. A batch holds one size.",
                ),
                widget(
                    "validation_percent",
                    "Share of the images that is never trained on, to measure with. Always the same images.",
                    min=0.0,
                    max=90.0,
                    step=1.0,
                    round=0.01,
                ),
                widget(
                    "cache_gb",
                    "Disk space for encoded images and captions, of all datasets together. What has no room is "
                    "encoded again each time.",
                    min=0.0,
                    max=100000.0,
                    step=1.0,
                    round=0.001,
                    **ADVANCED,
                ),
                widget(
                    "caption_lines",
                    "In a text file beside an image: each line is a caption, or the whole text is one, as "
                    "vision models write them.",
                    options=list(CAPTION_LINES),
                    **ADVANCED,
                ),
            ],
            outputs=[
                Dataset.Output(display_name="dataset", tooltip="For Train SoftREPA Tokens or the Alignment Score."),
                io.String.Output(
                    display_name="summary",
                    tooltip="Images, captions and sizes, what was left out and why, and captions that occur twice.",
                ),
            ],
            hidden=[*ON_CANVAS],
        )

    @classmethod
    def validate_inputs(cls, folder):
        try:
            if folder is not None:  # None while it comes from another node
                dataset_folders.dataset_path(folder)
        except SoftREPAError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, folder, **_):
        if folder is None:  # it comes from another node, and may be any
            return [dataset_folders.fingerprint(path) for path in dataset_folders.dataset_paths().values()]
        return dataset_folders.fingerprint(dataset_folders.dataset_path(folder))

    @classmethod
    def execute(cls, folder, clip, vae, **inputs) -> io.NodeOutput:
        path = dataset_folders.dataset_path(folder)
        dataset = dataset_of_folder(path, folder, clip, vae, DatasetInputs(**inputs))
        show_on_node(cls, dataset.summary)
        return io.NodeOutput(dataset, dataset.summary)


class DatasetFromLatents(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPADatasetFromLatents",
            display_name="Dataset from Latents",
            search_aliases=[*ALIASES, "make training dataset", "load training dataset"],
            description="Makes a dataset of latents and conditionings that ComfyUI's own nodes have encoded: Make "
            "Training Dataset, Load Training Dataset or Resolution Bucket.",
            is_input_list=True,
            inputs=[
                io.Latent.Input("latents", tooltip="Encoded images, a list or a batch."),
                io.Conditioning.Input("conditioning", tooltip="The encoded caption of each image, in the same order."),
                io.Conditioning.Input(
                    "empty_conditioning", tooltip="The encoding of an empty prompt, from CLIP Text Encode."
                ),
            ],
            outputs=[
                Dataset.Output(display_name="dataset", tooltip="For Train SoftREPA Tokens or the Alignment Score.")
            ],
            hidden=[*ON_CANVAS],
        )

    @classmethod
    def execute(cls, latents, conditioning, empty_conditioning) -> io.NodeOutput:
        dataset = dataset_of_lists(latents, conditioning, empty_conditioning)
        show_on_node(cls, dataset.summary)
        return io.NodeOutput(dataset)


NODES = [CaptionImageFolder, DatasetFromLatents]
