"""What the wrapper around a network call leaves for the hooks inside it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from ...errors import SoftREPAError
from .attention import SoftKeyBias

KEY = "softrepa"
"""Our key in transformer options, wrappers and attachments."""

Place = int | str
"""Where rows are inserted: the index of a joint block, or a UNet stage as ComfyUI calls it."""

Entries = tuple[tuple[int, bool], ...]
"""Texts of one attention: the sample that each belongs to, and whether it is a negative prompt's."""


@dataclass
class CallState:
    """Per place the rows (B, n, d) of this call and, unless all strengths are 1, their logit bias (B, n).

    label: whose rows they are, for errors; timestep (B,); negative: which of the B samples are negative prompts'.
    padding: by place, how many rows of the text's padding these rows take the place of; their bias (B, padding + n)
    begins with what the padding keeps.
    blocks: the joint blocks of the very network that is called (each device has its own); none for a UNet.
    made_for: the state for other texts than one a sample; None where a call can have no others.
    is_watched: whether a call that reaches no block is refused; is_reached: whether one was reached.
    """

    label: str
    timestep: Tensor
    negative: Sequence[bool]
    rows: dict[Place, Tensor] = field(default_factory=dict)
    bias: dict[Place, Tensor] = field(default_factory=dict)
    attention: SoftKeyBias = field(default_factory=SoftKeyBias)
    padding: dict[Place, int] = field(default_factory=dict)
    blocks: Sequence[nn.Module] = ()
    has_roles: bool = False
    is_watched: bool = False
    is_reached: bool = False
    made_for: Callable[[Entries], "CallState"] | None = None
    _others: dict[Entries, "CallState"] = field(default_factory=dict)

    @property
    def weighs(self) -> bool:
        """Whether an attention of this call may get a bias."""
        return bool(self.bias) or self.has_roles

    @property
    def is_of_one_time(self) -> bool:
        return bool((self.timestep == self.timestep[0]).all())

    def for_texts(self, entries: Entries) -> "CallState":
        """Rows and biases for these texts."""
        if self.made_for is None:
            raise SoftREPAError(
                f"{self.label}: another node gives attention {len(entries)} texts for {len(self.negative)} samples, "
                "expected one for each; remove it for training."
            )
        if entries not in self._others:
            self._others[entries] = self.made_for(entries)
        return self._others[entries]


def call_state(options: dict) -> CallState:
    """The state of the call that `options` belong to."""
    if KEY not in options:
        raise SoftREPAError(
            "Model: the network was called without its wrappers, expected the MODEL's own transformer_options."
        )
    return options[KEY]


def with_appended(state: CallState, texts: int) -> CallState:
    """For a text batch longer than the samples: the NAG pack appends negative prompts for the last samples."""
    samples = len(state.negative)
    own = tuple(enumerate(state.negative))
    added = tuple((samples - 1 - index % samples, True) for index in reversed(range(texts - samples)))
    return state.for_texts(own + added)


def refuse_unweighed(state: CallState, where: str) -> None:
    """After an attention that should have asked for its bias and did not."""
    if state.attention.take() is not None:
        raise SoftREPAError(
            f"{state.label}: strength other than 0 or 1, or apply_to other than both, cannot act where another node "
            f"computes attention by itself ({where}); expected strength 1 and apply_to both, or that node removed."
        )
