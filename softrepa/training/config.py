"""The settings of a training run: what they are called, what they are by default, which go together."""

import math
from dataclasses import dataclass

from ..data.swaps import MOST
from ..errors import SoftREPAError, shown
from ..numbers import ABOVE_0, FROM_0, SHARE_BELOW_1, at_least, check_number
from . import agsm, loss, noising, optimizers

OBJECTIVES = ("contrastive", "denoising", "agsm", "guidance", "guided contrast")
"""The paper's; its plain denoising loss alone, to see what the contrast adds; its successor's (`agsm.py`); what the
model itself predicts at a guidance (`Pairs.guided`); and the paper's on guided predictions (`pairs.Guided`)."""
CONTRASTIVE = ("contrastive", "guided contrast")
"""Objectives that are the paper's loss on a matrix of errors."""
GUIDED = ("guidance", "guided contrast")
"""Objectives whose errors are beside predictions with guidance, or theirs."""

TEMPERATURE_MODES = ("fixed", "relative")
LEAST_RELATIVE = 0.2
"""Below it exp(-e / tau) vanishes again: 1 / 0.2 is e / tau of a mean error."""

USED_BY = {
    "denoising_weight": CONTRASTIVE,
    "temperature": CONTRASTIVE,
    "temperature_mode": CONTRASTIVE,
    "logit_scale": CONTRASTIVE,
    "symmetric": CONTRASTIVE,
    "contrast": CONTRASTIVE,
    "hard_negatives": (*CONTRASTIVE, "agsm"),
    "negatives": (*CONTRASTIVE, "agsm"),
    "agsm_temperature": ("agsm",),
    "positive_guidance": ("agsm",),
    "negative_guidance": ("agsm",),
    "teacher_decay": ("agsm",),
    "guidance_weight": ("contrastive",),
    "guidance_scale": (*GUIDED, "contrastive"),
}
"""Settings that not every objective has; the contrastive one has a `guidance_scale` where it has a weight."""


@dataclass(frozen=True)
class Settings:
    """The method's settings by the names of the node's inputs; the defaults are the reference's, but for `steps`.

    What is neither the paper's nor AGSM's: `temperature_mode`, `symmetric` and `contrast` (`loss.contrastive_loss`),
    and `hard_negatives`, up to how many captions wrong by two swapped words each image is compared with as well.
    `guidance_scale` is that of the predictions that objective "guidance" learns and "guided contrast" compares;
    `guidance_weight` times the error beside these predictions is added to the paper's loss.
    `negatives`: how many captions of other images each image is compared with; 0 are all the others of its batch. More
    than those are drawn from the dataset. Timesteps are drawn from `min_timestep` to `max_timestep`.
    """

    steps: int = 2000
    batch_size: int = 4
    learning_rate: float = 1e-3
    optimizer: str = optimizers.DEFAULT
    seed: int = 0
    temperature: float = loss.TEMPERATURE
    logit_scale: float = loss.LOGIT_SCALE
    denoising_weight: float | None = None
    weight_decay: float = 1e-4
    minimum_learning_rate: float = 1e-5
    schedule_steps: int = 500
    restart_after: int = 10
    warmup_steps: int = 0
    gradient_clip: float = 0.0
    accumulation: int = 1
    ema_decay: float = 0.0
    caption_dropout: float = 0.0
    objective: str = "contrastive"
    temperature_mode: str = "fixed"
    symmetric: bool = False
    hard_negatives: int = 0
    negatives: int = 0
    agsm_temperature: float = agsm.TEMPERATURE
    positive_guidance: float = agsm.POSITIVE_GUIDANCE
    negative_guidance: float = agsm.NEGATIVE_GUIDANCE
    teacher_decay: float = agsm.TEACHER_DECAY
    guidance_scale: float = 4.0
    guidance_weight: float = 0.0
    contrast: str = loss.CROSS_ENTROPY
    min_timestep: int = noising.FIRST
    max_timestep: int = noising.LAST


@dataclass(frozen=True)
class TrainingConfig(Settings):
    """Settings that fit together: what decides a run. `denoising_weight` None is the family's. Raises SoftREPAError."""

    def __post_init__(self):
        optimizers.check(self.optimizer)
        words = {"objective": OBJECTIVES, "temperature_mode": TEMPERATURE_MODES, "contrast": loss.CONTRASTS}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise SoftREPAError(f'{name} is "{shown(getattr(self, name))}", expected one of {", ".join(known)}.')
        least = {"steps": 1, "batch_size": 2, "accumulation": 1, "warmup_steps": 0, "hard_negatives": 0, "negatives": 0}
        least |= {"schedule_steps": 1, "restart_after": 1}
        names = {name: at_least(low) for name, low in least.items()}
        guidance = ("positive_guidance", "negative_guidance")
        rates = ("learning_rate", "minimum_learning_rate")
        weights = ("denoising_weight", "guidance_weight")
        names |= dict.fromkeys((*rates, "weight_decay", "gradient_clip", *weights, *guidance), FROM_0)
        names |= dict.fromkeys(("temperature", "logit_scale", "agsm_temperature", "guidance_scale"), ABOVE_0)
        names |= dict.fromkeys(("ema_decay", "caption_dropout", "teacher_decay"), SHARE_BELOW_1)
        for name, expected in names.items():
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), expected)
        if not noising.FIRST <= self.min_timestep <= self.max_timestep <= noising.LAST:
            raise SoftREPAError(
                f"min_timestep is {self.min_timestep} and max_timestep {self.max_timestep}, expected "
                f"{noising.FIRST} to {noising.LAST}, the second not below the first."
            )
        if self.hard_negatives > MOST:
            raise SoftREPAError(f"hard_negatives is {self.hard_negatives}, expected at most {MOST}.")
        if self.temperature_mode == "relative" and self.temperature < LEAST_RELATIVE:
            raise SoftREPAError(
                f"temperature is {self.temperature}, expected about 1 with temperature_mode relative: it is a multiple "
                "of the batch's mean error."
            )
        if self.negatives and self.symmetric:
            raise SoftREPAError(
                f"symmetric is True, expected False with negatives {self.negatives}: no caption would be compared with "
                "all images."
            )
        for name, objectives in USED_BY.items():
            default = type(self).__dataclass_fields__[name].default
            if self.objective not in objectives and getattr(self, name) != default:
                wanted = "its default" if default is None else f"its default, {default},"
                raise SoftREPAError(
                    f"{name} is {getattr(self, name)}, expected {wanted} with objective {self.objective}, which does "
                    "not use it."
                )
        default = type(self).guidance_scale
        if self.guidance_scale != default and not self.has_guidance:
            raise SoftREPAError(
                f"guidance_scale is {self.guidance_scale}, expected its default, {default}, with guidance_weight 0, "
                "which does not use it."
            )
        if self.contrast == loss.RANKING and self.logit_scale != loss.LOGIT_SCALE:
            raise SoftREPAError(
                f"logit_scale is {self.logit_scale}, expected its default, {loss.LOGIT_SCALE}, with contrast ranking, "
                "which does not use it."
            )

    @property
    def has_guidance(self) -> bool:
        """Whether predictions with guidance are learned, or compared."""
        return self.objective in GUIDED or self.guidance_weight > 0

    @property
    def middle_timestep(self) -> int:
        """Of those that are drawn: 500 of all."""
        return (self.min_timestep + self.max_timestep + 1) // 2

    @property
    def wrong_captions(self) -> int:
        """How many each image is compared with, at most."""
        return self._of_other_images + self.hard_negatives

    @property
    def chance(self) -> float:
        """Retrieval accuracy of whoever guesses: hard negatives do not count in it."""
        return 1 / (1 + self._of_other_images)

    @property
    def _of_other_images(self) -> int:
        return self.negatives or self.batch_size - 1

    def learning_rate_at(self, step: int) -> float:
        """Cosine annealing with warm restarts, moved on every `schedule_steps` iterations, after a linear warm-up."""
        turn = step // self.schedule_steps % self.restart_after / self.restart_after
        low = min(self.minimum_learning_rate, self.learning_rate)
        rate = low + (self.learning_rate - low) * (1 + math.cos(math.pi * turn)) / 2
        return rate * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else rate
