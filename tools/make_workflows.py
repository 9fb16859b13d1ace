"""Writes workflows/*.json (for the frontend) and workflows/api/*.json (for headless runs) from one description each.

    python3 -m tools.make_workflows

Inputs, outputs and widgets are read from a running ComfyUI, so the files match the nodes as they are.
"""

import argparse
import json
import tempfile
import uuid
from pathlib import Path

from softrepa import __version__

from . import environment
from .workflow_descriptions import WORKFLOWS, Workflow

ROOT = Path(__file__).absolute().parents[1]
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DRAWN_TYPES = ("IMAGECOMPARE",)
"""Widgets of lists, which only `__value__` tells from links: a view of two pictures."""
GROUP_COLOUR, NOTE_COLOURS = "#3f789e", {"color": "#432", "bgcolor": "#653"}
PROMPT_COLOURS = {
    "Positive prompt": {"color": "#232", "bgcolor": "#353"},
    "Negative prompt": {"color": "#322", "bgcolor": "#533"},
}
PACK, VERSION, CORE_VERSION = "comfyui-softrepa", __version__, environment.DEFAULT_VERSION
# pixels of the frontend's canvas
GAP, PADDING, GROUP_TITLE, NODE_TITLE = 40, 20, 50, 30
SLOT_HEIGHT, WIDGET_HEIGHT = 20, 24
NOTE_WIDTH, NOTE_HEIGHT = 420, 560


def api_graph(workflow: Workflow, info: dict) -> dict:
    """ComfyUI's API format, with every widget's value."""
    return {
        key: {
            "inputs": default_values(info[node.class_type]) | node.inputs,
            "class_type": node.class_type,
            "_meta": {"title": node.title},
        }
        for key, node in workflow.nodes.items()
    }


def default_values(info: dict) -> dict:
    """What the frontend sends of widgets that nobody touched."""
    return {
        name: options["default"]
        for name, kind, options in input_definitions(info)
        if kind in WIDGET_TYPES and "default" in options
    }


def frontend_graph(workflow: Workflow, info: dict) -> dict:
    """The format that the frontend saves and opens."""
    links: list[list] = []
    nodes: list[dict] = []
    places, groups = layout(workflow, info)
    outputs = {key: frontend_outputs(info[node.class_type]) for key, node in workflow.nodes.items()}
    for order, (key, node) in enumerate(workflow.nodes.items()):
        inputs: list[dict] = []
        values: list = []
        for name, kind, options in input_definitions(info[node.class_type]):
            value = node.inputs.get(name, options.get("default"))
            is_widget = kind in WIDGET_TYPES
            if isinstance(value, list):
                source, slot = value
                links.append([len(links) + 1, int(source), slot, int(key), len(inputs), outputs[source][slot]["type"]])
                outputs[source][slot]["links"].append(len(links))
                inputs.append({"name": name, "type": kind, "link": len(links)})
                if is_widget:
                    inputs[-1]["widget"] = {"name": name}
            elif kind in DRAWN_TYPES and isinstance(value, dict):
                values.append(value["__value__"])
            elif not is_widget:
                inputs.append({"name": name, "type": kind, "link": None})
            if is_widget:
                values.append(options.get("default") if isinstance(value, list) else value)
                if options.get("control_after_generate"):
                    values.append("fixed")
                if options.get("image_upload"):
                    values.append("image")  # the button below the list
        is_ours = node.class_type.startswith("SoftREPA")
        package = {"cnr_id": PACK, "ver": VERSION} if is_ours else {"cnr_id": "comfy-core", "ver": CORE_VERSION}
        models = {"models": list(node.models)} if node.models else {}
        nodes.append(
            {
                "id": int(key),
                "type": node.class_type,
                **places[key],
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": inputs,
                "outputs": outputs[key],
                "title": node.title,
                "properties": {"Node name for S&R": node.class_type} | package | models,
                "widgets_values": values,
                **prompt_colours(node.title),
            }
        )
    last_node = max(node["id"] for node in nodes)
    note = {
        "id": last_node + 1,
        "type": "MarkdownNote",
        "pos": [-NOTE_WIDTH - GAP, 0],
        "size": [NOTE_WIDTH, NOTE_HEIGHT],
        "flags": {},
        "order": len(nodes),
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "What to change",
        "properties": {},
        "widgets_values": ["\n\n".join(part for part in workflow.note if part)],
        **NOTE_COLOURS,
    }
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, workflow.name)),
        "revision": 0,
        "last_node_id": note["id"],
        "last_link_id": len(links),
        "nodes": [*nodes, note],
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


def layout(workflow: Workflow, info: dict) -> tuple[dict[str, dict], list[dict]]:
    """Place and size of each node by its key, and the groups: columns from left to right."""
    places: dict[str, dict] = {}
    groups: list[dict] = []
    left = 0
    for column in workflow.columns:
        top = 0
        for group in column.groups:
            y = top + GROUP_TITLE
            for key in group.nodes:
                node = workflow.nodes[key]
                height = node_height(info[node.class_type], node.height)
                places[key] = {"pos": [left + PADDING, y + NODE_TITLE], "size": [column.width, height]}
                y += NODE_TITLE + height + PADDING
            groups.append(
                {
                    "id": len(groups) + 1,
                    "title": group.title,
                    "bounding": [left, top, column.width + 2 * PADDING, y - top],
                    "color": GROUP_COLOUR,
                    "font_size": 24,
                    "flags": {},
                }
            )
            top = y + GAP
        left += column.width + 2 * PADDING + GAP
    return places, groups


def node_height(info: dict, extra: int) -> int:
    """What the frontend needs below the title, and `extra` for text or a picture."""
    kinds = [(kind, options) for _, kind, options in input_definitions(info)]
    widgets = [options for kind, options in kinds if kind in WIDGET_TYPES]
    rows = len(widgets) + sum("control_after_generate" in options or "image_upload" in options for options in widgets)
    slots = max(len(kinds) - len(widgets), len(info["output"]))
    return SLOT_HEIGHT * slots + WIDGET_HEIGHT * rows + 14 + extra


def prompt_colours(title: str) -> dict:
    for word, colours in PROMPT_COLOURS.items():
        if word in title:
            return colours
    return {}


def input_definitions(info: dict) -> list[tuple[str, str, dict]]:
    """Name, type and options of every input, in the order of the node's widgets."""
    definitions = []
    for group in ("required", "optional"):
        for name in info["input_order"].get(group, []):
            kind, *options = info["input"][group][name]
            definitions.append((name, "COMBO" if isinstance(kind, list) else kind, options[0] if options else {}))
    return definitions


def frontend_outputs(info: dict) -> list[dict]:
    return [
        {"name": name, "type": kind, "slot_index": slot, "links": []}
        for slot, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True))
    ]


def write(path: Path, graph: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(graph, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tools.make_workflows", description=__doc__.splitlines()[0])
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    environment.enter("tools.make_workflows", arguments.comfyui, arguments.python)

    from .server import ComfyServer

    with tempfile.TemporaryDirectory() as work, ComfyServer(work) as server:
        info = server.object_info()
    for workflow in WORKFLOWS:
        write(ROOT / "workflows" / "api" / f"{workflow.name}.json", api_graph(workflow, info))
        write(ROOT / "workflows" / f"{workflow.title}.json", frontend_graph(workflow, info))


if __name__ == "__main__":
    main()
