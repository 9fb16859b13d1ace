"""Writes workflows/*.json (for the frontend), workflows/api/*.json (for headless runs), and subgraphs/*.json.

    python3 -m tools.make_workflows

Inputs, outputs and widgets are read from a running ComfyUI, so the files match the nodes as they are. A link goes
straight to the next column; every other one is led around the nodes in between, by points on it.
"""

import argparse
import json
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from softrepa import __version__

from . import environment
from .workflows import BLUEPRINTS, WORKFLOWS
from .workflows.layout import NOTE_WIDTH, UNTELLING, Blueprint, Column, Node, Note, Workflow

ROOT = Path(__file__).absolute().parents[1]
WIDGET_TYPES = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
LINK = re.compile(r"\[([^]]*)\]\([^)]*\)")
GROUP_COLOUR, NOTE_COLOURS = "#3f789e", {"color": "#432", "bgcolor": "#653"}
PROMPT_COLOURS = {
    "Positive prompt": {"color": "#232", "bgcolor": "#353"},
    "Negative prompt": {"color": "#322", "bgcolor": "#533"},
}
CATEGORY = "SoftREPA"
INPUT_SIDE, OUTPUT_SIDE = -10, -20  # what stands for a blueprint's own sockets in it
PACK, VERSION, CORE_VERSION = "comfyui-softrepa", __version__, environment.DEFAULT_VERSION
# pixels of the frontend's canvas
GAP, PADDING, GROUP_TITLE, NODE_TITLE = 60, 20, 50, 30
SLOT_HEIGHT, WIDGET_HEIGHT = 20, 24
FIRST_SLOT = 14  # of a node's first input or output, below its title
LANE = 14  # between links beside each other
STRIP = 26  # between nodes below each other
# of a note's text, in the classic view, whose letters are the larger ones: width of a letter, height of a line
LARGE, SMALL = (10.7, 27), (5.4, 13)


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
    note = note_node(workflow)
    places, groups, lanes = layout(workflow.columns, workflow.nodes, info, note["size"][1])
    nodes, links = frontend_nodes(workflow.nodes, places, info)
    reroutes, extensions = lead_around(nodes, links, lanes)
    note |= {"id": max(node["id"] for node in nodes) + 1, "order": len(nodes)}
    extra: dict = {"reroutes": reroutes, "linkExtensions": extensions} if reroutes else {}
    if workflow.app:
        widgets, shown = workflow.app.inputs, workflow.app.outputs
        data = {"inputs": [[int(key), name] for key, name in widgets], "outputs": [int(key) for key in shown]}
        extra |= {"linearMode": False, "linearData": data}
        name_widgets(nodes, widgets, info)
    return {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, workflow.name)),
        "revision": 0,
        "last_node_id": note["id"],
        "last_link_id": len(links),
        "nodes": [*nodes, note],
        "links": links,
        "groups": groups,
        "config": {},
        "extra": extra,
        "version": 0.4,
    }


def name_widgets(nodes: list[dict], shown: Iterable[tuple[str, str]], info: dict) -> None:
    """App mode shows widgets without their nodes: one that says nothing by itself gets its node's title."""
    by_id = {str(node["id"]): node for node in nodes}
    for key, name in shown:
        if name in UNTELLING:
            node = by_id[key]
            place = input_place(node, name, input_kind(info[node["type"]], name))
            node["inputs"][place]["label"] = node["title"]


def frontend_nodes(described: dict[str, Node], places: dict[str, dict], info: dict) -> tuple[list[dict], list[list]]:
    """The nodes, and the links between them: [id, source, slot, target, slot, type]."""
    links: list[list] = []
    nodes: list[dict] = []
    outputs = {key: frontend_outputs(info[node.class_type]) for key, node in described.items()}
    for order, (key, node) in enumerate(described.items()):
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
    return nodes, links


def blueprint_graph(blueprint: Blueprint, info: dict) -> dict:
    """A graph of one node, which is defined in it."""
    places, groups, lanes = layout(blueprint.columns, blueprint.nodes, info)
    nodes, links = frontend_nodes(blueprint.nodes, places, info)
    reroutes, extensions = lead_around(nodes, links, lanes)
    by_id = {str(node["id"]): node for node in nodes}
    last_point = {extension["id"]: {"parentId": extension["parentId"]} for extension in extensions}
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
    inner = [dict(zip(keys, link, strict=True)) | last_point.get(link[0], {}) for link in links]
    inputs, outputs = [], []
    for slot, (name, *targets) in enumerate(blueprint.inputs):
        ids = []
        for key, target in targets:
            kind = input_kind(info[blueprint.nodes[key].class_type], target)
            place = input_place(by_id[key], target, kind)
            ids.append(len(inner) + 1)
            by_id[key]["inputs"][place]["link"] = ids[-1]
            inner.append(dict(zip(keys, (ids[-1], INPUT_SIDE, slot, int(key), place, kind), strict=True)))
        widget = {"widget": {"name": name}} if kind in WIDGET_TYPES else {}
        inputs.append({"name": name, "type": kind, **widget, "linkIds": ids})
    for slot, (name, key, place) in enumerate(blueprint.outputs):
        output = by_id[key]["outputs"][place]
        inner.append(dict(zip(keys, (len(inner) + 1, int(key), place, OUTPUT_SIDE, slot, output["type"]), strict=True)))
        output["links"].append(len(inner))
        outputs.append({"name": name, "type": output["type"], "linkIds": [len(inner)]})
    right = lanes.sides[-1][1] + PADDING + GAP
    own = str(uuid.uuid5(uuid.NAMESPACE_URL, blueprint.name))
    definition = {
        "id": own,
        "version": 1,
        "state": {
            "lastGroupId": len(groups),
            "lastNodeId": max(node["id"] for node in nodes),
            "lastLinkId": len(inner),
            "lastRerouteId": len(reroutes),
        },
        "revision": 0,
        "config": {},
        "name": blueprint.name,
        "category": CATEGORY,
        "description": blueprint.description,
        "inputNode": side_node(INPUT_SIDE, -160 - GAP, len(inputs)),
        "outputNode": side_node(OUTPUT_SIDE, right, len(outputs)),
        "inputs": [side_slot(blueprint, "in", slot) for slot in inputs],
        "outputs": [side_slot(blueprint, "out", slot) for slot in outputs],
        "widgets": [],
        "nodes": nodes,
        "groups": groups,
        "links": inner,
        "reroutes": reroutes,
        "extra": {},
    }
    sockets = [
        {key: slot[key] for key in ("name", "type", "widget") if key in slot} | {"link": None} for slot in inputs
    ]
    shown = sum("widget" in slot for slot in inputs)
    node = {
        "id": 1,
        "type": own,
        "pos": [0, 0],
        "size": [400, SLOT_HEIGHT * (len(inputs) - shown) + WIDGET_HEIGHT * shown + 140],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": sockets,
        "outputs": [{"name": slot["name"], "type": slot["type"], "links": []} for slot in outputs],
        "title": blueprint.name,
        "properties": {
            "cnr_id": PACK,
            "ver": VERSION,
            "proxyWidgets": [
                [*targets[0]] for (_, *targets), slot in zip(blueprint.inputs, inputs, strict=True) if "widget" in slot
            ],
        },
        "widgets_values": [],
    }
    return {
        "revision": 0,
        "last_node_id": 1,
        "last_link_id": 0,
        "nodes": [node],
        "links": [],
        "version": 0.4,
        "definitions": {"subgraphs": [definition]},
        "extra": {"BlueprintDescription": blueprint.description, "BlueprintSearchAliases": ["softrepa"]},
    }


def input_place(node: dict, name: str, kind: str) -> int:
    """The slot of an input; one is made where a widget has none yet."""
    for place, slot in enumerate(node["inputs"]):
        if slot["name"] == name:
            return place
    node["inputs"].append({"name": name, "type": kind, "widget": {"name": name}, "link": None})
    return len(node["inputs"]) - 1


def side_node(key: int, x: int, slots: int) -> dict:
    return {"id": key, "bounding": [x, 0, 160, SLOT_HEIGHT * slots + 40]}


def side_slot(blueprint: Blueprint, side: str, slot: dict) -> dict:
    own = uuid.uuid5(uuid.NAMESPACE_URL, f"{blueprint.name} {side} {slot['name']}")
    return {"id": str(own), "name": slot["name"], "type": slot["type"], "linkIds": slot["linkIds"]}


def note_node(workflow: Workflow) -> dict:
    note = workflow.note
    text = "\n\n".join([f"# {note.title}", *(f"# {number}. {step}" for number, step in enumerate(note.steps, 1))])
    text = "\n\n".join([text, *note.details])
    return {
        "id": 0,
        "type": "MarkdownNote",
        "pos": [PADDING, NODE_TITLE],
        "size": [NOTE_WIDTH, note_height(note)],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "What to do",
        "properties": {},
        "widgets_values": [text],
        **NOTE_COLOURS,
    }


def note_height(note: Note) -> int:
    height = 2 * PADDING
    for text, (letter, line) in [
        *((part, LARGE) for part in (note.title, *note.steps)),
        *((part, SMALL) for part in note.details),
    ]:
        length = len(LINK.sub(r"\1", text)) + 3
        height += line * -(-length // int((NOTE_WIDTH - PADDING) / letter)) + line // 2
    return height


@dataclass(frozen=True)
class Lanes:
    """Where links may run free of nodes: beside columns, and above them all.

    column: of a node by its id; sides: x of the nodes' left and right edges by column.
    """

    column: dict[int, int]
    sides: list[tuple[int, int]]


def layout(
    columns: tuple[Column, ...], nodes: dict[str, Node], info: dict, note: int = 0
) -> tuple[dict[str, dict], list[dict], Lanes]:
    """Place and size of each node by its key, the groups, and the lanes. `note` is the height of the note on top."""
    places: dict[str, dict] = {}
    groups: list[dict] = []
    lanes = Lanes({}, [])
    left = 0
    for number, column in enumerate(columns):
        top = NODE_TITLE + note + PADDING if note and not number else 0
        for group in column.groups:
            y = top + GROUP_TITLE
            for key in group.nodes:
                height = node_height(info[nodes[key].class_type], nodes[key].height)
                places[key] = {"pos": [left + PADDING, y + NODE_TITLE], "size": [column.width, height]}
                lanes.column[int(key)] = number
                y += NODE_TITLE + height + STRIP
            y += PADDING - STRIP
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
            top = y + PADDING
        lanes.sides.append((left + PADDING, left + PADDING + column.width))
        left += column.width + 2 * PADDING + GAP
    return places, groups, lanes


def lead_around(nodes: list[dict], links: list[list], lanes: Lanes) -> tuple[list[dict], list[dict]]:
    """Points for the links that would cross nodes, as the frontend keeps them: points, and each link's last one."""
    by_id = {node["id"]: node for node in nodes}
    points: list[dict] = []
    extensions: list[dict] = []
    corners: dict[tuple[int, int], int] = {}  # above the columns, shared by the links of one output
    used: Counter = Counter()

    def beside(lane: object) -> int:
        used[lane] += 1
        return LANE * (used[lane] - 1)

    def lead(link: int, behind: int, *places: tuple[float, float]) -> int:
        """New points of a link behind that one (0: behind the output); the last point's id."""
        for place in places:
            parent = {"parentId": behind} if behind else {}
            points.append({"id": len(points) + 1, **parent, "pos": [*place], "linkIds": [link]})
            behind = len(points)
        return behind

    def share(link: int, corner: int) -> None:
        while corner:
            points[corner - 1]["linkIds"].append(link)
            corner = points[corner - 1].get("parentId", 0)

    for link, source, slot, target, target_slot, _ in links:
        column, target_column = lanes.column[source], lanes.column[target]
        left, right = lanes.sides[target_column][0], lanes.sides[column][1]
        if target_column == column + 1:
            continue
        if target_column == column:
            y = by_id[target]["pos"][1] - NODE_TITLE - STRIP + 8 + beside(("strip", target)) * 0.7
            last = lead(link, 0, (right + 12, y), (left - 12, y))
        else:
            corner = corners.get((source, slot))
            if corner:
                share(link, corner)
            else:
                x = right + PADDING + 10 + beside(("right of", column)) % GAP
                corner = lead(link, 0, (x, slot_height(by_id[source], slot)), (x, -LANE - beside("above")))
                corners[source, slot] = corner
            x = left - PADDING - 10 - beside(("left of", target_column)) % GAP
            end = slot_height(by_id[target], target_slot)
            last = lead(link, corner, (x, points[corner - 1]["pos"][1]), (x, end))
        extensions.append({"id": link, "parentId": last})
    return points, extensions


def slot_height(node: dict, slot: int) -> int:
    return node["pos"][1] + FIRST_SLOT + SLOT_HEIGHT * slot


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


def input_kind(info: dict, name: str) -> str:
    return next(kind for one, kind, _ in input_definitions(info) if one == name)


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
    for blueprint in BLUEPRINTS:
        write(ROOT / "subgraphs" / f"{blueprint.name}.json", blueprint_graph(blueprint, info))


if __name__ == "__main__":
    main()
