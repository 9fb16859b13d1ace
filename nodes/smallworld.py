"""A model to try everything on, without a download."""

from pathlib import Path

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..softrepa import token_files
from ..softrepa.comfy.data import dataset_folders
from ..softrepa.errors import unwritable
from ..softrepa.numbers import at_least, check_number
from ..softrepa.smallworld.checkpoint import TOKENS, cached_checkpoint
from ..softrepa.smallworld.pictures import write_pictures
from .schema import ON_CANVAS, Tokens, schema, show_on_node


class LoadSmallWorld(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPASmallWorld",
            display_name="Load Small World (demo model)",
            search_aliases=["demo model", "test model", "tiny model", "small world", "try softrepa"],
            description="A real SD3-type model of 4M parameters that comes with the pack, with soft tokens trained for "
            'it. It draws coloured shapes at 96 x 96, such as "two small red circles left of a blue square", and '
            "makes the mistakes that soft tokens are about.",
            inputs=[],
            outputs=[
                io.Model.Output(tooltip="Draw at 96 x 96, 20 steps, euler, simple, cfg 2."),
                io.Clip.Output(
                    tooltip="Knows circles, squares, triangles, diamonds and crosses, seven colours, "
                    "two sizes, numbers up to four and where things lie."
                ),
                io.Vae.Output(tooltip="In TAESD's format, 16 channels."),
                Tokens.Output(display_name="tokens", tooltip="Trained with Train SoftREPA Tokens on its own pictures."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        path = cached_checkpoint(Path(folder_paths.get_temp_directory()))
        embeddings = folder_paths.get_folder_paths("embeddings")
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(
            str(path), output_vae=True, output_clip=True, embedding_directory=embeddings
        )
        return io.NodeOutput(model, clip, vae, token_files.load(TOKENS))


class SmallWorldPictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPASmallWorldPictures",
            display_name="Small World Pictures",
            search_aliases=["demo dataset", "example training images", "sample captions"],
            description="Draws pictures of coloured shapes, with captions, into a folder below ComfyUI's input: what "
            "the small world can be trained on, and what a folder of your own looks like.",
            inputs=[
                io.Int.Input("count", default=128, min=8, max=9999, tooltip="How many pictures, each with a caption."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                    tooltip="Same seed, same pictures. Another one has a folder of its own.",
                ),
            ],
            outputs=[io.Combo.Output(display_name="folder", tooltip="For Caption-Image Folder.")],
            hidden=[*ON_CANVAS],
        )

    @classmethod
    def fingerprint_inputs(cls, count, seed):
        if count is None or seed is None:  # linked: what comes is part of what ComfyUI knows of the graph
            return None
        return dataset_folders.fingerprint(drawn(count, seed))

    @classmethod
    def execute(cls, count, seed) -> io.NodeOutput:
        folder = drawn(count, seed)
        show_on_node(cls, f"{count} pictures with captions in input/{folder.name}")
        return io.NodeOutput(folder.name)


def drawn(count: int, seed: int) -> Path:
    """The folder, with what was missing in it. Raises SoftREPAError."""
    for name, value, expected in (("count", count, at_least(1)), ("seed", seed, at_least(0))):
        check_number(name, value, expected)
    folder = Path(folder_paths.get_input_directory()) / f"small_world_{count}_{seed}"
    try:
        write_pictures(folder, count, seed)
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


NODES = [LoadSmallWorld, SmallWorldPictures]
