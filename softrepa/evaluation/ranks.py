"""The share of one process where several draw into one folder, as torchrun starts them.

They never talk to each other: each draws its prompts, and the first waits until every picture is in the folder.
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..comparing.records import Record, is_drawn
from ..errors import SoftREPAError

WAIT = 2.0
"""Seconds between two looks at the folder."""


@dataclass(frozen=True)
class Rank:
    """This process, of how many."""

    number: int = 0
    count: int = 1

    @classmethod
    def of_environment(cls) -> "Rank":
        """As torchrun sets RANK and WORLD_SIZE; alone without them."""
        found = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE")}
        if not found["RANK"] and not found["WORLD_SIZE"]:
            return cls()
        if not all(found[name].isdecimal() for name in ("RANK", "WORLD_SIZE")) or not (
            int(found["RANK"]) < int(found["WORLD_SIZE"])
        ):
            raise SoftREPAError(
                f"RANK is {found['RANK']!r} of WORLD_SIZE {found['WORLD_SIZE']!r}, expected numbers as torchrun sets."
            )
        return cls(int(found["RANK"]), int(found["WORLD_SIZE"]))

    @property
    def is_first(self) -> bool:
        return self.number == 0

    def share(self, records: Sequence[Record]) -> list[Record]:
        """Prompts next to each other: those that are encoded together are drawn together."""
        prompts = sorted({one.prompt for one in records})
        start, end = (len(prompts) * number // self.count for number in (self.number, self.number + 1))
        own = set(prompts[start:end])
        return [one for one in records if one.prompt in own]


def wait_for_others(folder: Path, records: Sequence[Record], tell: Callable[[str], None]) -> None:
    """Until all pictures are there. torchrun ends all processes when one of them fails."""
    while missing := sum(not is_drawn(folder, one) for one in records):
        tell(f"waiting for {missing:,} pictures of other processes")
        time.sleep(WAIT)
