"""Optimisers by name: PyTorch's own, and well-kept others where their package is installed."""

from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec

from torch import nn
from torch.optim import Optimizer

from ..errors import SoftREPAError, shown

DEFAULT = "AdamW"
PACKAGES = {"AdamW": "torch.optim", "Adam": "torch.optim", "SGD": "torch.optim", "RMSprop": "torch.optim"} | {
    "Prodigy": "prodigyopt",
    "Lion": "lion_pytorch",
}


def available() -> list[str]:
    """Names of the optimisers that can be used here."""
    return [name for name, package in PACKAGES.items() if find_spec(package) is not None]


def check(name: str) -> None:
    """Raises SoftREPAError for a name that is unknown or whose package is missing."""
    if name not in PACKAGES:
        raise SoftREPAError(f'optimizer is "{shown(name)}", expected one of {", ".join(available())}.')
    if find_spec(PACKAGES[name]) is None:
        raise SoftREPAError(f'optimizer is "{name}", expected its package {PACKAGES[name]} to be installed.')


def make(name: str, parameters: Iterable[nn.Parameter], learning_rate: float, weight_decay: float) -> Optimizer:
    """With the package's own defaults for everything else; AdamW's are the reference's."""
    check(name)
    kind = getattr(import_module(PACKAGES[name]), name)
    return kind(list(parameters), lr=learning_rate, weight_decay=weight_decay)
