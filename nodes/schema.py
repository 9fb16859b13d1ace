"""What all nodes of the pack share: category, custom types, and schema fields that older ComfyUI lacks."""

import dataclasses
import inspect
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from server import PromptServer

from ..softrepa.charts import DARK, LIGHT, Theme
from ..softrepa.errors import SoftREPAError, printable
from ..softrepa.files import parse_json, read_bounded

CATEGORY = "SoftREPA"

Tokens = io.Custom("SOFTREPA_TOKENS")
Dataset = io.Custom("SOFTREPA_DATASET")
TrainingOptions = io.Custom("SOFTREPA_TRAINING_OPTIONS")
Curve = io.Custom("CURVE")
"""ComfyUI's own type, which 0.3.75 does not have; only ever a socket, where core's `io.Curve` is a widget.

The search dialog draws the widget all the same, of the default that the input gives.
"""

ADVANCED = {"advanced": True} if "advanced" in inspect.signature(io.Float.Input.__init__).parameters else {}
"""Marks an input as advanced where this ComfyUI knows the word."""

SETTINGS = Path("default", "comfy.settings.json")
"""Of the user, where a ComfyUI has one."""
MOST_SETTINGS = 1 << 22

_SCHEMA_FIELDS = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields) -> io.Schema:
    """An `io.Schema` in the pack's category; `search_aliases` is dropped where this ComfyUI does not know it."""
    optional = {"search_aliases"} - _SCHEMA_FIELDS
    return io.Schema(category=CATEGORY, **{key: value for key, value in fields.items() if key not in optional})


def users_theme() -> Theme:
    """Of pictures, as this user's ComfyUI looks; dark where nobody chose, as ComfyUI is by itself."""
    try:
        settings = parse_json(read_bounded(Path(folder_paths.get_user_directory()) / SETTINGS, MOST_SETTINGS))
    except (OSError, SoftREPAError):
        return DARK
    is_light = isinstance(settings, dict) and settings.get("Comfy.ColorPalette") == "light"
    return LIGHT if is_light else DARK


WIDGETS = {int: io.Int, float: io.Float, bool: io.Boolean, str: io.String}


def widget(inputs, name: str, tooltip: str, **more):
    """The widget of one field of the dataclass `inputs`, with its kind and default; a choice where `options` are given.

    Optional unless `inputs.REQUIRED` holds it.
    """
    default = inputs.__dataclass_fields__[name].default
    kind = io.Combo if "options" in more else WIDGETS[type(default)]
    is_optional = {} if name in inputs.REQUIRED else {"optional": True}
    return kind.Input(name, default=default, tooltip=tooltip, **is_optional, **more)


ON_CANVAS = (io.Hidden.unique_id, io.Hidden.dynprompt)
"""What a node needs that writes below itself."""


def id_on_canvas(node: type[io.ComfyNode]) -> str | None:
    """Of the node that a person sees: in a loop, or where another node made it, it runs under other ids.

    None outside a running server.
    """
    if not (node.hidden and node.hidden.unique_id and hasattr(PromptServer, "instance")):
        return None
    graph = node.hidden.dynprompt
    return graph.get_display_node_id(node.hidden.unique_id) if graph else node.hidden.unique_id


def whole_graph(node: type[io.ComfyNode]) -> dict[str, dict]:
    """All nodes of the prompt that runs, with those that loops and other nodes have made; none outside of one."""
    graph = node.hidden and node.hidden.dynprompt
    return {name: graph.get_node(name) for name in graph.all_node_ids()} if graph else {}


def tell_node(node: type[io.ComfyNode], data: dict) -> None:
    """Sends the numbers of a run to the node's curves; nothing outside a running server."""
    if name := id_on_canvas(node):
        server = PromptServer.instance
        place = {"node": name, "prompt": server.last_prompt_id}
        server.send_sync("softrepa.training", data | place, server.client_id)


def tell_of_new_tokens() -> None:
    """Every open browser lists token files anew; nothing outside a running server."""
    if hasattr(PromptServer, "instance"):
        PromptServer.instance.send_sync("softrepa.new_tokens", {})


def show_on_node(node: type[io.ComfyNode], text: str) -> None:
    """Writes lines under the node in the graph; nothing outside a running server."""
    if name := id_on_canvas(node):
        PromptServer.instance.send_progress_text(in_lines(text), name)


def in_lines(text: str) -> str:
    """A text as nodes show it: Nodes 2.0 takes it for Markdown, which keeps lines apart only behind two spaces.

    Names of files may hold what the server cannot send as UTF-8.
    """
    return printable(text).replace("\n", "  \n")
