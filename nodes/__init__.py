"""The nodes, one file a subject."""

from comfy_api.latest import ComfyExtension

from ..softrepa.comfy import folders
from . import compare, dataset, flowedit, merging, score, smallworld, tokens, training


class SoftREPAExtension(ComfyExtension):
    async def get_node_list(self):
        folders.register()  # here and not in on_load, which ComfyUI 0.3.75 does not call
        merging.watch()
        subjects = (tokens, flowedit, dataset, training, score, compare, smallworld)
        return [node for subject in subjects for node in subject.NODES]


async def comfy_entrypoint() -> ComfyExtension:
    return SoftREPAExtension()
