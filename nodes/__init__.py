"""The nodes, one file a subject."""

from comfy_api.latest import ComfyExtension

from ..softrepa.comfy import folders
from . import flowedit, tokens


class SoftREPAExtension(ComfyExtension):
    async def on_load(self) -> None:
        folders.register()

    async def get_node_list(self):
        return [*tokens.NODES, *flowedit.NODES]


async def comfy_entrypoint() -> ComfyExtension:
    return SoftREPAExtension()
