"""Several processes that train one set of tokens, each on a device of its own: who does what, and how it becomes one.

All of them draw the same batches and compute a share of each. What they tell each other is small and lies on the CPU:
errors, one sum of gradients, and the tokens. So it goes by gloo, PyTorch's own way between CPUs, whatever the devices
are; numbers are added in float64, which forgets where one share ended and the next began.
"""

import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import SoftREPAError, shown

PATIENCE = timedelta(hours=6)
"""How long a process waits for the others: they may encode captions, or draw a preview. One that dies is noticed."""
GIVEN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun tells each process that it starts."""


class EndedError(SoftREPAError):
    """This process stops because another one has."""


class Ranks:
    """One process that does everything by itself."""

    index, count = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether it is the one that writes and speaks."""
        return self.index == 0

    def part(self, total: int) -> slice:
        """Of `total` things in a row; parts differ by one thing at most."""
        return slice(total * self.index // self.count, total * (self.index + 1) // self.count)

    def pairs(self, compared: Tensor) -> Tensor:
        """This process's share of the pairs `compared` (B, J), a mask like it."""
        mine = torch.zeros_like(compared)
        images, texts = (places[self.part(len(places))] for places in compared.nonzero(as_tuple=True))
        mine[images, texts] = True
        return mine

    def images(self, compared: Tensor) -> Tensor:
        """As `pairs`, all or none of an image's."""
        mine = torch.zeros_like(compared)
        rows = compared.any(dim=1).nonzero().flatten()
        rows = rows[self.part(len(rows))]
        mine[rows] = compared[rows]
        return mine

    def summed(self, tensor: Tensor) -> Tensor:
        """The sum over all processes, each with a tensor of this shape, on the CPU."""
        return tensor.cpu()

    def told(self, value: Any) -> Any:
        """What the first process has for `value`, which JSON can hold."""
        return value

    def give_out(self, tensors: Sequence[Tensor]) -> None:
        """Puts into `tensors` what the first process has there."""

    def meet(self) -> None:
        """Waits for all the others."""

    def around(self, folder: Path) -> tuple[int, int]:
        """This process's place among those that see the same `folder`, and their number: all, or a machine's."""
        return 0, 1


ALONE = Ranks()


class Group(Ranks):
    """One process of several, which exchange in the same order.

    Each exchange begins with a roll call. Who has to stop says so in its place there, whatever the others came for, and
    then why: all of them stop with one sentence, at their next exchange.
    """

    def __init__(self):
        self.index, self.count = dist.get_rank(), dist.get_world_size()
        self.is_over = False

    def summed(self, tensor: Tensor) -> Tensor:
        total = tensor.detach().to("cpu", copy=True).double()
        self._exchange(lambda: dist.all_reduce(total))
        return total.to(tensor.dtype)

    def told(self, value: Any) -> Any:
        text = json.dumps(value) if self.is_first else ""
        found = []
        self._exchange(lambda: found.append(_text(text, self.index, 0)))
        return json.loads(found[0])

    def give_out(self, tensors: Sequence[Tensor]) -> None:
        copies = [tensor.detach().cpu() for tensor in tensors]
        self._exchange(lambda: [dist.broadcast(copy, 0) for copy in copies])
        with torch.no_grad():
            for tensor, copy in zip(tensors, copies, strict=True):
                tensor.copy_(copy)

    def meet(self) -> None:
        self._exchange(lambda: None)

    def around(self, folder: Path) -> tuple[int, int]:
        sign = folder / f".{self.told(uuid.uuid4().hex)}"
        if self.is_first:
            with suppress(OSError):  # then nobody sees it
                folder.mkdir(parents=True, exist_ok=True)
                sign.touch()
        self.meet()
        seen = self.summed(torch.tensor(float(sign.exists())))
        if self.is_first:
            sign.unlink(missing_ok=True)
        if seen == self.count:
            return self.index, self.count
        return int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])

    def leave(self, error: BaseException) -> bool:
        """Tells the others why this process stops; False where it was they who stopped it."""
        if self.is_over:
            return False
        self.is_over = True
        try:
            gone = self._roll_call(leaves=True)
            _text(_reason(error), self.index, gone[0])
        except RuntimeError:
            return False
        return True

    def _exchange(self, exchange: Callable[[], object]) -> None:
        """Raises EndedError where another process has stopped, KeyboardInterrupt where that was interrupted."""
        try:
            if self.is_over:
                raise RuntimeError("it is over")
            gone = self._roll_call()
            if not gone:
                exchange()
                return
            self.is_over = True
            reason = _text("", self.index, gone[0])
        except RuntimeError:  # the connection is closed, or silent for too long
            self.is_over = True
            raise EndedError(
                f"Process {self.index + 1} of {self.count} has lost another one, expected all of them to run to the "
                "end; what is saved can be resumed with any number of processes."
            ) from None
        if not reason:
            raise KeyboardInterrupt
        raise EndedError(f"Process {gone[0] + 1} of {self.count} has stopped: {reason}")

    def _roll_call(self, leaves: bool = False) -> list[int]:
        """Who has to stop."""
        leaving = torch.zeros(self.count, dtype=torch.int32)
        leaving[self.index] = leaves
        dist.all_reduce(leaving)
        return leaving.nonzero().flatten().tolist()


def _text(text: str, index: int, source: int) -> str:
    """The text of the process `source`, for all of them."""
    content = torch.frombuffer(bytearray(text.encode() + b"\n"), dtype=torch.uint8)
    size = torch.tensor(len(content))
    dist.broadcast(size, source)
    if index != source:
        content = torch.empty(int(size), dtype=torch.uint8)
    dist.broadcast(content, source)
    return bytes(content.tolist()).decode()[:-1]


def _reason(error: BaseException) -> str:
    """In a sentence; of an interrupt nothing."""
    if isinstance(error, SoftREPAError):
        return str(error)
    return f"{type(error).__name__}: {shown(error)}" if isinstance(error, Exception) else ""


@contextmanager
def joined() -> Iterator[Ranks]:
    """All the processes that torchrun has started, in this and on other machines, or this one alone.

    Within it an error of one ends all. The first of each machine says which, and the others nothing.
    """
    if os.environ.get("WORLD_SIZE", "1") == "1":
        yield ALONE
        return
    if missing := [name for name in GIVEN if name not in os.environ]:
        raise SoftREPAError(f"WORLD_SIZE is set, but {', '.join(missing)} not, expected torchrun to set them all.")
    dist.init_process_group("gloo", timeout=PATIENCE)
    group = Group()
    try:
        yield group
        group.meet()
    except BaseException as error:
        was_heard = group.leave(error) or isinstance(error, EndedError)
        if was_heard and isinstance(error, SoftREPAError) and os.environ["LOCAL_RANK"] != "0":
            raise SystemExit(1) from None
        raise
    finally:
        dist.destroy_process_group()
