"""What a training step takes: peak memory and pairs a second, ours against one plain graph over all pairs.

    python3 -m benchmarks.training

Real model sizes with random weights on a GPU, small sizes on a CPU. Ours takes one forward and one backward a pair in
micro-batches; the plain graph holds every pair until the loss is known. Both compute the same loss of the same batch.
"""

import argparse
import ctypes
import gc
import math
import statistics
import sys
import threading
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

from tools import environment

from . import cases
from .cases import Case, build, machine, random_text, sd3, sd15, sdxl, soft_tokens
from .reference import DENOISING_WEIGHT, TEMPERATURE

BATCHES = (4, 8, 16)
TIMESTEP = 500
GIGABYTE = 1e9


@dataclass(frozen=True)
class Way:
    """How a step is computed; `micro_batch` None is the plain graph, 0 fills the memory."""

    title: str
    micro_batch: int | None
    checkpointing: bool = False


WAYS = (
    Way("one graph", None),
    Way("ours, 1 pair", 1),
    Way("ours, micro_batch 0", 0),
    Way("ours, 1 pair, checkpointing", 1, True),
    Way("ours, 0, checkpointing", 0, True),
)
GPU_CASES = (
    (Case("SD1.5 512 px", "sd15", sd15(320), 64, 77), ("bfloat16",)),
    (Case("SDXL 1024 px", "sdxl", sdxl(320), 128, 77), ("bfloat16",)),
    (Case("SD3 512 px", "sd3", sd3(1536, 24), 64, 154), ("bfloat16", "float8_e4m3fn")),
    (Case("SD3 1024 px", "sd3", sd3(1536, 24), 128, 154), ("bfloat16", "float8_e4m3fn")),
)
CPU_CASES = (
    (Case("SD1.5 / 5, 128 px", "sd15", sd15(64), 16, 77), ("float32",)),
    (Case("SDXL / 5, 128 px", "sdxl", sdxl(64), 16, 77), ("float32",)),
    (Case("SD3 / 4, 6 blocks, 128 px", "sd3", sd3(384, 6), 16, 154), ("float32",)),
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


def plain_step(network, tokens, step) -> None:
    """One graph over all pairs; autograd does the rest."""
    from softrepa.training.loss import contrastive_loss
    from softrepa.training.noising import pair_error

    sigma, seen, target, captions = network.prepared(step)
    count = len(step.latents)
    images, texts = zip(*((i, j) for i in range(count) for j in range(count)), strict=True)
    rows = tokens.rows(TIMESTEP).to(network.device)
    joined = captions.joined(list(texts), network.device)
    tokens.zero_grad()
    with network.trainable():
        output = network.output(seen[list(images)], sigma, joined, rows.expand(count**2, *rows.shape))
        errors = pair_error(output, target[list(images)].to(network.device)).view(count, count)
        contrastive_loss(errors, TEMPERATURE).backward()


def our_step(pairs, tokens, step, micro_batch: int) -> None:
    from softrepa.training.loss import contrastive_loss
    from softrepa.training.pairs import backward_through_pairs

    tokens.zero_grad()
    rows = tokens.rows(TIMESTEP)
    loss = partial(contrastive_loss, temperature=TEMPERATURE, denoising_weight=DENOISING_WEIGHT)
    backward_through_pairs(rows, pairs, step, micro_batch, loss)


@dataclass(frozen=True)
class Figures:
    """`peak` bytes beside what was there before; `at_once` pairs fitted."""

    peak: int
    pairs_a_second: float
    at_once: int = 0

    def __str__(self):
        return f"{self.peak / GIGABYTE:.3f} GB {self.pairs_a_second:8.2f}/s"


def sizes(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def measure(case: Case, dtype_name: str, batches: tuple[int, ...], rounds: int, device) -> None:
    import torch

    from softrepa.comfy.training.run import outside_inference
    from softrepa.comfy.training.trainable import TrainableNetwork
    from softrepa.training.trainer import TrainableTokens

    dtype = getattr(torch, dtype_name)
    model = build(case, device, dtype, torch.bfloat16 if dtype.itemsize == 1 else None)
    start = soft_tokens(case, model)
    weights = sum(w.numel() * w.element_size() for w in model.model.diffusion_model.state_dict().values())
    print(f"\n{case.title}, {dtype_name} weights ({weights / GIGABYTE:.2f} GB)", flush=True)
    with outside_inference():
        tokens = TrainableTokens(start)
        for way in WAYS:
            network = TrainableNetwork(model, tokens.blocks, way.checkpointing)
            row = [measured(case, way, network, tokens, count, rounds) or "out of memory" for count in batches]
            cells = "".join(f"{cell!s:>24}" for cell in row)
            print(f"{way.title:30}{cells}", flush=True)


def measured(case: Case, way: Way, network, tokens, count: int, rounds: int, until: float = math.inf) -> Figures | None:
    """Of a step on `count` images, None without memory for it. By the median of `rounds` steps behind a first one.

    Of fewer where the clock (`time.monotonic`) passes `until`, but of one.
    """
    import torch

    from softrepa.comfy.training.memory_use import AdaptivePairs

    step, device = batch(case, count), network.device
    pairs, peak, seconds = AdaptivePairs(network), Peak(device), []
    try:
        while len(seconds) < 2 or (len(seconds) <= rounds and time.monotonic() < until):
            start = time.perf_counter()
            with peak.watched() if not seconds else nullcontext():  # the first warms up and shows the memory
                if way.micro_batch is None:
                    plain_step(network, tokens, step)
                else:
                    our_step(pairs, tokens, step, way.micro_batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError:
        return None
    return Figures(peak.bytes, count**2 / statistics.median(seconds[1:]), pairs.at_once)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.training", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=2, help="how often each step is timed (2)")
    parser.add_argument("--batches", default=BATCHES, metavar="4,8,16", help="batch sizes", type=sizes)
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose title contains this")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    device = cases.enter("benchmarks.training", arguments)
    has_gpu = device.type == "cuda"
    return_freed_memory()
    print(f"Peak memory above the weights, and pairs a second: {machine()}")
    if not has_gpu:
        print("Small models; the real sizes need a GPU and were not measured here.")
    print(f"{'':30}" + "".join(f"{f'B = {count} ({count**2} pairs)':>24}" for count in arguments.batches))
    for case, dtypes in GPU_CASES if has_gpu else CPU_CASES:
        for dtype in dtypes:
            if arguments.only in case.title:
                measure(case, dtype, arguments.batches, arguments.rounds, device)


if __name__ == "__main__":
    main()
