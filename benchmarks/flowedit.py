"""What one batch saves: time of a FlowEdit step as one forward, as two (source, target) and as four (each prompt).

    python3 -m benchmarks.flowedit

Real model sizes with random weights on a GPU, small sizes on a CPU. The ways alternate, so that a machine whose speed
drifts slows all of them; each figure is the median of the ratios round by round.
"""

import argparse
import math
import statistics
import time

from tools import environment

from . import cases
from .cases import Case, build, machine, random_text, sd3, sd15
from .sampling import CPU_CASES, GPU_CASES, Steps

STEPS = 4
SMALL_GPU_CASES = (
    Case("SD1.5 256 px", "sd15", sd15(320), 32, 77),
    Case("SD3 256 px", "sd3", sd3(1536, 24), 32, 154),
)
SMALL_CPU_CASES = (
    Case("SD1.5 / 5, 64 px", "sd15", sd15(64), 8, 77),
    Case("SD1.5 / 5, 128 px", "sd15", sd15(64), 16, 77),
    Case("SD3 / 3, 8 blocks, 64 px", "sd3", sd3(512, 8), 8, 154),
    Case("SD3 / 3, 8 blocks, 128 px", "sd3", sd3(512, 8), 16, 154),
)
LARGEST_BATCH = {"one": 4, "two": 2, "four": 1}


def seconds_a_step(case: Case, model, forwards: str) -> float:
    """A guided edit of one image; ComfyUI's own memory estimate decides how the batch is split."""
    import torch

    from softrepa.comfy.editing.flowedit import FlowEditGuider, FlowEditSampler, edit_sigmas

    guider = FlowEditGuider(model)
    guider.set_conds(*([random_text(case)] for _ in range(4)))
    guider.set_cfg(3.5, 13.5)
    image = torch.randn(1, case.model["in_channels"], case.size, case.size)
    sigmas = edit_sigmas(model, "normal", 2 * STEPS, STEPS)
    calls, marks = [], []
    counting = model.model.diffusion_model.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    required = model.model.memory_required
    limit = LARGEST_BATCH[forwards]
    model.model.memory_required = lambda shape, cond_shapes={}: 0 if shape[0] <= limit else float("inf")

    def mark(*_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    try:
        with torch.inference_mode():
            guider.sample(torch.randn_like(image), image, FlowEditSampler(), sigmas, callback=mark, disable_pbar=True)
    finally:
        counting.remove()
        model.model.memory_required = required
    expected = [limit] * (4 // limit) * STEPS
    if calls != expected:
        raise RuntimeError(f"{case.title}: forwards of {calls} samples, expected {expected}")
    return (marks[-1] - marks[0]) / (len(marks) - 1)


def measured(case: Case, model, ways: tuple[str, ...], rounds: int, until: float = math.inf) -> Steps:
    """Seconds of a step as one forward, and of the other `ways` over it; `rounds` and `until` as in sampling."""
    for forwards in ("one", *ways):
        seconds_a_step(case, model, forwards)
    one, ratios = [], {forwards: [] for forwards in ways}
    while len(one) < rounds and (not one or time.monotonic() < until):
        one.append(seconds_a_step(case, model, "one"))
        for forwards, values in ratios.items():
            values.append(seconds_a_step(case, model, forwards) / one[-1])
    return Steps(statistics.median(one), {name: statistics.median(values) for name, values in ratios.items()})


def measure(case: Case, rounds: int, device, dtype) -> None:
    steps = measured(case, build(case, device, dtype), ("two", "four"), rounds)
    figures = "".join(f"{ratio:>14.3f}" for ratio in steps.ratios.values())
    print(f"{case.title:30}{1000 * steps.plain:>10.1f} ms{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.flowedit", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="how often each way is timed (9)")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    device = cases.enter("benchmarks.flowedit", arguments)

    import torch
    from comfy.cli_args import args

    has_gpu = device.type == "cuda"
    args.use_pytorch_cross_attention = not has_gpu  # the default attention takes twice as long on a CPU
    dtype = torch.float16 if has_gpu else torch.float32
    print(f"Time per FlowEdit step, and that of two and of four separate forwards over it: {machine()}, {dtype}")
    print(f"{'':30}{'one forward':>13}{'two':>14}{'four':>14}")
    for case in (*SMALL_GPU_CASES, *GPU_CASES) if has_gpu else (*SMALL_CPU_CASES, *CPU_CASES):
        measure(case, arguments.rounds, device, dtype)


if __name__ == "__main__":
    main()
