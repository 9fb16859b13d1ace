"""Memory that runs out: how it is known, and going on with less at once."""

import logging
from collections.abc import Callable
from typing import TypeVar

import comfy.model_management as memory
import torch

Found = TypeVar("Found")
SAID = ("out of memory", "can't allocate memory", "not enough memory")
"""By the allocators of devices, and by that of RAM."""


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of CUDA also where it comes late, from work that runs by itself, and of MPS, which has no exception for it."""
    by_core = getattr(memory, "is_oom", lambda error: isinstance(error, torch.OutOfMemoryError))
    found = by_core(error) or any(text in str(error).lower() for text in SAID)
    if found and hasattr(memory, "discard_cuda_async_error"):
        memory.discard_cuda_async_error()  # or the next call would raise it again
    return found


def halving(call: Callable[[int], Found], size: int) -> tuple[Found, int]:
    """`call(size)`, `size` pairs at once, halved while memory runs out; what it found and the size that fitted."""
    while True:
        try:
            return call(size), size
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        size //= 2
        memory.soft_empty_cache()
        logging.warning("SoftREPA: out of memory, going on with %d pairs at once.", size)
