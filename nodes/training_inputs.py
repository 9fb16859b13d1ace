"""The inputs of the nodes that train, each once, with its tooltip."""

from functools import partial

from comfy_api.latest import io

from ..softrepa.data.swaps import MOST
from ..softrepa.training import optimizers
from ..softrepa.training.config import OBJECTIVES, TEMPERATURE_MODES
from ..softrepa.training.inputs import ON_NO_CONTRAST, TIME_TABLE, TrainingInputs
from ..softrepa.training.loss import CONTRASTS
from ..softrepa.training.noising import FIRST, LAST
from ..softrepa.training.presets import PRESETS
from .schema import ADVANCED, Dataset, Tokens
from .schema import widget as input_widget

widget = partial(input_widget, TrainingInputs)


def training_inputs() -> dict[str, io.Input]:
    """By name, as they are at this moment: lists may grow when packages are installed."""
    entries = [
        io.Model.Input("model", tooltip="The plain model to train for, without soft tokens."),
        Dataset.Input("dataset", tooltip="From Caption-Image Folder, made with this model's CLIP and VAE."),
        widget("steps", "Updates. The paper runs 26k to 30k.", min=1, max=1_000_000),
        widget(
            "batch_size",
            "Images a step, each against every caption: 4 are 16 pairs. Memory does not grow with it.",
            min=2,
            max=256,
        ),
        widget("learning_rate", "The paper's: 0.001.", min=0.0, max=1.0, step=1e-5, round=False),
        widget("seed", "Same seed, same tokens.", min=0, max=2**63 - 1, control_after_generate=False),
        widget(
            "preset",
            "Options that go together. paper: what all inputs have by default. paper, relative temperature: for a "
            "model whose errors are too large for the paper's temperature; the run says so before it starts. hard "
            "negatives: each image is also compared with its own caption with two words swapped; in our study no "
            "better than paper by more than chance. AGSM: the successor's objective, two banks of tokens. guidance: "
            "for drawing without guidance, at cfg 1. paper and guidance: both together, also for cfg 1; in our study "
            "likely better than paper there, and not with guidance. An input that a preset sets must be left as it is.",
            options=list(PRESETS),
        ),
        widget("n_tokens", "Tokens a block. 0: 4, as published (paper: 8 for SD1.5, SDXL).", min=0, max=64),
        widget(
            "blocks",
            "SD1.5, SDXL: a list of down, mid, up. Others: how many first blocks. auto: as the published "
            "tokens, down for SD1.5 (paper: down,mid), down,mid for SDXL, 5 for SD3 and newer models.",
        ),
        widget(
            "time_table",
            "Tokens that change with the timestep. auto: off for SDXL, on for all others.",
            options=list(TIME_TABLE),
            **ADVANCED,
        ),
        widget(
            "temperature",
            "The paper's 0.07 learns nothing where errors are large; the run says so before it starts. Then set "
            "temperature_mode to relative and this to 1.",
            min=0.001,
            max=100.0,
            step=0.01,
        ),
        widget(
            "temperature_mode",
            "fixed: the paper's. relative: temperature times the mean error of each batch, so that "
            "every timestep teaches something; give temperature 1.",
            options=list(TEMPERATURE_MODES),
            **ADVANCED,
        ),
        widget(
            "objective",
            "contrastive: the paper's. agsm: its successor's score matching with two banks, about one and a half times "
            "the work. denoising: no contrast at all, to see what the contrast adds. guidance: what the model predicts "
            "at guidance_scale, so that guidance 1 with tokens comes nearer to it. guided contrast: the paper's, on "
            "predictions at guidance_scale.",
            options=list(OBJECTIVES),
            **ADVANCED,
        ),
        widget("symmetric", "Also compares each caption with all images of the batch.", **ADVANCED),
        widget(
            "contrast",
            "cross-entropy: the paper's. ranking: the share of the other captions that fit better than the image's "
            "own, softly, 0 to 1; has no logit_scale.",
            options=list(CONTRASTS),
            **ADVANCED,
        ),
        widget(
            "min_timestep",
            "The first timestep that is drawn; 0, the paper's, is a picture without noise.",
            min=FIRST,
            max=LAST,
            **ADVANCED,
        ),
        widget(
            "max_timestep",
            "The last timestep that is drawn; 999 is nothing but noise.",
            min=FIRST,
            max=LAST,
            **ADVANCED,
        ),
        widget(
            "hard_negatives",
            "Captions with two words swapped that each image is compared with as well. 0: none, as the paper.",
            min=0,
            max=MOST,
            **ADVANCED,
        ),
        widget(
            "negatives",
            "Wrong captions that each image is compared with. 0: all others of the batch. Fewer are faster.",
            min=0,
            max=255,
            **ADVANCED,
        ),
        widget("logit_scale", "Scale of the logits.", min=0.01, max=100.0, step=0.1, **ADVANCED),
        widget(
            "denoising_weight",
            "Weight of the plain denoising loss. -1: the paper's, 10 for SD1.5 and SDXL, else 0.",
            min=-1.0,
            max=1000.0,
            step=0.1,
            **ADVANCED,
        ),
        widget(
            "guidance_scale",
            "The guidance whose predictions objective guidance and guidance_weight learn and guided contrast compares: "
            "the cfg that suits the model.",
            min=1.0,
            max=100.0,
            step=0.5,
            **ADVANCED,
        ),
        widget(
            "guidance_weight",
            "Weight of learning beside the contrast what the model predicts at guidance_scale. 0: none, as the paper. "
            "A step of 4 images takes about half as long again.",
            min=0.0,
            max=1000.0,
            step=0.1,
            **ADVANCED,
        ),
        widget(
            "checkpointing",
            "Computes activations again instead of keeping them: slower, far less memory. auto: only where the memory "
            "does not suffice.",
            options=["auto", "on", "off"],
            **ADVANCED,
        ),
        widget("micro_batch", "Pairs at once. 0 fills the memory.", min=0, max=65536, **ADVANCED),
        widget(
            "on_no_contrast",
            "What to do where the temperature is so far below the model's errors that comparing captions teaches "
            "nothing: stop before the first step and say what to set, or go on.",
            options=list(ON_NO_CONTRAST),
            **ADVANCED,
        ),
        widget("checkpoint_every", "Steps between saves. 0: at the end.", min=0, max=1_000_000, **ADVANCED),
        widget("filename_prefix", "Name of the file in models/softrepa."),
        Tokens.Input("init_tokens", optional=True, tooltip="Go on from these instead of starting anew."),
        widget(
            "optimizer",
            "The paper's is AdamW. Prodigy and Lion need the packages prodigyopt and lion-pytorch; "
            "give Prodigy a learning_rate of 1.",
            options=optimizers.available(),
            **ADVANCED,
        ),
        widget("accumulation", "Batches averaged for one update.", min=1, max=1024, **ADVANCED),
        widget("warmup_steps", "Steps in which the rate rises from 0.", min=0, max=100_000, **ADVANCED),
        widget("gradient_clip", "Largest gradient norm. 0: none.", min=0.0, max=1e6, **ADVANCED),
        widget("ema_decay", "Saves a running average. 0: off.", min=0.0, max=0.99999, step=0.0001, **ADVANCED),
        widget(
            "caption_dropout",
            "Chance that one caption of a batch is left empty.",
            min=0.0,
            max=0.99,
            step=0.01,
            **ADVANCED,
        ),
        io.Conditioning.Input(
            "preview_positive",
            optional=True,
            tooltip="A prompt to draw while training, without and with the tokens.",
        ),
        io.Conditioning.Input("preview_negative", optional=True, tooltip="Its negative prompt."),
        io.Vae.Input("vae", optional=True, tooltip="Decodes the previews."),
        widget(
            "preview_every",
            "Steps between previews, and between measurements on the dataset's validation images.",
            min=1,
            max=1_000_000,
            **ADVANCED,
        ),
        widget("preview_cfg", "Guidance of the previews.", min=1.0, max=100.0, step=0.5, **ADVANCED),
        widget(
            "resume",
            "Go on from the newest checkpoint with this filename_prefix, as if the run had never "
            "stopped. Refuses one with other settings; without any, starts anew.",
        ),
    ]
    return {entry.id: entry for entry in entries}
