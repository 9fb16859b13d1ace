"""What a person asks of a folder of captioned images, by the names of the node's inputs."""

from dataclasses import dataclass
from typing import ClassVar

from ..errors import SoftREPAError, shown
from .captions import CAPTION_LINES, EACH


@dataclass(frozen=True)
class DatasetInputs:
    """How a folder is read and how much of it is kept on disk. Raises SoftREPAError for what cannot be meant."""

    REQUIRED: ClassVar[tuple[str, ...]] = ()

    resolution: int = 512
    bucketing: bool = False
    validation_percent: float = 0.0
    cache_gb: float = 50.0
    caption_lines: str = EACH

    def __post_init__(self):
        for name, most in (("validation_percent", 90), ("cache_gb", 100_000)):
            if not 0 <= getattr(self, name) <= most:  # nor NaN, which ComfyUI lets through
                raise SoftREPAError(f"{name} is {getattr(self, name)}, expected 0 to {most:,}.")
        if self.caption_lines not in CAPTION_LINES:
            raise SoftREPAError(
                f'caption_lines is "{shown(self.caption_lines)}", expected {" or ".join(CAPTION_LINES)}.'
            )
