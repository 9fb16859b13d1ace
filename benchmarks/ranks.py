"""What dividing a training step's pairs gains: N processes on a core or GPU each against one of them alone.

    python3 -m benchmarks.ranks

Rounds of the two alternate within the same processes, so that whatever else the computer does meets both. Beside the
time on the clock stands the speed-up by the time that the processes computed, which other programs do not lengthen.
"""

import argparse
import os
import statistics
import sys
import time
from dataclasses import dataclass

from tools import environment

from . import cases
from .cases import Case, build, machine, sd3, sd15, soft_tokens
from .training import TEMPERATURE, TIMESTEP, batch

WORKER = "SOFTREPA_BENCHMARK_WORKER"
"""Set for the processes that compute."""
CPU_CASES = (
    Case("SD1.5 / 5, 128 px", "sd15", sd15(64), 16, 77),
    Case("SD3 / 4, 6 blocks, 128 px", "sd3", sd3(384, 6), 16, 154),
)
GPU_CASES = (Case("SD1.5 512 px", "sd15", sd15(320), 64, 77), Case("SD3 512 px", "sd3", sd3(1536, 24), 64, 154))


@dataclass(frozen=True)
class Round:
    """Seconds of one step, on the clock and computed by the busiest process: alone and divided."""

    alone: float
    divided: float
    computed_alone: float
    computed_divided: float


def measured(case: Case, count: int, micro_batch: int, rounds: int, device, ranks) -> list[Round]:
    """Of a step on `count` images. All processes of `ranks` call it."""
    import torch

    from softrepa.comfy.training.memory_use import AdaptivePairs
    from softrepa.comfy.training.run import outside_inference
    from softrepa.comfy.training.trainable import TrainableNetwork
    from softrepa.training.loss import contrastive_loss
    from softrepa.training.pairs import backward_through_pairs
    from softrepa.training.ranks import ALONE
    from softrepa.training.trainer import TrainableTokens

    def loss(errors):
        return contrastive_loss(errors, TEMPERATURE)

    def step(who) -> tuple[float, float]:
        tokens.zero_grad()
        clock, computed = time.perf_counter(), time.process_time()
        backward_through_pairs(tokens.rows(TIMESTEP), pairs, images, micro_batch, loss, ranks=who)
        return time.perf_counter() - clock, time.process_time() - computed

    def busiest(seconds: float) -> float:
        each = torch.zeros(ranks.count)
        each[ranks.index] = seconds
        return ranks.summed(each).max().item()

    torch.manual_seed(0)
    model = build(case, device, torch.float32 if device.type == "cpu" else torch.bfloat16)
    with outside_inference():
        tokens = TrainableTokens(soft_tokens(case, model))
        pairs, images = AdaptivePairs(TrainableNetwork(model, tokens.blocks, checkpointing=False)), batch(case, count)
        found = []
        for number in range(rounds + 1):
            alone = step(ALONE) if ranks.is_first else (0.0, 0.0)
            ranks.meet()
            divided = step(ranks)
            clocks = busiest(divided[0])
            computed = busiest(divided[1])
            if number:  # the first warms up
                found.append(Round(alone[0], clocks, alone[1], computed))
    return found


def line(case: Case, rounds: list[Round], pairs: int) -> str:
    alone, divided = (statistics.median(getattr(one, name) for one in rounds) for name in ("alone", "divided"))
    gained = statistics.median(one.alone / one.divided for one in rounds)
    computed = statistics.median(one.computed_alone / one.computed_divided for one in rounds)
    speeds = f"{pairs / alone:12.2f}/s{pairs / divided:12.2f}/s"
    return f"{case.title:30}{speeds}{gained:12.2f}{computed:22.2f}"


def work(arguments: argparse.Namespace) -> None:
    from softrepa.training.ranks import joined

    device = cases.enter("benchmarks.ranks", arguments)
    import torch

    with joined() as ranks:
        if device.type == "cpu":
            torch.set_num_threads(1)
            if hasattr(os, "sched_setaffinity"):
                cores = sorted(os.sched_getaffinity(0))
                os.sched_setaffinity(0, {cores[ranks.index % len(cores)]})
        if ranks.is_first:
            print(f"{ranks.count} processes against one of them, {arguments.batch} images a step: {machine()}")
            print(
                f"{'':30}{'one':>14}{f'{ranks.count} processes':>14}{'speed-up':>12}{'by time computed':>22}",
                flush=True,
            )
        for case in CPU_CASES if device.type == "cpu" else GPU_CASES:
            if arguments.only in case.title:
                found = measured(case, arguments.batch, arguments.micro_batch, arguments.rounds, device, ranks)
                if ranks.is_first:
                    print(line(case, found, arguments.batch**2), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.ranks", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, default=2, help="how many divide a step (2)")
    parser.add_argument("--batch", type=int, default=4, help="images a step, each with every caption (4)")
    parser.add_argument("--micro-batch", type=int, default=4, help="pairs at once (4)")
    parser.add_argument("--rounds", type=int, default=5, help="how often each step is timed (5)")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose title contains this")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    if os.environ.get(WORKER):
        from softrepa.comfy.startup import device_of_process

        if device := device_of_process(None):  # before PyTorch asks which there are
            os.environ["CUDA_VISIBLE_DEVICES"] = str(device)
        work(arguments)
        return
    prepared = environment.prepare_or_exit(arguments.comfyui, arguments.python)
    os.environ[WORKER] = "1"
    start = ["--standalone", f"--nproc-per-node={arguments.processes}", "-m", "benchmarks.ranks"]
    sys.exit(environment.run_module("torch.distributed.run", [*start, *sys.argv[1:]], prepared))


if __name__ == "__main__":
    main()
