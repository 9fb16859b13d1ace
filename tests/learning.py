"""Training on the tiny models, on a dataset that lies in memory."""

import torch
from comfyui_softrepa.nodes.training import EVERYBODYS, TrainTokens
from comfyui_softrepa.softrepa.data.ahead import AtHand
from comfyui_softrepa.softrepa.data.batches import Example
from comfyui_softrepa.softrepa.data.dataset import Dataset
from comfyui_softrepa.softrepa.tokens import SoftTokens
from softrepa_tests.sampling import relative_error
from softrepa_tests.tiny_models import POOLED, WIDTH, latent_shape, seeded

TEXT = 8
"""Tokens of a caption. ComfyUI's 77, which take several times as long, the goldens have."""


class InMemory(AtHand):
    """Seeded latents and text encodings for a family."""

    identity = "seeded"

    def __init__(self, family: str):
        self.family = family
        self.empty = self.cond("")

    def latent(self, example: Example) -> torch.Tensor:
        return seeded(latent_shape(self.family), example.name, 1.0)

    def cond(self, caption: str) -> dict:
        pooled = POOLED.get(self.family)
        return {
            "cross_attn": seeded((1, TEXT, WIDTH[self.family]), f"text/{caption}", 1.0),
            "pooled_output": None if pooled is None else seeded((1, pooled), f"pooled/{caption}", 1.0),
        }

    def prepare(self, captions: list[str]) -> str:
        return "seeded"


def dataset(family: str, images: int = 6) -> Dataset:
    """Each caption has one hard negative."""
    examples = [Example(f"{i}.png", f"digest{i}", (f"cat {i} on mat {i}",), (64, 64)) for i in range(images)]
    return Dataset("toy", examples, [], InMemory(family), [])


def train(models, family: str, **options) -> tuple:
    """The outputs of the training node: tokens, losses, steps, path. Errors of random networks are large."""
    options = {"steps": 3, "batch_size": 2, "learning_rate": 1e-2, "seed": 0, "dataset": dataset(family)} | options
    options.setdefault("on_no_contrast", "go on")
    everybodys = {name: options.pop(name) for name in EVERYBODYS if name in options}
    return TrainTokens.execute(models[family], options=options, **everybodys).args


def moved_by(model, family: str, start: SoftTokens, **options) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """What a run adds to the tokens it starts from, by SGD in proportion to the gradient; its losses."""
    options = {"optimizer": "SGD", "learning_rate": 1.0, "micro_batch": 3, "steps": 1} | options
    if options.get("preset") != "AGSM":
        options |= {"temperature": 2.0}
    tokens, losses, _, _ = train({family: model}, family, init_tokens=start, **options)
    names = [name for name in ("tokens", "time_table", "negative_tokens") if getattr(start, name) is not None]
    return {name: getattr(tokens, name) - getattr(start, name) for name in names}, torch.tensor(losses["loss"])


def same_training(ours: tuple, expected: tuple, tolerance: float = 1e-3) -> None:
    """For two results of `moved_by`."""
    assert relative_error(ours[1], expected[1]) <= tolerance
    for name, change in expected[0].items():
        assert change.norm() > 0, name
        assert relative_error(ours[0][name], change) <= tolerance, name
