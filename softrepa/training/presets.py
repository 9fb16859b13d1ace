"""Ways to train under one name: inputs of the training node that go together."""

from ..errors import SoftREPAError, shown
from .config import TrainingConfig

PRESETS: dict[str, dict] = {
    "paper": {},
    "hard negatives": {"hard_negatives": 1},
    "AGSM": {"objective": "agsm"},
}
"""The paper's is what every input has by default. Of the others `benchmarks/alignment.py` says what they give."""


def with_preset(preset: str, given: dict) -> dict:
    """`given` and what `preset` sets. Raises SoftREPAError where `given` says something else."""
    if preset not in PRESETS:
        raise SoftREPAError(f'preset is "{shown(preset)}", expected one of {", ".join(PRESETS)}.')
    defaults = {name: field.default for name, field in TrainingConfig.__dataclass_fields__.items()}
    for name, value in PRESETS[preset].items():
        if given.get(name, defaults[name]) not in (defaults[name], value):
            raise SoftREPAError(
                f'{name} is {given[name]}, expected {value} as preset "{preset}" sets it, or preset "paper".'
            )
    return given | PRESETS[preset]
