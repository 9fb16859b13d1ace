"""How well a model tells the captions of a dataset apart."""

import math
from functools import partial

from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..softrepa import charts
from ..softrepa.comfy.training.score import HeldOut, Score, score
from ..softrepa.numbers import check_finite
from ..softrepa.statistics import Difference, Unit, paired_difference, verdict
from ..softrepa.training.inputs import ScoreInputs
from ..softrepa.training.timesteps import parse_timesteps
from .schema import ADVANCED, ON_CANVAS, Dataset, schema, show_on_node, users_theme
from .schema import widget as input_widget

widget = partial(input_widget, ScoreInputs)


class AlignmentScore(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPAScore",
            display_name="SoftREPA Alignment Score",
            search_aliases=["alignment score", "prompt adherence score", "evaluate tokens", "retrieval accuracy"],
            description="Measures how well a model, with tokens or without, tells which caption belongs to which "
            "image, by its own denoising errors. The noise is fixed, so two scores compare image by image.",
            inputs=[
                io.Model.Input("model", tooltip="As it is, with the tokens that it carries."),
                Dataset.Input("dataset", tooltip="Its validation images; all images where it has none."),
                widget(
                    "batch_size",
                    "Captions that an image is compared with. More make the choice harder.",
                    min=2,
                    max=256,
                ),
                widget("batches", "How many batches, at most.", min=1, max=100_000),
                widget("timesteps", "Where to measure, 0 to 999: high is much noise.", **ADVANCED),
                widget(
                    "seed",
                    "Same seed, same noise and same batches.",
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,
                ),
                io.Model.Input(
                    "other_model",
                    optional=True,
                    tooltip="A second model, with other tokens say: what it has more than the first, on the same "
                    "images and noise.",
                ),
            ],
            outputs=[
                io.Float.Output(display_name="accuracy", tooltip="Share of images whose own caption fits best."),
                io.Float.Output(display_name="loss", tooltip="The contrastive loss at the paper's temperature."),
                io.Image.Output(display_name="plot", tooltip="Both, and the mutual information, by timestep."),
                io.Float.Output(
                    display_name="difference",
                    tooltip="Accuracy of the other model less that of the model; NaN without another.",
                ),
                io.Float.Output(display_name="low", tooltip="Where the difference's 95% interval begins."),
                io.Float.Output(display_name="high", tooltip="Where it ends."),
            ],
            hidden=[*ON_CANVAS],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        model,
        dataset,
        batch_size=ScoreInputs.batch_size,
        batches=ScoreInputs.batches,
        timesteps=ScoreInputs.timesteps,
        seed=ScoreInputs.seed,
        other_model=None,
    ) -> io.NodeOutput:
        chosen = parse_timesteps(timesteps)
        batched = HeldOut(dataset, batch_size, batches, seed)
        measured = {
            name: score(one, batched, chosen, seed, tick=ProgressBar(1).update_absolute)
            for name, one in (("model", model), ("other model", other_model))
            if one is not None
        }
        for name, one in measured.items():
            check_finite(f"Loss of {name}", one.losses)
        first, *others = measured.values()
        changes = {name: change(first, other, name) for name in UNITS for other in others}
        show_on_node(cls, "\n".join([*(told(*one) for one in measured.items()), *said(changes)]))
        found = changes.get("retrieved")
        outputs = (found.mean, found.low, found.high) if found else (math.nan,) * 3
        plot = charts.as_image(score_plot(measured, users_theme()))
        return io.NodeOutput(first.accuracy, first.loss, plot, *outputs, ui=ui.PreviewImage(plot, cls=cls))


UNITS = {"retrieved": Unit(percent=True), "losses": Unit()}
TITLES = {"retrieved": "accuracy", "losses": "loss (less is better)"}


def told(name: str, measured: Score) -> str:
    return (
        f"{name}: accuracy {measured.accuracy:.1%} (chance {measured.chance:.1%}), loss {measured.loss:.4f}, "
        f"of {measured.losses.shape[1]} images"
    )


def change(one: Score, other: Score, name: str) -> Difference:
    """What `other` has more, image by image: an image is one of those drawn at random, its timesteps tell of itself."""
    by_image = (getattr(score, name).double().mean(0) for score in (other, one))
    figures = [{(image, 0): value for image, value in enumerate(values.tolist())} for values in by_image]
    return paired_difference(*figures)


def said(changes: dict[str, Difference]) -> list[str]:
    return [
        f"{TITLES[name]}, other model: {verdict(found, UNITS[name], 'model', 'images')}"
        for name, found in changes.items()
    ]


def score_plot(measured: dict[str, Score], theme: charts.Theme):
    """Accuracy, loss and information by timestep, with 95% intervals of the mean over images; a line for each model."""
    titles = {
        "retrieved": "Retrieval accuracy",
        "losses": "Contrastive loss",
        "information": "Information, nats (unweighted)",
    }
    panels = []
    for name, title in titles.items():
        lines = []
        for model, found in measured.items():
            values = getattr(found, name).float()
            band = (1.96 * values.std(dim=1) / math.sqrt(values.shape[1])).tolist()
            lines.append(charts.Line(model, found.timesteps, values.mean(dim=1).tolist(), band))
        is_share = name == "retrieved"
        level = ("chance", next(iter(measured.values())).chance) if is_share else None
        low, high = (0.0, 1.0) if is_share else (None, None)
        panels.append(charts.Chart(title, "timestep", tuple(lines), level, low, high))
    return charts.draw(panels, theme)


NODES = [AlignmentScore]
