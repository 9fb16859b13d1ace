"""What a training step takes: pairs a second and peak memory, ours beside the reference's arithmetic.

    python3 -m benchmarks.training

Real model sizes with random weights on a GPU, small sizes on a CPU. The reference's arithmetic is one graph, of all
pairs or of one image with all captions at a time, through the same network with ordinary weights (see reference.py).
All ways take turns, so that a machine whose speed drifts slows all of them; a ratio is the median of the rounds'.
With --objectives whole steps of the trainer, of what it may learn beside the paper's loss; pairs are B x B of each.
"""

import argparse
import ctypes
import gc
import math
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from tools import environment

from . import cases
from .cases import Case, build, machine, random_text, sd3, sd15, sdxl, soft_tokens
from .reference import DENOISING_WEIGHT, TEMPERATURE, Reference

if TYPE_CHECKING:
    from softrepa.comfy.training.trainable import TrainableNetwork

BATCHES = (2, 4, 8)
TIMESTEP = 500
GIGABYTE = 1e9


@dataclass(frozen=True)
class Way:
    """How a step is computed. `micro_batch` pairs at once, 0 as many as fill the memory; None of the reference."""

    title: str
    micro_batch: Callable[[int], int] | None = None
    checkpointing: bool | None = None
    by_row: bool = False

    def step(self, networks: dict[bool, "TrainableNetwork"], reference: Reference | None, tokens, batch):
        """What computes one, and the number of pairs that it runs at once, when it has run."""
        from softrepa.comfy.training.memory_use import AdaptivePairs

        images = len(batch.latents)
        if self.micro_batch is None:
            assert reference is not None
            step = reference.row_by_row if self.by_row else reference.one_graph
            return partial(step, tokens), lambda: images if self.by_row else images**2
        pairs = AdaptivePairs(networks[self.checkpointing is True], is_auto=self.checkpointing is None)
        step = partial(our_step, pairs, tokens, batch, self.micro_batch(images))
        return step, lambda: min(pairs.at_once, images**2)


@dataclass(frozen=True)
class Objective(Way):
    """A whole step of a trainer with these inputs of the training node, at one timestep."""

    given: Mapping[str, object] = field(default_factory=dict)

    def step(self, networks: dict[bool, "TrainableNetwork"], reference: Reference | None, tokens, batch):
        from softrepa.comfy.training.memory_use import AdaptivePairs
        from softrepa.tokens import SoftTokens
        from softrepa.training.inputs import TrainingInputs
        from softrepa.training.trainer import Trainer

        images = len(batch.latents)
        inputs = TrainingInputs(**self.given, batch_size=images, min_timestep=TIMESTEP, max_timestep=TIMESTEP)
        pairs = AdaptivePairs(networks[False], is_auto=True)
        bank, table = tokens.tokens.detach().view(tokens.shape), tokens.time_table.detach()
        second = bank if inputs.config.objective == "agsm" else None
        start = SoftTokens(bank, tokens.family, tokens.blocks, table, second)
        drawn = (batch.latents, batch.conds, [[] for _ in batch.conds])
        trainer = Trainer(inputs.config, start, pairs, lambda _: drawn, batch.conds[0])
        return partial(trainer.step, 0), lambda: min(pairs.at_once, images**2)


ONE_GRAPH = Way("reference, one graph")
BY_ROW = Way("reference, one row at a time", by_row=True)
ALL_AT_ONCE = Way("ours, all pairs at once", lambda images: images**2, False)
DEFAULT = Way("ours, default", lambda images: 0)
CHECKPOINTING = Way("ours, checkpointing", lambda images: 0, True)
WAYS = (
    *(ONE_GRAPH, BY_ROW, ALL_AT_ONCE),
    Way("ours, as many as a row", lambda images: images, False),
    Way("ours, 1 pair", lambda images: 1, False),
    *(DEFAULT, CHECKPOINTING),
    Way("ours, checkpointing, 1 pair", lambda images: 1, True),
)
OBJECTIVES = tuple(
    Objective(title, lambda images: 0, given=given)
    for title, given in (
        ("paper", {}),
        ("AGSM", {"preset": "AGSM"}),
        ("guidance", {"preset": "guidance"}),
        ("paper and guidance", {"preset": "paper and guidance"}),
        ("guided contrast", {"objective": "guided contrast"}),
    )
)
"""What may be learned, by the default way to compute it."""
GPU_CASES = (
    (Case("SD1.5 512 px", "sd15", sd15(320), 64, 77), ("bfloat16",)),
    (Case("SDXL 1024 px", "sdxl", sdxl(320), 128, 77), ("bfloat16",)),
    (Case("SD3 512 px", "sd3", sd3(1536, 24), 64, 154), ("bfloat16", "float8_e4m3fn")),
    (Case("SD3 1024 px", "sd3", sd3(1536, 24), 128, 154), ("bfloat16", "float8_e4m3fn")),
)
CPU_CASES = (
    (Case("SD1.5 / 5, 128 px", "sd15", sd15(64), 16, 77), ("float32",)),
    (Case("SDXL / 5, 128 px", "sdxl", sdxl(64), 16, 77), ("float32",)),
    (Case("SD3 / 4, 24 blocks, 256 px", "sd3", sd3(384, 24), 32, 154), ("float32",)),
)
HOST_CASES = (
    (Case("SD1.5 / 10, 64 px", "sd15", sd15(32), 8, 77), ("float32",)),
    (Case("SDXL / 10, 64 px", "sdxl", sdxl(32) | {"num_head_channels": 32}, 8, 77), ("float32",)),
    (Case("SD3 / 24, 24 blocks, 64 px", "sd3", sd3(64, 24), 8, 154), ("float32",)),
)
"""All layers of the real models, and next to no arithmetic in them."""
SMALLEST = (
    (Case("SD1.5 / 10, 64 px, 16 tokens", "sd15", sd15(32), 8, 16), ("float32",)),
    (Case("SD3 / 24, 6 blocks, 64 px, 16 tokens", "sd3", sd3(64, 6), 8, 16), ("float32",)),
)


class Peak:
    """The most memory held while it is watched, above what was held before: the GPU's, or this process's."""

    def __init__(self, device):
        self.device, self.bytes = device, 0

    @contextmanager
    def watched(self):
        import torch

        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            yield
            torch.cuda.synchronize()
            self.bytes = torch.cuda.max_memory_allocated() - before
            return
        done = threading.Event()
        before = _resident()
        sampler = threading.Thread(target=self._sample, args=(before, done), daemon=True)
        sampler.start()
        try:
            yield
        finally:
            done.set()
            sampler.join()

    def _sample(self, before: int, done: threading.Event) -> None:
        while not done.wait(0.002):
            self.bytes = max(self.bytes, _resident() - before)


def return_freed_memory() -> None:
    """Makes glibc give freed tensors back at once, so that what the process holds is what tensors need."""
    if sys.platform == "linux":
        mmap_threshold = -3
        ctypes.CDLL(None).mallopt(mmap_threshold, 1 << 16)


def _resident() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def batch(case: Case, count: int):
    """`count` random images and captions of a case's shapes, and the noise they share."""
    import torch

    from softrepa.training.pairs import StepBatch

    generator = torch.Generator().manual_seed(0)
    channels, size = case.model["in_channels"], case.size
    latents = torch.randn(count, channels, size, size, generator=generator)
    noise = torch.randn(1, channels, size, size, generator=generator)
    texts = [random_text(case, generator) for _ in range(count)]
    conds = [{"cross_attn": context, **extra} for context, extra in texts]
    return StepBatch.of_all(latents, noise, conds, TIMESTEP)


def our_step(pairs, tokens, step, micro_batch: int) -> None:
    from softrepa.training.loss import contrastive_loss
    from softrepa.training.pairs import backward_through_pairs

    tokens.zero_grad()
    rows = tokens.rows(TIMESTEP)
    loss = partial(contrastive_loss, temperature=TEMPERATURE, denoising_weight=DENOISING_WEIGHT)
    backward_through_pairs(rows, pairs, step, micro_batch, loss)


@dataclass(frozen=True)
class Figures:
    """`peak` bytes beside what was there before; `ratio` of the speed to the first way's that had memory."""

    pairs_a_second: float
    ratio: float
    peak: int
    at_once: int

    def __str__(self):
        return f"{self.pairs_a_second:9.2f}/s {self.ratio:6.2f} {self.peak / GIGABYTE:8.3f} GB {self.at_once:5}"


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def compared(
    case: Case, model, start, count: int, rounds: int, ways: tuple[Way, ...] = WAYS, until: float = math.inf
) -> dict[str, Figures | None]:
    """By the ways' titles, of a step on `count` images; None without memory for it.

    By the medians of `rounds` rounds behind a first step of each; of fewer, but of one, where the clock
    (`time.monotonic`) passes `until`.
    """
    import torch

    from softrepa.comfy.tokens.patching import compute_dtype
    from softrepa.comfy.training.run import outside_inference
    from softrepa.comfy.training.trainable import TrainableNetwork
    from softrepa.training.trainer import TrainableTokens

    found: dict[str, Figures | None] = {way.title: None for way in ways}
    with outside_inference():
        tokens, step = TrainableTokens(start), batch(case, count)
        networks = {is_on: TrainableNetwork(model, start.blocks, is_on) for is_on in (False, True)}
        reference = None
        if any(way.micro_batch is None for way in ways):
            reference = Reference(networks[False], compute_dtype(model.model))
            reference.feed(step)
        device, running, seconds = networks[False].device, {}, {}
        for way in ways:  # the first warms up and shows the memory
            # of its own, for deciding on checkpointing changes a network
            own = networks | {False: TrainableNetwork(model, start.blocks, False)}
            one, at_once = way.step(own, reference, tokens, step)
            peak = Peak(device)
            try:
                with peak.watched():
                    timed(one, tokens, device)
            except torch.OutOfMemoryError:
                continue
            running[way.title], seconds[way.title] = (one, at_once, peak), []
        done = 0
        while done < rounds and (not done or time.monotonic() < until):
            for title, (one, *_) in running.items():
                seconds[title].append(timed(one, tokens, device))
            done += 1
    for title, (_, at_once, peak) in running.items():
        own, base = seconds[title], seconds[next(iter(running))]
        ratio = statistics.median(one / other for one, other in zip(base, own, strict=True))
        found[title] = Figures(count**2 / statistics.median(own), ratio, peak.bytes, at_once())
    return found


def timed(step: Callable[[], None], tokens, device) -> float:
    """Seconds; of one thread on a CPU those that it had the core, for others may want it too."""
    import torch

    clock = time.process_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    tokens.zero_grad()
    start = clock()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def measure(
    case: Case, dtype_name: str, batches: tuple[int, ...], rounds: int, device, ways: tuple[Way, ...] = WAYS
) -> None:
    import torch

    dtype = getattr(torch, dtype_name)
    model = build(case, device, dtype, torch.bfloat16 if dtype.itemsize == 1 else None)
    start = soft_tokens(case, model)
    weights = sum(w.numel() * w.element_size() for w in model.model.diffusion_model.state_dict().values())
    print(f"\n{case.title}, {dtype_name} weights ({weights / GIGABYTE:.2f} GB)", flush=True)
    for count in batches:
        for title, figures in compared(case, model, start, count, rounds, ways).items():
            print(f"B = {count:<3} {title:30} {figures or 'out of memory'}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="how often each step is timed (5)")
    parser.add_argument("--batches", default=BATCHES, metavar="2,4,8", help="batch sizes", type=sizes)
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose title contains this")
    parser.add_argument("--objectives", action="store_true", help="what may be learned, beside the paper's objective")
    parser.add_argument("--host", action="store_true", help="tiny widths: the host's time instead of arithmetic")
    parser.add_argument("--small", action="store_true", help="the smallest models, to try the command")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    device = cases.enter("benchmarks.training", arguments)
    has_gpu = device.type == "cuda"
    return_freed_memory()
    ways = OBJECTIVES if arguments.objectives else WAYS
    print(f"Pairs a second, their ratio to {ways[0].title}, peak memory above the weights: {machine()}")
    if not has_gpu:
        print("Small models; the real sizes need a GPU and were not measured here.")
    print(f"{'':38}{'pairs':>9}    ratio         peak  at once")
    chosen = GPU_CASES if has_gpu else CPU_CASES
    chosen = HOST_CASES if arguments.host else SMALLEST if arguments.small else chosen
    for case, dtypes in chosen:
        for dtype in dtypes:
            if arguments.only in case.title:
                measure(case, dtype, arguments.batches, arguments.rounds, device, ways)


if __name__ == "__main__":
    main()
