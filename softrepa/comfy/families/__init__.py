"""How tokens come into a network: one adapter for each way in. Everything else asks the adapter of a MODEL."""

from comfy.model_patcher import ModelPatcher
from torch import nn

from ...errors import SoftREPAError
from ...families import FAMILIES, Family
from .adapter import Adapter, ModelShape, uncompiled
from .joint import Joint
from .sequence import Sequences
from .unet import UNet

__all__ = [
    "ADAPTERS",
    "Adapter",
    "ModelShape",
    "adapter_of",
    "is_guard",
    "model_shape",
    "most_cells",
    "network_of",
    "recognised",
]

ADAPTERS: dict[str, Adapter] = {adapter.stream: adapter for adapter in (UNet(), Joint(), Sequences())}
"""By the `stream` of a family's row."""


def adapter_of(family: Family) -> Adapter:
    return ADAPTERS[family.stream]


def recognised(model: ModelPatcher) -> ModelShape | None:
    """What the model is, by its network; None where it is of no family of the table."""
    network, config = network_of(model), model.model.model_config.unet_config
    known = (adapter.recognised(network, config) for adapter in ADAPTERS.values())
    return next((shape for shape in known if shape is not None), None)


def model_shape(model: ModelPatcher) -> ModelShape:
    """Raises SoftREPAError for a family without soft tokens."""
    if shape := recognised(model):
        return shape
    found, width = type(model.model).__name__, model.model.model_config.unet_config.get("context_dim")
    found += f" (context width {width})" if width else ""
    titles = [name for family in FAMILIES.values() for name in family.models]
    raise SoftREPAError(f"Model is {found}, expected {', '.join(titles[:-1])} or {titles[-1]}.")


def most_cells(model: ModelPatcher) -> int | None:
    """The longest side of a latent that the network has positions for; None where it goes on for ever."""
    known = [adapter.most_cells(network_of(model)) for adapter in ADAPTERS.values()]
    return next((most for most in known if most is not None), None)


def network_of(model: ModelPatcher) -> nn.Module:
    return uncompiled(model.get_model_object("diffusion_model"))


def is_guard(hook) -> bool:
    """Whether a hook that is found on a model is one of ours, which change nothing by themselves."""
    return any(adapter.is_guard(hook) for adapter in ADAPTERS.values())
