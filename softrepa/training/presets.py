"""Ways to train under one name: inputs of the training node that go together."""

from ..errors import SoftREPAError, shown
from .config import TrainingConfig

RELATIVE = "paper, relative temperature"
PRESETS: dict[str, dict] = {
    "paper": {},
    RELATIVE: {"temperature_mode": "relative", "temperature": 1.0},
    "hard negatives": {"hard_negatives": 1},
    "AGSM": {"objective": "agsm"},
    "guidance": {"objective": "guidance"},
    "paper and guidance": {"objective": "contrastive", "guidance_weight": 10.0},
}
"""The paper's is what every input has by default; the second is for models whose errors are too large for its
temperature. What each gives, `benchmarks/alignment.py` says."""


def with_preset(preset: str, given: dict) -> dict:
    """`given` and what `preset` sets. Raises SoftREPAError where `given` says something else."""
    if preset not in PRESETS:
        raise SoftREPAError(f'preset is "{shown(preset)}", expected one of {"; ".join(PRESETS)}.')
    defaults = {name: field.default for name, field in TrainingConfig.__dataclass_fields__.items()}
    for name, value in PRESETS[preset].items():
        if given.get(name, defaults[name]) not in (defaults[name], value):
            raise SoftREPAError(
                f'{name} is {given[name]}, expected {value} as preset "{preset}" sets it, or preset "paper".'
            )
    return given | PRESETS[preset]
