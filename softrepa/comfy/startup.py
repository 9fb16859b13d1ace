"""ComfyUI without its server: found, and made importable as its own main.py does.

Where it lies is only known when a command runs, so this module imports it inside of functions, and is the only one.
"""

import os
import sys
from pathlib import Path

from ..errors import SoftREPAError, shown
from ..files import is_file, is_folder

NO_DEVICE = ("", "-1")
"""What CUDA_VISIBLE_DEVICES is set to where the CPU shall compute."""


def comfyui_folder(given: str | None) -> Path:
    """The installation: as given, as COMFYUI_PATH says, or the one whose custom_nodes holds this pack."""
    named = [given] if given else [os.environ.get("COMFYUI_PATH"), *Path(__file__).absolute().parents[3:6]]
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
    args.cuda_device = device_of_process(args.cuda_device)
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
    from . import folders

    folders.register()


def device_of_process(named: str | int | None) -> str | int | None:
    """`named`, the list of --cuda-device; of several processes on a machine each has one device of it.

    Without a list, of the devices that are visible.
    """
    if os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return named
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") if named is None else str(named)
    index = int(os.environ["LOCAL_RANK"])
    if visible is None:
        return str(index)
    if visible in NO_DEVICE:
        return named
    devices = visible.split(",")
    if index >= len(devices):
        raise SoftREPAError(
            f'{os.environ["LOCAL_WORLD_SIZE"]} processes are started for the devices "{shown(visible)}", expected one '
            "for each at most."
        )
    return devices[index]


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
