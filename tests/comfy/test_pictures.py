"""Pictures that nodes show: to be read at a node's width, on the dark and the light ComfyUI."""

import json

import folder_paths
import numpy as np
import pytest
from comfyui_softrepa.nodes import schema, token_plot
from comfyui_softrepa.softrepa.charts import DARK, LIGHT, ROW, TEXT, Chart, Line, draw
from softrepa_tests.token_sets import tokens_for

NODE = 560
"""Pixels of a score's node in its template, at its own size."""
LEGIBLE = 10
PANELS = [Chart(title, "step", (Line("in the batch", [1, 2], [0.1, 0.2]),)) for title in ("Loss", "Retrieval", "More")]


def corner(picture) -> tuple[int, ...]:
    return tuple(int(value) for value in np.asarray(picture)[-1, -1])


@pytest.mark.parametrize("theme", [DARK, LIGHT])
def test_three_panels_are_legible_in_a_node(theme):
    picture = draw(PANELS, theme)
    assert picture.width > 3 * picture.height  # side by side
    assert TEXT * NODE / picture.width >= LEGIBLE
    assert corner(picture) == theme.paper


def test_names_that_have_no_room_begin_a_row():
    def of(*names):
        return draw([Chart("x", "y", tuple(Line(name, [0, 1], [0, 1]) for name in names))])

    beside, below = of("one", "two"), of("a name of some length", "another of some length")
    assert below.height == beside.height + ROW
    for picture in (beside, below):
        edge = np.asarray(picture)[:, -3:]
        assert (edge == edge[0, 0]).all()  # no letter is cut off


@pytest.mark.parametrize("theme", [DARK, LIGHT])
def test_tokens_are_legible_in_a_node(theme):
    (picture,) = token_plot.draw(tokens_for("sd3"), theme)
    assert TEXT * NODE / picture.shape[1] >= LEGIBLE
    assert corner((picture * 255).round()) == theme.paper


@pytest.mark.parametrize(
    ("settings", "theme"),
    [
        (None, DARK),
        ('{"Comfy.ColorPalette": "light"}', LIGHT),
        ('{"Comfy.ColorPalette": "dark"}', DARK),
        (json.dumps({"Other": 1}), DARK),
        ("[]", DARK),
        ("not JSON", DARK),
    ],
)
def test_the_theme_is_the_users(tmp_path, monkeypatch, settings, theme):
    monkeypatch.setattr(folder_paths, "get_user_directory", lambda: str(tmp_path))
    if settings is not None:
        (tmp_path / "default").mkdir()
        (tmp_path / schema.SETTINGS).write_text(settings, encoding="utf-8")
    assert schema.users_theme() == theme
