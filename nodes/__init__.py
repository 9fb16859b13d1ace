"""The nodes, one file a subject."""

from comfy_api.latest import ComfyExtension

from ..softrepa.comfy import folders
from . import dataset, flowedit, score, tokens, training


class SoftREPAExtension(ComfyExtension):
    async def get_node_list(self):
        folders.register()  # here and not in on_load, which ComfyUI 0.3.75 does not call
        return [*tokens.NODES, *flowedit.NODES, *dataset.NODES, *training.NODES, *score.NODES]


async def comfy_entrypoint() -> ComfyExtension:
    return SoftREPAExtension()
