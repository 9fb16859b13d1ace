"""Training and scoring in a ComfyUI installation without its server: the same engine, caches and checkpoints."""

import inspect
import os
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from . import token_files
from .errors import SoftREPAError, printable, said, shown
from .files import is_file, is_folder, parse_json, read_bounded
from .tokens import SoftTokens
from .training.config import TrainingConfig
from .training.timesteps import parse_timesteps

DATA = {
    "resolution": 512,
    "bucketing": False,
    "validation_percent": 0.0,
    "cache_gb": 50.0,
    "caption_lines": "each",
}
CLIP = {"tokenizer_options": {}, "clip_layer": 0}
"""What nodes between the checkpoint and the dataset may have set on the CLIP, as `comfy.sd.CLIP` names it."""
KINDS: dict[object, type] = {int: int, str: str, bool: bool}
MOST_NUMBER = 2**63
"""A seed is smaller."""
MOST_CONFIG = 1 << 20
"""Bytes of a .json file of inputs."""
REQUIRED = ("checkpoint", "folder", "steps", "batch_size", "learning_rate", "seed")


def read_config(path: Path) -> dict:
    """Inputs by name: of a .json file, or those that a trained .safetensors file was made with."""
    label = f'CONFIG "{shown(path)}"'
    if path.suffix == ".safetensors":
        metadata = token_files.load(path).metadata
        if "inputs" not in metadata:
            raise SoftREPAError(f"{label} does not say how it was trained, expected a file that this pack trained.")
        content: bytes | str = metadata["inputs"]
    try:
        if path.suffix != ".safetensors":
            content = read_bounded(path, MOST_CONFIG)
        config = parse_json(content)
    except OSError as error:
        raise SoftREPAError(f"{label} cannot be read ({said(error)}), expected a .json file of inputs.") from None
    if not isinstance(config, dict):
        raise SoftREPAError(f"{label} holds a {type(config).__name__}, expected inputs by name.")
    return config


def comfyui_folder(given: str | None) -> Path:
    """The installation: as given, as COMFYUI_PATH says, or the one whose custom_nodes holds this pack."""
    named = [given] if given else [os.environ.get("COMFYUI_PATH"), *Path(__file__).absolute().parents[2:5]]
    for candidate in (Path(one) for one in named if one):
        if is_file(candidate / "main.py") and is_folder(candidate / "comfy"):
            return candidate.absolute()
    raise SoftREPAError(f'comfyui is "{shown(given or "not given")}", expected the folder of a ComfyUI installation.')


def start(comfyui: Path, options: list[str]) -> None:
    """Makes ComfyUI importable under its own command-line `options`; nothing of it may be imported before."""
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()
    own, sys.argv = sys.argv, ["main.py", *options]
    try:
        from comfy.cli_args import args
    finally:
        sys.argv = own
    choose_devices(args)
    import torch

    args.cpu |= not (torch.cuda.is_available() or torch.xpu.is_available() or torch.backends.mps.is_available())

    # main.py imports it first; on older versions another module takes the name otherwise
    import utils.extra_config  # isort: skip

    import folder_paths

    configs = [
        comfyui / "extra_model_paths.yaml",
        *(path for group in args.extra_model_paths_config or [] for path in group),
    ]
    for config in map(Path, configs):
        if config.is_file():
            utils.extra_config.load_extra_path_config(str(config))
    for kind in ("input", "output", "user"):
        if given := getattr(args, f"{kind}_directory", None):
            getattr(folder_paths, f"set_{kind}_directory")(given)
    saved = Path(folder_paths.get_output_directory()) / "checkpoints"  # of Save Checkpoint
    folder_paths.add_model_folder_path("checkpoints", str(saved))
    from .comfy import folders

    folders.register()


def choose_devices(args) -> None:
    """As main.py does: PyTorch reads these when it is first asked for its devices."""
    chosen: dict[str, str] = {}
    if args.default_device is not None:
        others = [index for index in range(32) if index != args.default_device]
        order = ",".join(map(str, [args.default_device, *others]))
        chosen |= dict.fromkeys(("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"), order)
    if args.cuda_device is not None:
        names = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ASCEND_RT_VISIBLE_DEVICES")
        chosen |= dict.fromkeys(names, str(args.cuda_device))
    if args.oneapi_device_selector is not None:
        chosen["ONEAPI_DEVICE_SELECTOR"] = args.oneapi_device_selector
    if args.deterministic:
        chosen["CUBLAS_WORKSPACE_CONFIG"] = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.update(chosen)


def load_checkpoint(name: str):
    """MODEL, CLIP and VAE of a checkpoint by its name in ComfyUI or its path, as its own loader gives them."""
    import comfy.sd
    import folder_paths
    import torch

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


def load_dataset(inputs: dict, clip, vae):
    """The dataset of "folder" and what else the dataset node takes; these are removed from `inputs`."""
    import torch

    from .comfy.data.dataset_folders import dataset_path
    from .comfy.data.encoding import dataset_of_folder

    name = inputs.pop("folder")
    options = {key: inputs.pop(key, default) for key, default in DATA.items()}
    with torch.inference_mode():
        return dataset_of_folder(dataset_path(name), name, clip, vae, **options)


def train(config: dict) -> Path:
    """Trains as the node does; returns the file of tokens. ComfyUI must be started."""
    import torch

    from .comfy.training.launch import launch

    missing = [name for name in REQUIRED if name not in config]
    if missing:
        raise SoftREPAError(f"CONFIG lacks {', '.join(missing)}, expected all of {', '.join(REQUIRED)}.")
    check_inputs(config, launch)
    inputs = dict(config)
    model, clip, vae = load_checkpoint(inputs.pop("checkpoint"))
    clip = set_clip(inputs, clip)
    dataset = load_dataset(inputs, clip, vae)
    print(printable(dataset.summary), file=sys.stderr)
    if "init_tokens" in inputs:
        inputs["init_tokens"] = load_tokens(inputs["init_tokens"])
    if text := inputs.pop("preview_prompt", None):
        with torch.inference_mode():
            prompts = [clip.encode_from_tokens_scheduled(clip.tokenize(one)) for one in (text, "")]
        inputs |= {"preview_positive": prompts[0], "preview_negative": prompts[1], "vae": vae}
    with Line() as line, torch.inference_mode(), interrupted_between_steps():
        return launch(model, dataset, line, **inputs).path


@contextmanager
def interrupted_between_steps():
    """Ctrl+C is ComfyUI's interrupt: a step is done whole or not at all. A second one stops at once."""
    import comfy.model_management

    def interrupt(*_):
        signal.signal(signal.SIGINT, before)
        comfy.model_management.interrupt_current_processing()

    is_main = threading.current_thread() is threading.main_thread()  # only there signals can be handled
    if not is_main or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as nohup and & in scripts leave it
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    except comfy.model_management.InterruptProcessingException:
        raise KeyboardInterrupt from None
    finally:
        signal.signal(signal.SIGINT, before)


def check_inputs(config: dict, launch) -> None:
    """Every name and the kind of every value. Raises SoftREPAError."""
    kinds: dict[str, type] = {"checkpoint": str, "folder": str, "preview_prompt": str, "init_tokens": str}
    kinds |= {name: type(value) for name, value in (DATA | CLIP).items()}
    kinds |= {field.name: KINDS.get(field.type, float) for field in fields(TrainingConfig)}
    for name, parameter in inspect.signature(launch).parameters.items():
        if isinstance(parameter.default, (bool, int, float, str)):
            kinds[name] = type(parameter.default)
    if unknown := sorted(config.keys() - kinds.keys()):
        raise SoftREPAError(
            f"CONFIG has {shown(', '.join(unknown))}, expected only inputs of the dataset and training nodes."
        )
    for name, value in config.items():
        kind = kinds[name]
        fits = type(value) is kind or (kind is float and type(value) is int)
        if not fits:
            raise SoftREPAError(f"CONFIG: {name} is {shown(repr(value))}, expected a value of type {kind.__name__}.")
        if kind in (int, float) and not -MOST_NUMBER <= value <= MOST_NUMBER:  # nor is NaN, which JSON can hold
            raise SoftREPAError(f"CONFIG: {name} is {shown(value)}, expected a number within {MOST_NUMBER:.0e}.")


def score(config: dict, tokens_name: str | None, **options) -> dict:
    """Accuracy and loss of a checkpoint on a folder, with tokens or without. ComfyUI must be started."""
    import torch

    from .comfy.tokens.patching import apply_tokens
    from .comfy.training.launch import launch
    from .comfy.training.score import HeldOut
    from .comfy.training.score import score as measure

    inputs = dict(config)
    missing = [name for name in ("checkpoint", "folder") if name not in inputs]
    if missing:
        raise SoftREPAError(f"CONFIG lacks {', '.join(missing)}, expected checkpoint and folder.")
    check_inputs(config, launch)
    model, clip, vae = load_checkpoint(inputs.pop("checkpoint"))
    dataset = load_dataset(inputs, set_clip(inputs, clip), vae)
    with torch.inference_mode():
        if tokens_name:
            model = apply_tokens(model, load_tokens(tokens_name))
        batches = HeldOut(dataset, options["batch_size"], options["batches"], options["seed"])
        found = measure(model, batches, parse_timesteps(options["timesteps"]), options["seed"])
    by_timestep = {
        name: dict(zip(found.timesteps, getattr(found, name).float().mean(1).tolist(), strict=True))
        for name in ("retrieved", "losses", "information")
    }
    return {"accuracy": found.accuracy, "loss": found.loss, "images": found.losses.shape[1], "by_timestep": by_timestep}


def load_tokens(name: str) -> SoftTokens:
    """By path, or by the name that the loader lists."""
    from .comfy import folders

    path = Path(name)
    return token_files.load(path if os.path.lexists(path) else folders.token_path(name))


class Line:
    """Progress, the last line of a message, on one line of a terminal; what is above it once, on lines of its own."""

    def __init__(self):
        self.told: set[str] = set()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if sys.stderr.isatty():
            print(file=sys.stderr)

    def __call__(self, text: str) -> None:
        *notices, progress = printable(text).split("\n")
        start = "\r\x1b[2K" if sys.stderr.isatty() else ""
        for notice in notices:
            if notice not in self.told:
                self.told.add(notice)
                print(f"{start}{notice}", file=sys.stderr)
        print(f"{start}{progress}", end="" if start else "\n", file=sys.stderr, flush=True)
