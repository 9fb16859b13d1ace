"""What an adapter says of its networks."""

from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from torch import nn

from ...families import Blocks, Family
from ..tokens.call_state import CallState, Place
from ..training.frozen import ForeignTensors
from .noising import Noising


@dataclass(frozen=True)
class ModelShape:
    """`width` is that of the stream that tokens join; `layers` how many of its places have rows of their own.

    text: how errors call it.
    """

    family: Family
    width: int
    layers: int
    text: str


class Adapter(Protocol):
    """One way into a network. Tokens act at places; `layer` says which rows of a file belong to one."""

    stream: str
    """As the rows of the family table call it."""
    noisings: Mapping[ModelType, Noising]
    """How its models are noised in training, by ComfyUI's name of what they predict."""

    def recognised(self, network: nn.Module, config: dict) -> ModelShape | None:
        """What a network is, by its class and ComfyUI's configuration of it; None where it is another adapter's."""

    def places(self, blocks: Blocks) -> tuple[Place, ...]: ...

    def layer(self, place: Place) -> int: ...

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        """The modules that replaced blocks have to run, of the very network that is called; none where no block is."""

    def guard(self, model: ModelPatcher, places: tuple[Place, ...]) -> None:
        """Hooks on `model` that refuse calls which did not go through its wrappers, and change nothing."""

    def is_guard(self, hook) -> bool:
        """Whether `hook` is one of these and has no other node's below it."""

    def inserting(self, options: dict, state: CallState) -> dict:
        """Transformer options of one call in which the rows of `state` are inserted, behind other nodes' patches."""

    def refuse_unweighable(self, options: dict, state: CallState) -> None:
        """Raises SoftREPAError where something in `options` keeps attention from getting its biases."""

    def trainable(self, model: ModelPatcher, checkpointing: bool, foreign: ForeignTensors) -> ModelPatcher:
        """`model`, or a clone of it, that autograd can go through within `recomputing`."""

    def recomputing(
        self, network: nn.Module, checkpointing: bool, foreign: ForeignTensors
    ) -> AbstractContextManager: ...

    def embedder(self, network: nn.Module) -> nn.Module | None:
        """What rows of the text's width go through before they join the stream; None where they join it as they are."""

    def hears_steps(self, network: nn.Module) -> bool:
        """Whether it must be told the steps of a sampling, and so can be called in no other way."""

    def of_all_samples(self, network: nn.Module) -> Collection[str]:
        """What it takes one of for all samples of a call, by its keyword."""

    def most_cells(self, network: nn.Module) -> int | None:
        """The longest side of a latent that a network of this adapter has positions for; None for any other."""


def uncompiled(network: nn.Module) -> nn.Module:
    """The network itself, where torch.compile wraps it."""
    return getattr(network, "_orig_mod", network)
