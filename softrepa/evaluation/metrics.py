"""What a picture, or all pictures of an arm, can be judged by; which library does it, and where its weights are."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch

from ..errors import SoftREPAError, shown
from ..files import is_file, is_folder
from . import weights
from .pictures import Judge

CPU = torch.device("cpu")


@dataclass(frozen=True)
class JudgeOptions:
    """What judges need besides weights.

    side: pixels to which LPIPS resizes, None where both pictures have one size; python: of imscore.
    """

    device: torch.device = CPU
    side: int | None = None
    lpips_net: str = "vgg"
    hps_architecture: str = "ViT-H-14"
    imagereward_python: str = ""
    download: bool = False


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    packages: what has to be installed, by the names of the modules; published: where the weights are, as a repository
    on Hugging Face or an address; hashed: how their sha256 begins, where the publisher says it; is_folder: whether they
    are a folder of files.
    """

    name: str
    title: str
    packages: dict[str, str]
    published: str
    make: Callable[[Path, JudgeOptions], Any]
    hashed: str = ""
    is_folder: bool = False
    less_is_better: bool = False
    needs_photographs: bool = False
    of_an_arm: bool = False
    """Judges all pictures together, as `FrechetDistance`, and is no `Judge`."""


def _clip(path: Path, options: JudgeOptions) -> Judge:
    from .clip_scores import ClipScore

    return ClipScore(path, options.device)


def _pickscore(path: Path, options: JudgeOptions) -> Judge:
    from .clip_scores import PickScore

    return PickScore(path, options.device)


def _hps(path: Path, options: JudgeOptions) -> Judge:
    from .hps import HumanPreferenceScore

    return HumanPreferenceScore(path, options.device, options.hps_architecture)


def _fid(path: Path, options: JudgeOptions):
    from .perceptual import FrechetDistance

    return FrechetDistance(path, options.device)


def _lpips(path: Path, options: JudgeOptions) -> Judge:
    from .perceptual import PerceptualDistance

    return PerceptualDistance(path, options.device, options.lpips_net, options.side)


def _structure(path: Path, options: JudgeOptions) -> Judge:
    from .structure import StructureDistance

    return StructureDistance(path, options.device)


def _imagereward(path: Path, options: JudgeOptions) -> Judge:
    from .image_reward import ImageReward

    return ImageReward(path, options.imagereward_python, options.download)


TRANSFORMERS = {"transformers": "transformers"}
TORCHMETRICS = {"torchmetrics": "torchmetrics", "torchvision": "torchvision"}

METRICS = {
    metric.name: metric
    for metric in (
        Metric("imagereward", "ImageReward", {}, "RE-N-Y/ImageReward", _imagereward, is_folder=True),
        Metric("pickscore", "PickScore", TRANSFORMERS, "yuvalkirstain/PickScore_v1", _pickscore, is_folder=True),
        Metric("clip", "CLIP", TRANSFORMERS, "openai/clip-vit-large-patch14", _clip, is_folder=True),
        Metric(
            "hps",
            "HPSv2",
            {"open_clip": "open_clip_torch"},
            "https://huggingface.co/xswu/HPSv2/resolve/main/HPS_v2_compressed.pt",
            _hps,
        ),
        Metric(
            "fid",
            "FID",
            TORCHMETRICS | {"torch_fidelity": "torch-fidelity"},
            "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
            _fid,
            hashed="6726825d",
            less_is_better=True,
            needs_photographs=True,
            of_an_arm=True,
        ),
        Metric(
            "lpips",
            "LPIPS",
            TORCHMETRICS,
            "https://download.pytorch.org/models/vgg16-397923af.pth",
            _lpips,
            hashed="397923af",
            less_is_better=True,
            needs_photographs=True,
        ),
        Metric(
            "structure",
            "Structure distance",
            TRANSFORMERS,
            "facebook/dino-vitb8",
            _structure,
            is_folder=True,
            less_is_better=True,
            needs_photographs=True,
        ),
    )
}
"""In the order of the paper's tables."""


def metric_named(name: str) -> Metric:
    if name not in METRICS:
        raise SoftREPAError(f"metrics has {shown(name)}, expected only {', '.join(METRICS)}.")
    return METRICS[name]


def check_metric(metric: Metric, path: Path, options: JudgeOptions) -> None:
    """Refuses a metric whose library or weights are not there, before anything is drawn.

    Where a download is asked for, the weights are fetched.
    """
    missing = [package for module, package in metric.packages.items() if not is_installed(module)]
    if missing:
        raise SoftREPAError(
            f"metrics {metric.name} needs {' and '.join(missing)}, expected it in the Python that runs this: "
            f"pip install {' '.join(missing)}."
        )
    if metric.name == "imagereward":  # its weights may be a repository: its own environment looks for it
        python = options.imagereward_python
        if which(python) is None:
            raise SoftREPAError(
                f'imagereward_python is "{shown(python)}", expected the Python of an environment with imscore.'
            )
        return
    if is_folder(path) if metric.is_folder else is_file(path):
        return
    if options.download:
        weights.fetch(f"metrics {metric.name}", metric.published, metric.hashed, path)
        return
    kind = "the folder" if metric.is_folder else "the file"
    raise SoftREPAError(
        f'metrics {metric.name} is "{shown(path)}", expected {kind} of the weights {metric.published} '
        "(--download fetches them there)."
    )


def is_installed(module: str) -> bool:
    """Without importing it, which takes seconds."""
    return find_spec(module) is not None


def judge_of(metric: Metric, path: Path, options: JudgeOptions) -> Any:
    """A `Judge`, or a `FrechetDistance`. Raises SoftREPAError for weights of something else."""
    if not options.download:
        weights.stay_offline()
    try:
        return metric.make(path, options)
    except SoftREPAError:
        raise
    except Exception as error:  # files of another model can lead the libraries anywhere
        raise SoftREPAError(
            f'metrics {metric.name} is "{shown(path)}", which cannot be loaded ({shown(error)}), expected '
            f"{metric.published} or a model like it."
        ) from None
