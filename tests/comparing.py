"""Comparisons on the small world, and judges whose verdicts are known."""

import asyncio

import torch
from comfyui_softrepa.nodes.smallworld import LoadSmallWorld
from comfyui_softrepa.softrepa.statistics import Unit

from benchmarks.smallworld import checker

SMALL = {
    "steps": 2,
    "cfg": 2.0,
    "sampler_name": "euler",
    "scheduler": "simple",
    "width": 96,
    "height": 96,
    "seeds": "0, 1",
}
PROMPTS = "a red circle\ntwo blue squares"


class Brightness:
    """A judge of no model: how bright a picture is. Counts what it was asked."""

    title = "brightness"
    unit = Unit(percent=True)

    def __init__(self, stop_after: int | None = None):
        self.asked, self.stop_after = [], stop_after

    def check(self, compared):
        pass

    def key(self, compared):
        return ""

    def note(self):
        return "mean of all pixels"

    def opened(self, compared):
        return self.score

    def score(self, one, picture):
        if len(self.asked) == self.stop_after:
            raise KeyboardInterrupt
        self.asked.append(one.file)
        return picture.mean().item()


class Checker(Brightness):
    """The small world's reader of pictures: whether one shows all that its prompt says."""

    title = "drawn right"

    def __init__(self, specs):
        super().__init__()
        self.specs = specs

    def score(self, one, picture):
        return float(checker.correct(picture[0].numpy(), self.specs[one.text]))


def small_world():
    """MODEL, CLIP, VAE and tokens, as the node gives them."""
    with torch.inference_mode():
        return LoadSmallWorld.execute().args


def run(node, **inputs):
    """A node's outputs."""
    found = node.execute(**inputs)
    return (asyncio.run(found) if asyncio.iscoroutine(found) else found).args
