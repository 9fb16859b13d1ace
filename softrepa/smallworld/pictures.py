"""A folder of drawn pictures with captions, to train on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ..files import write_atomically
from .world import caption, draw, random_scene, random_spec

CATEGORIES = ("two_objects", "counting", "colours", "position", "colour_attribution", "mixed")


def write_pictures(folder: Path, count: int, seed: int, spec_of: Callable = random_spec) -> None:
    """`count` drawn scenes with one caption each, as a person would lay out a training folder.

    The same seed draws the same; files that are there stay.
    """
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        spec = spec_of(rng, CATEGORIES[number % len(CATEGORIES)])
        scene, words = random_scene(rng, spec), caption(rng, spec)
        picture, text = (folder / f"{number:04}{ending}" for ending in (".png", ".txt"))
        if not text.exists():
            write_atomically(text, partial(Path.write_text, data=words, encoding="utf-8"))
        if not picture.exists():
            image = Image.fromarray((draw(scene) * 255).round().astype(np.uint8))
            write_atomically(picture, partial(image.save, format="png"))
