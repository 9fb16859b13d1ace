"""How well a model tells the captions of a dataset apart."""

import math
from functools import partial

from comfy.utils import ProgressBar
from comfy_api.latest import io, ui

from ..softrepa import charts
from ..softrepa.comfy.training.score import HeldOut, Score, score
from ..softrepa.training.inputs import ScoreInputs
from ..softrepa.training.timesteps import parse_timesteps
from .schema import ADVANCED, Dataset, schema, show_on_node, users_theme
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
            ],
            outputs=[
                io.Float.Output(display_name="accuracy", tooltip="Share of images whose own caption fits best."),
                io.Float.Output(display_name="loss", tooltip="The contrastive loss at the paper's temperature."),
                io.Image.Output(display_name="plot", tooltip="Both, and the mutual information, by timestep."),
            ],
            hidden=[io.Hidden.unique_id],
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
    ) -> io.NodeOutput:
        chosen = parse_timesteps(timesteps)
        bar = ProgressBar(1)
        measured = score(model, HeldOut(dataset, batch_size, batches, seed), chosen, seed, tick=bar.update_absolute)
        images = measured.losses.shape[1]
        show_on_node(
            cls,
            f"accuracy {measured.accuracy:.1%} (chance {measured.chance:.1%}), loss {measured.loss:.4f}, "
            f"of {images} images",
        )
        plot = charts.as_image(score_plot(measured, users_theme()))
        return io.NodeOutput(measured.accuracy, measured.loss, plot, ui=ui.PreviewImage(plot, cls=cls))


def score_plot(measured: Score, theme: charts.Theme):
    """Accuracy, loss and information by timestep, with 95% intervals of the mean over images."""
    titles = {
        "retrieved": "Retrieval accuracy",
        "losses": "Contrastive loss",
        "information": "Information, nats (unweighted)",
    }
    panels = []
    for name, title in titles.items():
        values = getattr(measured, name).float()
        band = (1.96 * values.std(dim=1) / math.sqrt(values.shape[1])).tolist()
        line = charts.Line(name, measured.timesteps, values.mean(dim=1).tolist(), band)
        is_share = name == "retrieved"
        level = ("chance", measured.chance) if is_share else None
        low, high = (0.0, 1.0) if is_share else (None, None)
        panels.append(charts.Chart(title, "timestep", (line,), level, low, high))
    return charts.draw(panels, theme)


NODES = [AlignmentScore]
