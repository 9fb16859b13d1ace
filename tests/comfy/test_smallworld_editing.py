"""FlowEdit on drawn scenes: the fact that the caption changes is changed, and the others stay."""

import numpy as np
import pytest

from benchmarks.smallworld.editing import Edit, Editor, edits, verdict
from benchmarks.smallworld.measure import StockModel
from softrepa.comfy.tokens.patching import apply_tokens
from softrepa.smallworld.checkpoint import TOKENS
from softrepa.smallworld.world import Group, Scene, Spec, Thing, draw
from softrepa.token_files import load

PAPER = (0.9, 0.92, 0.9, 0.0, 0.03)
SCENE = Scene((Thing("circle", "red", "large", 16, 48), Thing("square", "blue", "small", 80, 48)), PAPER)
SOURCE = Spec((Group("circle", colour="red"), Group("square", colour="blue")))
TARGET = Spec((Group("circle", colour="green"), Group("square", colour="blue")))
EDIT = Edit(SCENE, SOURCE, TARGET, "colour")


@pytest.fixture(scope="module")
def editor(tmp_path_factory):
    return Editor(StockModel(tmp_path_factory.mktemp("smallworld")), edits(16))


@pytest.mark.parametrize(
    ("things", "expected"),
    [
        ((("circle", "green", "large", 18, 50), ("square", "blue", "small", 80, 48)), (True, True)),
        ((("circle", "red", "large", 16, 48), ("square", "blue", "small", 80, 48)), (False, True)),
        ((("circle", "green", "large", 16, 48), ("square", "green", "small", 80, 48)), (True, False)),
        ((("cross", "green", "large", 16, 48), ("square", "blue", "small", 80, 48)), (True, False)),
        ((("circle", "green", "large", 16, 48),), (True, False)),
        ((("circle", "green", "large", 48, 48), ("square", "blue", "small", 80, 48)), (False, False)),
    ],
)
def test_the_verdict(things, expected):
    assert verdict(draw(Scene(tuple(Thing(*thing) for thing in things), PAPER)), EDIT) == expected


@pytest.mark.parametrize("with_tokens", [False, True])
def test_a_fact_changes_and_the_rest_stays(editor, with_tokens):
    model = editor.stock.model
    if with_tokens:
        model = apply_tokens(model, load(TOKENS))
    changed, kept = editor.verdicts(editor.run(model, n_max=16, target_cfg=4.0))
    assert np.mean(changed) >= 0.6
    assert np.mean(kept) >= 0.6


def test_hardly_anything_happens_in_the_last_steps(editor):
    changed, kept = editor.verdicts(editor.run(editor.stock.model, n_max=4, target_cfg=4.0))
    assert np.mean(changed) <= 0.3
    assert np.mean(kept) >= 0.9


def test_the_source_is_kept_by_its_own_caption(editor):
    source, empty, _, _ = editor.conds
    editor.conds, conds = (source, empty, source, empty), editor.conds
    try:
        pictures = editor.run(editor.stock.model, n_max=16, target_cfg=1.5, source_cfg=1.5)
    finally:
        editor.conds = conds
    changed, kept = editor.verdicts(pictures)
    assert not any(changed)
    assert np.mean(kept) >= 0.9
