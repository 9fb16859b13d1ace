"""Train soft tokens on the user's own images."""

from comfy_api.latest import io

from ..softrepa.comfy.training.launch import TIME_TABLE, launch
from ..softrepa.data.swaps import MOST
from ..softrepa.training import optimizers
from ..softrepa.training.config import OBJECTIVES, TEMPERATURE_MODES
from ..softrepa.training.presets import PRESETS
from .schema import ADVANCED, Dataset, Tokens, schema, show_on_node


def number(kind, name: str, default, low, high, tooltip: str, step=None, **more):
    """An optional number widget."""
    steps = {"step": step} if step else {}
    return kind.Input(name, optional=True, default=default, min=low, max=high, tooltip=tooltip, **steps, **more)


class TrainTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPATrain",
            display_name="Train SoftREPA Tokens",
            search_aliases=["train soft tokens", "prompt alignment training", "fine-tune prompt adherence"],
            description="Learns soft tokens from images and captions: every image of a batch is scored against every "
            "caption by the model's own denoising error. The model itself stays as it is.",
            inputs=[
                io.Model.Input("model", tooltip="The plain model to train for, without soft tokens."),
                Dataset.Input("dataset", tooltip="From Caption-Image Folder, made with this model's CLIP and VAE."),
                io.Int.Input(
                    "steps", default=2000, min=1, max=1_000_000, tooltip="Updates. The paper runs 26k to 30k."
                ),
                io.Int.Input(
                    "batch_size",
                    default=4,
                    min=2,
                    max=256,
                    tooltip="Images a step, each against every caption: 4 are 16 pairs. Memory does not grow with it.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=1e-3,
                    min=0.0,
                    max=1.0,
                    step=1e-5,
                    round=False,
                    tooltip="The paper's: 0.001.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=False,
                    tooltip="Same seed, same tokens.",
                ),
                io.Combo.Input(
                    "preset",
                    optional=True,
                    options=list(PRESETS),
                    default="paper",
                    tooltip="Inputs that go together. paper: what the inputs below have by default. hard negatives: "
                    "each image is also compared with its own caption with two words swapped; the best in our study, "
                    "by little. AGSM: the successor's objective, two banks of tokens. An input that a preset sets must "
                    "be left as it is.",
                ),
                number(io.Int, "n_tokens", 0, 0, 64, "Tokens a block. 0: 4, as published (paper: 8 for SD1.5, SDXL)."),
                io.String.Input(
                    "blocks",
                    optional=True,
                    default="auto",
                    tooltip="SD1.5, SDXL: a list of down, mid, up. SD3: how many first blocks. auto: as the published "
                    "tokens, down for SD1.5 (paper: down,mid), down,mid for SDXL, 5 for SD3.",
                ),
                io.Combo.Input(
                    "time_table",
                    optional=True,
                    options=list(TIME_TABLE),
                    default="auto",
                    tooltip="Tokens that change with the timestep. auto: on for SD1.5 and SD3, off for SDXL.",
                    **ADVANCED,
                ),
                number(
                    io.Float,
                    "temperature",
                    0.07,
                    0.001,
                    100.0,
                    "The paper's 0.07 learns nothing where errors are large; the node says so. Then try "
                    "temperature_mode relative with temperature 1.",
                    step=0.01,
                ),
                io.Combo.Input(
                    "temperature_mode",
                    optional=True,
                    options=list(TEMPERATURE_MODES),
                    default="fixed",
                    tooltip="fixed: the paper's. relative: temperature times the mean error of each batch, so that "
                    "every timestep teaches something; give temperature 1.",
                    **ADVANCED,
                ),
                io.Combo.Input(
                    "objective",
                    optional=True,
                    options=list(OBJECTIVES),
                    default="contrastive",
                    tooltip="contrastive: the paper's. agsm: its successor's score matching with two banks, about "
                    "one and a half times the work. denoising: no contrast at all, to see what the contrast adds.",
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "symmetric",
                    optional=True,
                    default=False,
                    tooltip="Also compares each caption with all images of the batch.",
                    **ADVANCED,
                ),
                number(
                    io.Int,
                    "hard_negatives",
                    0,
                    0,
                    MOST,
                    "Captions with two words swapped that each image is compared with as well. 0: none, as the paper.",
                    **ADVANCED,
                ),
                number(io.Float, "logit_scale", 4.0, 0.01, 100.0, "Scale of the logits.", step=0.1, **ADVANCED),
                number(
                    io.Float,
                    "denoising_weight",
                    -1.0,
                    -1.0,
                    1000.0,
                    "Weight of the plain denoising loss. -1: the paper's, 10 for SD1.5 and SDXL, 0 for SD3.",
                    step=0.1,
                    **ADVANCED,
                ),
                number(io.Int, "micro_batch", 0, 0, 65536, "Pairs at once. 0 fills the memory.", **ADVANCED),
                number(
                    io.Int, "checkpoint_every", 500, 0, 1_000_000, "Steps between saves. 0: at the end.", **ADVANCED
                ),
                io.String.Input(
                    "filename_prefix", optional=True, default="trained", tooltip="Name of the file in models/softrepa."
                ),
                Tokens.Input("init_tokens", optional=True, tooltip="Go on from these instead of starting anew."),
                io.Combo.Input(
                    "optimizer",
                    optional=True,
                    options=optimizers.available(),
                    default=optimizers.DEFAULT,
                    tooltip="The paper's is AdamW. Prodigy and Lion need the packages prodigyopt and lion-pytorch; "
                    "give Prodigy a learning_rate of 1.",
                    **ADVANCED,
                ),
                number(io.Int, "accumulation", 1, 1, 1024, "Batches averaged for one update.", **ADVANCED),
                number(io.Int, "warmup_steps", 0, 0, 100_000, "Steps in which the rate rises from 0.", **ADVANCED),
                number(io.Float, "gradient_clip", 0.0, 0.0, 1e6, "Largest gradient norm. 0: none.", **ADVANCED),
                number(
                    io.Float,
                    "ema_decay",
                    0.0,
                    0.0,
                    0.99999,
                    "Saves a running average. 0: off.",
                    step=0.0001,
                    **ADVANCED,
                ),
                number(
                    io.Float,
                    "caption_dropout",
                    0.0,
                    0.0,
                    0.99,
                    "Chance that one caption of a batch is left empty.",
                    step=0.01,
                    **ADVANCED,
                ),
                io.Boolean.Input(
                    "checkpointing",
                    optional=True,
                    default=True,
                    tooltip="Computes activations again instead of keeping them: slower, far less memory.",
                    **ADVANCED,
                ),
                io.Conditioning.Input(
                    "preview_positive",
                    optional=True,
                    tooltip="A prompt to draw while training, without and with the tokens.",
                ),
                io.Conditioning.Input("preview_negative", optional=True, tooltip="Its negative prompt."),
                io.Vae.Input("vae", optional=True, tooltip="Decodes the previews."),
                number(
                    io.Int,
                    "preview_every",
                    500,
                    1,
                    1_000_000,
                    "Steps between previews, and between measurements on the dataset's validation images.",
                    **ADVANCED,
                ),
                number(io.Float, "preview_cfg", 4.0, 1.0, 100.0, "Guidance of the previews.", step=0.5, **ADVANCED),
                io.Boolean.Input(
                    "resume",
                    optional=True,
                    default=False,
                    tooltip="Go on from the newest checkpoint with this filename_prefix, as if the run had never "
                    "stopped. Refuses one with other settings; without any, starts anew.",
                ),
            ],
            outputs=[
                Tokens.Output(display_name="tokens", tooltip="For Apply SoftREPA Tokens in this graph."),
                io.Custom("LOSS_MAP").Output(display_name="loss", tooltip="For Plot Loss Graph."),
                io.Int.Output(display_name="steps", tooltip="Updates done."),
                io.String.Output(display_name="path", tooltip="The file that was written."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, model, dataset, **inputs) -> io.NodeOutput:
        run = launch(model, dataset, lambda text: show_on_node(cls, text), **inputs)
        losses = {"loss": [record.loss for record in run.records]}
        return io.NodeOutput(run.tokens, losses, len(run.records), str(run.path))


NODES = [TrainTokens]
