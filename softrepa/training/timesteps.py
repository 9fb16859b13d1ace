"""The timesteps at which a model is scored, as a person writes them."""

from ..errors import SoftREPAError, shown

SCORED = "100,300,500,700,900"
"""Unless others are asked for."""


def parse_timesteps(text: str) -> tuple[int, ...]:
    """ "100,300" -> (100, 300); different ones, in order. Raises SoftREPAError."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts or not all(part.isdecimal() and len(part) <= 4 and int(part) <= 999 for part in parts):
        raise SoftREPAError(f'timesteps is "{shown(text)}", expected numbers from 0 to 999 with commas between them.')
    return tuple(sorted({int(part) for part in parts}))
