"""Training and scoring without ComfyUI's server: the same engine, caches and files. ComfyUI must be started."""

import logging
import os
import signal
import threading
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import comfy.model_management as memory
import comfy.sd
import comfy.utils
import folder_paths
import torch

from .. import token_files
from ..configuration import CLIP, DATA, PLACE, check_to_score, check_to_train
from ..data.inputs import DatasetInputs
from ..errors import SoftREPAError, shown
from ..files import is_file
from ..progress_line import ProgressLine
from ..tokens import SoftTokens
from ..training.inputs import KINDS, ScoreInputs, TrainingInputs
from ..training.ranks import ALONE, Ranks
from ..training.timesteps import parse_timesteps
from . import folders
from .data.assembly import cache_folder, dataset_of_folder
from .data.dataset_folders import dataset_path
from .identity import model_identity
from .tokens.patching import apply_tokens
from .training.devices import check_alike
from .training.launch import launch
from .training.score import HeldOut
from .training.score import score as measure


def load_checkpoint(name: str):
    """MODEL, CLIP and VAE of a checkpoint by its name in ComfyUI or its path, as its own loader gives them."""
    path = name if is_file(Path(name)) else folder_paths.get_full_path("checkpoints", name)
    if path is None:
        raise SoftREPAError(
            f'checkpoint is "{shown(name)}", expected the name of one in ComfyUI\'s checkpoints, or a path.'
        )
    with torch.inference_mode():
        model, clip, vae, *_ = comfy.sd.load_checkpoint_guess_config(path, output_vae=True, output_clip=True)
    for part, found in (("model", model), ("CLIP", clip), ("VAE", vae)):
        if found is None:
            raise SoftREPAError(f'checkpoint "{shown(name)}" holds no {part}, expected a whole checkpoint.')
    return model, clip, vae


def set_clip(inputs: dict, clip):
    """A CLIP as `inputs` say it was when they were written; these are removed from them."""
    options, layer = (inputs.pop(name, default) for name, default in CLIP.items())
    clip = clip.clone()
    for name, value in options.items():
        if type(value) is not int:
            raise SoftREPAError(
                f"CONFIG: tokenizer_options has {shown(name)} {shown(repr(value))}, expected a whole number."
            )
        clip.set_tokenizer_option(name, value)
    if layer:
        clip.clip_layer(layer)
    return clip


def load_dataset(inputs: dict, clip, vae, ranks: Ranks = ALONE):
    """The dataset of "folder" and what else the dataset node takes; these are removed from `inputs`."""
    name = inputs.pop("folder")
    asked = DatasetInputs(**{key: inputs.pop(key, default) for key, default in DATA.items()})
    share = ranks.around(cache_folder())
    with torch.inference_mode():
        return dataset_of_folder(dataset_path(name), name, clip, vae, asked, share)


def train(config: dict, ranks: Ranks = ALONE) -> Path:
    """Trains as the node does; returns the file of tokens. Of several processes the first one speaks."""
    config = common(config, ranks)
    check_to_train(config)
    inputs = TrainingInputs(**{name: config[name] for name in KINDS if name in config})
    rest = dict(config)
    with ProgressLine() as line, interrupted_between_steps():
        say = line if ranks.is_first else (lambda text: None)
        say(f"loading {shown(config['checkpoint'])}")
        model, clip, vae = load_checkpoint(rest.pop("checkpoint"))
        clip = set_clip(rest, clip)
        with counted(line, "reading and encoding", ranks):
            dataset = load_dataset(rest, clip, vae, ranks)
        say(f"{dataset.summary}\ntrying one step")
        if "init_tokens" in config:
            inputs = replace(inputs, init_tokens=load_tokens(config["init_tokens"]))
        if text := config.get("preview_prompt"):
            with torch.inference_mode():
                positive, negative = (clip.encode_from_tokens_scheduled(clip.tokenize(one)) for one in (text, ""))
            inputs = replace(inputs, preview_positive=positive, preview_negative=negative, vae=vae)
        with torch.inference_mode():
            return launch(model, dataset, say, inputs, ranks=ranks).path


@contextmanager
def counted(line: ProgressLine, what: str, ranks: Ranks):
    """Within it what ComfyUI's progress bars count is shown on the line."""
    if ranks.is_first:
        comfy.utils.set_progress_bar_global_hook(lambda done, total, *_, **__: line.counted(what, done, total))
    try:
        yield
    finally:
        comfy.utils.set_progress_bar_global_hook(None)


def common(config: dict, ranks: Ranks) -> dict:
    """The first process's inputs for all of them; where the model and the images lie may differ by machine."""
    if not ranks.is_first:
        logging.disable(logging.WARNING)
    check_alike(ranks, {"device": memory.get_torch_device().type})
    return ranks.told(config) | {name: config[name] for name in PLACE if name in config}


@contextmanager
def interrupted_between_steps():
    """Ctrl+C is ComfyUI's interrupt: a step is done whole or not at all. A second one stops at once.

    So is what torchrun, or a computer that is shut down, sends before it kills.
    """

    def interrupt(number, _):
        if number == signal.SIGINT:
            signal.signal(number, before[number])
        memory.interrupt_current_processing()

    is_main = threading.current_thread() is threading.main_thread()  # only there signals can be handled
    numbers = (signal.SIGINT, signal.SIGTERM) if is_main else ()
    handled = [one for one in numbers if signal.getsignal(one) is not signal.SIG_IGN]  # as nohup and & leave it
    before = {number: signal.signal(number, interrupt) for number in handled}
    try:
        yield
    except memory.InterruptProcessingException:
        raise KeyboardInterrupt from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def score(config: dict, tokens_name: str | None, asked: ScoreInputs, ranks: Ranks = ALONE) -> dict:
    """Accuracy and loss of a checkpoint on a folder, with tokens or without."""
    config = common(config, ranks)
    check_to_score(config)
    inputs = dict(config)
    with ProgressLine() as line, torch.inference_mode():
        model, clip, vae = load_checkpoint(inputs.pop("checkpoint"))
        with counted(line, "reading and encoding", ranks):
            dataset = load_dataset(inputs, set_clip(inputs, clip), vae, ranks)
        check_alike(ranks, {"model": model_identity(model), "dataset": dataset.fingerprint})
        if tokens_name:
            model = apply_tokens(model, load_tokens(tokens_name))
        batches = HeldOut(dataset, asked.batch_size, asked.batches, asked.seed)
        tick = partial(line.counted, "scoring") if ranks.is_first else (lambda done, total: None)
        found = measure(model, batches, parse_timesteps(asked.timesteps), asked.seed, tick=tick, ranks=ranks)
    by_timestep = {
        name: dict(zip(found.timesteps, getattr(found, name).float().mean(1).tolist(), strict=True))
        for name in ("retrieved", "losses", "information")
    }
    return {"accuracy": found.accuracy, "loss": found.loss, "images": found.losses.shape[1], "by_timestep": by_timestep}


def load_tokens(name: str) -> SoftTokens:
    """By path, or by the name that the loader lists."""
    path = Path(name)
    return token_files.load(path if os.path.lexists(path) else folders.token_path(name))
