"""Writes workflows/*.json (for the frontend) and workflows/api/*.json (for headless runs) from one description each.

    python3 -m benchmarks.workflow_files

Inputs, outputs and widgets are read from a running ComfyUI, so the files match the nodes as they are.
"""

import argparse
import json
import tempfile
import uuid
from pathlib import Path

from . import environment

ROOT = Path(__file__).absolute().parents[1]
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
GROUP_COLOUR, NOTE_COLOURS = "#3f789e", {"color": "#432", "bgcolor": "#653"}
PROMPT_COLOURS = {
    "Positive prompt": {"color": "#232", "bgcolor": "#353"},
    "Negative prompt": {"color": "#322", "bgcolor": "#533"},
}


def api_graph(workflow: dict) -> dict:
    """ComfyUI's API format."""
    return {
        key: {"inputs": node["inputs"], "class_type": node["class"], "_meta": {"title": node["title"]}}
        for key, node in workflow["nodes"].items()
    }


def frontend_graph(workflow: dict, info: dict) -> dict:
    """The format that the frontend saves and opens."""
    links, nodes = [], []
    outputs = {key: frontend_outputs(info[node["class"]]) for key, node in workflow["nodes"].items()}
    for order, (key, node) in enumerate(workflow["nodes"].items()):
        inputs, values = [], []
        for name, kind, options in input_definitions(info[node["class"]]):
            value = node["inputs"].get(name, options.get("default"))
            is_widget = kind in WIDGET_TYPES
            if isinstance(value, list):
                source, slot = value
                links.append([len(links) + 1, int(source), slot, int(key), len(inputs), outputs[source][slot]["type"]])
                outputs[source][slot]["links"].append(len(links))
                inputs.append({"name": name, "type": kind, "link": len(links)})
                if is_widget:
                    inputs[-1]["widget"] = {"name": name}
            elif not is_widget:
                inputs.append({"name": name, "type": kind, "link": None})
            if is_widget:
                values.append(options.get("default") if isinstance(value, list) else value)
                if options.get("control_after_generate"):
                    values.append("fixed")
        nodes.append(
            {
                "id": int(key),
                "type": node["class"],
                "pos": node["pos"],
                "size": node["size"],
                "flags": {},
                "order": order,
                "mode": 0,
                "inputs": inputs,
                "outputs": outputs[key],
                "title": node["title"],
                "properties": {"Node name for S&R": node["class"]} | node.get("properties", {}),
                "widgets_values": values,
                **PROMPT_COLOURS.get(node["title"], {}),
            }
        )
    last_node = max(node["id"] for node in nodes)
    for number, note in enumerate(workflow["notes"], last_node + 1):
        nodes.append(
            {
                "id": number,
                "type": "MarkdownNote",
                "pos": note["pos"],
                "size": note["size"],
                "flags": {},
                "order": len(nodes),
                "mode": 0,
                "inputs": [],
                "outputs": [],
                "title": note["title"],
                "properties": {},
                "widgets_values": [note["text"]],
                **NOTE_COLOURS,
            }
        )
    groups = [
        {"id": number, "title": title, "bounding": bounding, "color": GROUP_COLOUR, "font_size": 24, "flags": {}}
        for number, (title, bounding) in enumerate(workflow["groups"].items(), 1)
    ]
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, workflow["name"])),
        "revision": 0,
        "last_node_id": max(node["id"] for node in nodes),
        "last_link_id": len(links),
        "nodes": nodes,
        "links": links,
        "groups": groups,
        "config": {},
        "extra": {},
        "version": 0.4,
    }


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
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.workflow_files", description=__doc__.splitlines()[0])
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    environment.enter("benchmarks.workflow_files", arguments.comfyui, arguments.python)

    from .server import ComfyServer
    from .workflows import WORKFLOWS

    with tempfile.TemporaryDirectory() as work, ComfyServer(work) as server:
        info = server.object_info()
    for workflow in WORKFLOWS:
        write(ROOT / "workflows" / "api" / f"{workflow['name']}.json", api_graph(workflow))
        write(ROOT / "workflows" / f"{workflow['name']}.json", frontend_graph(workflow, info))


if __name__ == "__main__":
    main()
