"""A model to try everything on, without a download."""

from pathlib import Path

import comfy.sd
import folder_paths
from comfy_api.latest import io

from ..softrepa import token_files
from ..softrepa.smallworld.checkpoint import TOKENS, cached_checkpoint
from .schema import Tokens, schema


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


NODES = [LoadSmallWorld]
