"""A family is known in one place: the table and the adapters; everything else asks them."""

import ast

import pytest
from comfyui_softrepa.softrepa.families import FAMILIES, depth, format_blocks, parse_blocks, where
from softrepa_tests.conftest import ROOT
from softrepa_tests.repository import files

KNOWS = ("softrepa/families.py", "softrepa/comfy/families/", "softrepa/evaluation/presets.py")
"""The last one holds the paper's figures, which are of its three families."""
MODELS = ("nodes/smallworld.py", "softrepa/smallworld/")
"""Of one model, which is of a family."""
SHIPPED = [
    path
    for path in files("*.py")
    if path.parts[0] in ("softrepa", "nodes") and not path.as_posix().startswith((*KNOWS, *MODELS))
]


@pytest.mark.parametrize("path", SHIPPED, ids=str)
def test_nothing_else_names_a_family_or_asks_what_kind_of_blocks_it_has(path):
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    named = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and node.value in FAMILIES]
    asked = [
        ast.unparse(node)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and "blocks" in ast.unparse(node))
        or (isinstance(node, ast.Attribute) and node.attr in ("stream", "is_layered", "context_width"))
    ]
    assert not named
    assert not asked


def test_every_row_has_a_stream_and_a_size():
    for family in FAMILIES.values():
        assert family.stream
        assert family.text_width or not family.context_width
        assert family.is_layered == (len(family.shape(5, 4, 8)) == 3)
        assert depth(family.usual_blocks(24)) == (family.recipe.layers if family.is_layered else 1)


@pytest.mark.parametrize(("family", "text"), [("sd15", "down,mid"), ("sdxl", "up"), ("sd3", "5")])
def test_blocks_and_their_text(family, text):
    blocks = parse_blocks(text, FAMILIES[family], "x")
    assert format_blocks(blocks) == text
    assert where(blocks) == ("first 5 blocks" if family == "sd3" else text)
