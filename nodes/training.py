"""Train soft tokens on the user's own images."""

from typing import Any

from comfy_api.latest import io

from ..softrepa.comfy.training.launch import launch
from ..softrepa.training.inputs import GO_ON, TrainingInputs
from .schema import ADVANCED, ON_CANVAS, Tokens, TrainingOptions, schema, show_on_node, tell_node, tell_of_new_tokens
from .training_inputs import training_inputs

DESCRIPTION = (
    "Learns soft tokens from images and captions: every image of a batch is scored against every caption by the "
    "model's own denoising error. The model itself stays as it is."
)
ALIASES = ["train soft tokens", "prompt alignment training", "fine-tune prompt adherence"]
EVERYBODYS = (
    *("model", "dataset", "steps", "batch_size", "learning_rate", "seed", "preset", "filename_prefix", "resume"),
    *("preview_every", "preview_positive", "preview_negative", "vae"),
)
"""What the training node itself has."""
OPTIONS = (
    # the tokens
    *("n_tokens", "blocks", "time_table", "init_tokens"),
    # what is compared
    *("objective", "temperature_mode", "temperature", "logit_scale", "symmetric", "denoising_weight"),
    *("guidance_scale", "negatives", "hard_negatives", "caption_dropout"),
    # the optimiser
    *("optimizer", "accumulation", "warmup_steps", "gradient_clip", "ema_decay"),
    # how the run goes
    *("checkpointing", "micro_batch", "checkpoint_every", "on_no_contrast", "preview_cfg"),
    # behind them what came later: saved graphs hold the values in this order
    *("contrast", "min_timestep", "max_timestep", "guidance_weight"),
)
"""What few people set, by subject."""
ALL_IN_ONE = (
    *("model", "dataset", "steps", "batch_size", "learning_rate", "seed", "preset", "n_tokens", "blocks", "time_table"),
    *("temperature", "temperature_mode", "objective", "symmetric", "hard_negatives", "logit_scale", "denoising_weight"),
    *("micro_batch", "checkpoint_every", "filename_prefix", "init_tokens", "optimizer", "accumulation", "warmup_steps"),
    *("gradient_clip", "ema_decay", "caption_dropout", "checkpointing", "preview_positive", "preview_negative", "vae"),
    *("preview_every", "preview_cfg", "resume"),
)
"""Saved graphs hold the values of its widgets in this order."""
ITS_CHECKPOINTING = True
"""What a prompt without it means."""
AS_BEFORE: dict[str, Any] = {"checkpointing": ITS_CHECKPOINTING, "on_no_contrast": GO_ON}


def training_schema(inputs: list[io.Input], **more) -> io.Schema:
    """Of a node that trains."""
    return schema(
        description=DESCRIPTION,
        inputs=inputs,
        outputs=[
            Tokens.Output(display_name="tokens", tooltip="For Apply SoftREPA Tokens in this graph."),
            io.Custom("LOSS_MAP").Output(display_name="loss", tooltip="For Plot Loss Graph."),
            io.Int.Output(display_name="steps", tooltip="Updates done."),
            io.String.Output(display_name="path", tooltip="The file that was written."),
        ],
        hidden=[*ON_CANVAS],
        is_output_node=True,
        **more,
    )


def trained(node: type[io.ComfyNode], model, dataset, inputs: TrainingInputs, send=None) -> io.NodeOutput:
    """A run from its start to the node's outputs. `send` gets its numbers, to draw them."""
    try:
        done = launch(model, dataset, lambda text: show_on_node(node, text), inputs, send)
    finally:
        tell_of_new_tokens()  # a run that is stopped keeps what it learned
    losses = {"loss": [record.loss for record in done.records]}
    return io.NodeOutput(done.tokens, losses, len(done.records), str(done.path))


class TrainTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        known = training_inputs()
        options = TrainingOptions.Input(
            "options",
            optional=True,
            tooltip="From SoftREPA Training Options: what few people set. Without it, the defaults.",
        )
        return training_schema(
            [*(known[name] for name in EVERYBODYS), options],
            node_id="SoftREPATrainTokens",
            display_name="Train SoftREPA Tokens",
            search_aliases=ALIASES,
        )

    @classmethod
    def execute(cls, model, dataset, options=None, **inputs) -> io.NodeOutput:
        asked = TrainingInputs(**inputs, **(options or {}))
        return trained(cls, model, dataset, asked, lambda data: tell_node(cls, data))


class TrainOptions(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        known = training_inputs()
        return schema(
            node_id="SoftREPATrainingOptions",
            display_name="SoftREPA Training Options",  # "Training Options" would be found before the node that trains
            search_aliases=["softrepa training settings", "advanced training options", "train settings"],
            description="What few people set of Train SoftREPA Tokens, by subject: the tokens, what is compared, the "
            "optimiser, how the run goes. What you leave as it is changes nothing.",
            inputs=[known[name] for name in OPTIONS],
            outputs=[TrainingOptions.Output(display_name="options", tooltip="For Train SoftREPA Tokens.")],
        )

    @classmethod
    def execute(cls, **inputs) -> io.NodeOutput:
        return io.NodeOutput(inputs)


class TrainTokensAllInOne(io.ComfyNode):
    """For graphs that were saved before SoftREPA Training Options; it stays as it is."""

    @classmethod
    def define_schema(cls):
        known = training_inputs()
        known["checkpointing"] = io.Boolean.Input(
            "checkpointing",
            default=ITS_CHECKPOINTING,
            optional=True,
            tooltip="Computes activations again instead of keeping them: slower, far less memory.",
            **ADVANCED,
        )
        return training_schema(
            [known[name] for name in ALL_IN_ONE],
            node_id="SoftREPATrain",
            display_name="Train SoftREPA Tokens (all in one)",
            search_aliases=ALIASES,
            is_deprecated=True,
        )

    @classmethod
    def execute(cls, model, dataset, **inputs) -> io.NodeOutput:
        return trained(cls, model, dataset, TrainingInputs(**AS_BEFORE | inputs))


NODES = [TrainTokens, TrainOptions, TrainTokensAllInOne]
