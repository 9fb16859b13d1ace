"""The ways to edit: which prompts guide what, and how strongly an edit is pulled back."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Method:
    """source, target: the prompts, positive and negative, that predict each; zeta: that of `flow_edit`.

    source_cfg: the source's guidance; None where it is up to the user. samples_freely: whether the last steps may leave
    the source out of account.
    """

    name: str
    source: tuple[str, str]
    target: tuple[str, str]
    source_cfg: float | None
    zeta: float
    samples_freely: bool


FLOW_EDIT = Method(
    "FlowEdit",
    source=("source_positive", "source_negative"),
    target=("target_positive", "target_negative"),
    source_cfg=None,
    zeta=0.0,
    samples_freely=True,
)
"""arXiv 2412.08629."""

FLOW_ALIGN = Method(
    "FlowAlign",
    source=("source_positive", "source_positive"),  # unguided: the second one is for functions that ask for any
    target=("target_positive", "source_positive"),
    source_cfg=1.0,
    zeta=0.01,
    samples_freely=False,
)
"""arXiv 2505.23145, with the zeta of its code."""

METHODS = {FLOW_EDIT.name: FLOW_EDIT, "FlowAlign, keeps more of the source": FLOW_ALIGN}
"""By what nodes call them."""
