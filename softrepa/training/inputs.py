"""What a person gives a training run or a measurement: one list for the nodes, the command line and the files."""

from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from ..errors import SoftREPAError, shown
from ..tokens import SoftTokens
from .config import Settings, TrainingConfig
from .presets import with_preset
from .timesteps import SCORED

AUTO = "auto"
OF_THE_FAMILY = -1.0
"""A `denoising_weight` that stands for the family's."""
STOP, GO_ON = "stop", "go on"
ON_NO_CONTRAST = (STOP, GO_ON)
"""What a run does whose contrast teaches nothing."""
TIME_TABLE = {AUTO: None, "on": True, "off": False}
CHECKPOINTING = TIME_TABLE | {True: True, False: False}
"""Whether activations are computed again instead of kept; None where measuring decides."""
MOST_CFG = 100

LEAST = {"n_tokens": 0, "micro_batch": 0, "checkpoint_every": 0, "preview_every": 1}
PREVIEW = ("preview_positive", "preview_negative", "vae")

NOT_IN_THE_FILE = (
    "preset",  # the settings it sets are, so that the file says the same whatever a preset means later
    *("micro_batch", "checkpointing", "checkpoint_every", "resume"),
    *(*PREVIEW, "preview_every", "preview_cfg"),
)
"""Inputs that say how a run goes, not what it learns."""


@dataclass(frozen=True)
class TrainingInputs(Settings):
    """The method's settings and what a run is beside them, by the names of the node's inputs.

    0, -1 and "auto" mean the family's recipe. What is no number and no word is None where it is not connected.
    Raises SoftREPAError for what cannot be meant.
    """

    REQUIRED: ClassVar[tuple[str, ...]] = ("steps", "batch_size", "learning_rate", "seed")
    """Inputs that a run cannot be asked for without; of the others the default is meant."""

    denoising_weight: float = OF_THE_FAMILY
    preset: str = "paper"
    n_tokens: int = 0
    blocks: str = AUTO
    time_table: str = AUTO
    filename_prefix: str = "trained"
    micro_batch: int = 0
    checkpointing: str | bool = AUTO
    checkpoint_every: int = 500
    on_no_contrast: str = STOP
    resume: bool = False
    init_tokens: SoftTokens | None = None
    preview_positive: Any = None
    preview_negative: Any = None
    vae: Any = None
    preview_every: int = 500
    preview_cfg: float = 4.0

    def __post_init__(self):
        for name, low in LEAST.items():
            if getattr(self, name) < low:
                raise SoftREPAError(f"{name} is {getattr(self, name)}, expected {low} or more.")
        if self.denoising_weight < 0 and self.denoising_weight != OF_THE_FAMILY:
            raise SoftREPAError(f"denoising_weight is {self.denoising_weight:g}, expected 0 or more, or -1.")
        if not 1 <= self.preview_cfg <= MOST_CFG:  # nor NaN, which ComfyUI lets through
            raise SoftREPAError(f"preview_cfg is {self.preview_cfg:g}, expected 1 to {MOST_CFG}.")
        _ = self.config  # refuses settings that do not fit together
        if self.time_table not in TIME_TABLE:
            raise SoftREPAError(f'time_table is "{shown(self.time_table)}", expected one of {", ".join(TIME_TABLE)}.')
        if self.checkpointing not in CHECKPOINTING:
            raise SoftREPAError(
                f'checkpointing is "{shown(self.checkpointing)}", expected one of {", ".join(TIME_TABLE)}, true, false.'
            )
        if self.on_no_contrast not in ON_NO_CONTRAST:
            raise SoftREPAError(
                f'on_no_contrast is "{shown(self.on_no_contrast)}", expected one of {", ".join(ON_NO_CONTRAST)}.'
            )
        missing = [name for name in PREVIEW if getattr(self, name) is None]
        if missing and len(missing) < len(PREVIEW):
            raise SoftREPAError(f"{', '.join(missing)} is not connected, expected all of {', '.join(PREVIEW)} or none.")

    @cached_property
    def config(self) -> TrainingConfig:
        """The method's settings, with what the preset sets."""
        settings = {field.name: getattr(self, field.name) for field in fields(Settings)}
        if self.denoising_weight == OF_THE_FAMILY:
            settings["denoising_weight"] = None
        return TrainingConfig(**with_preset(self.preset, settings))

    @property
    def has_preview(self) -> bool:
        return self.vae is not None

    def in_the_file(self) -> dict[str, object]:
        """Inputs that make the same tokens again, as JSON holds them: tokens to start from by their name."""
        given = {name: getattr(self, name) for name in DEFAULTS if name not in NOT_IN_THE_FILE}
        given |= asdict(self.config) | {"denoising_weight": self.denoising_weight}
        tokens = given.pop("init_tokens")
        return given if tokens is None else given | {"init_tokens": tokens.name}


@dataclass(frozen=True)
class ScoreInputs:
    """What a person gives a measurement, by the names of the node's inputs."""

    REQUIRED: ClassVar[tuple[str, ...]] = ()

    batch_size: int = 8
    batches: int = 16
    timesteps: str = SCORED
    seed: int = 0


DEFAULTS: dict[str, Any] = {field.name: field.default for field in fields(TrainingInputs)}
"""Of the training inputs."""
KINDS = {name: type(default) for name, default in DEFAULTS.items() if default is not None}
"""Of those that are numbers and words."""
ALSO = {"checkpointing": bool}
"""What else one may be: files of earlier versions say true or false."""
