"""What a workflow is made of: nodes, where they stand, and the note beside them."""

from dataclasses import dataclass

# room below a node's widgets, in pixels: a line of text, a live preview, a training run's curves
LINE, PREVIEW = 60, 230
LIVE_CURVES = 420
NOTE_WIDTH = 420
UNTELLING = ("text", "value", "image")
"""Names of widgets that say nothing without their node's title."""


@dataclass(frozen=True)
class Node:
    """`inputs` are values, or [node, output] for a connection. `height` is for text and pictures, in pixels."""

    class_type: str
    title: str
    inputs: dict
    height: int = 0
    models: tuple[dict, ...] = ()


@dataclass(frozen=True)
class Group:
    """Nodes below each other under a title."""

    title: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Column:
    groups: tuple[Group, ...]
    width: int = 320


@dataclass(frozen=True)
class Note:
    """`steps` are in large type, to be read as the template opens; `details` are small."""

    title: str
    steps: tuple[str, ...]
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class App:
    """What app mode shows: (node, widget) to set, and nodes whose pictures are shown."""

    inputs: tuple[tuple[str, str], ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Workflow:
    """`name` is the headless file's; `title` the template's, as ComfyUI lists it.

    `columns` stand beside each other, the note on top of the first.
    """

    name: str
    title: str
    note: Note
    nodes: dict[str, Node]
    columns: tuple[Column, ...]
    app: App | None = None


@dataclass(frozen=True)
class Blueprint:
    """A part of a graph as one node. inputs: its sockets and widgets, (name, (node, input), ...), each for all inputs
    that it feeds; outputs: (name, node, output)."""

    name: str
    description: str
    nodes: dict[str, Node]
    columns: tuple[Column, ...]
    inputs: tuple[tuple, ...]
    outputs: tuple[tuple[str, str, int], ...]
