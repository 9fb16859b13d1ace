"""What soft tokens cost: time of a sampling step with them over one without, and of the plain model twice.

    python3 -m benchmarks.sampling

Real model sizes with random weights on a GPU, small sizes on a CPU. The runs alternate, so that a machine whose speed
drifts slows both; each figure is the median of the ratios round by round.
"""

import argparse
import math
import statistics
import time
from dataclasses import dataclass

from tools import environment

from . import cases
from .cases import Case, build, machine, random_text, sd3, sd15, sdxl, soft_tokens

STEPS = 4


GPU_CASES = (
    Case("SD1.5 512 px", "sd15", sd15(320), 64, 77),
    Case("SDXL 1024 px", "sdxl", sdxl(320), 128, 77),
    Case("SD3 512 px", "sd3", sd3(1536, 24), 64, 154),
    Case("SD3 1024 px", "sd3", sd3(1536, 24), 128, 154),
    Case("SD3 1024 px, 589 text tokens", "sd3", sd3(1536, 24), 128, 589),
)
CPU_CASES = (
    Case("SD1.5 / 5, 256 px", "sd15", sd15(64), 32, 77),
    Case("SDXL / 5, 256 px", "sdxl", sdxl(64), 32, 77),
    Case("SD3 / 3, 8 blocks, 512 px", "sd3", sd3(512, 8), 64, 154),
)


def seconds_a_step(case: Case, model) -> float:
    """Guided Euler sampling, batch 1: one forward of two samples a step."""
    import comfy.samplers
    import torch

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([random_text(case)], [random_text(case)])
    guider.set_cfg(4.0)
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "normal", STEPS)
    noise = torch.randn(1, case.model["in_channels"], case.size, case.size)
    marks = []

    def mark(*_):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        marks.append(time.perf_counter())

    euler = comfy.samplers.sampler_object("euler")
    with torch.inference_mode():
        guider.sample(noise, torch.zeros_like(noise), euler, sigmas, callback=mark, disable_pbar=True, seed=0)
    return (marks[-1] - marks[0]) / (len(marks) - 1)


@dataclass(frozen=True)
class Steps:
    """Seconds of a plain step, and of each variant's over it."""

    plain: float
    ratios: dict[str, float]


def measured(case: Case, model, tokens, rounds: int, until: float = math.inf) -> Steps:
    """By medians of `rounds` rounds, of fewer where the clock (`time.monotonic`) passes `until`, but of one."""
    from softrepa.comfy.tokens.patching import apply_tokens

    variants = {
        "plain again": model.clone(),
        "strength 1": apply_tokens(model, tokens),
        "strength 0.5": apply_tokens(model, tokens, strength=0.5),
        "strength 0": apply_tokens(model, tokens, strength=0.0),
    }
    for variant in (model, *variants.values()):
        seconds_a_step(case, variant)
    plain, ratios = [], {name: [] for name in variants}
    while len(plain) < rounds and (not plain or time.monotonic() < until):
        plain.append(seconds_a_step(case, model))
        for name, variant in variants.items():
            ratios[name].append(seconds_a_step(case, variant) / plain[-1])
    return Steps(statistics.median(plain), {name: statistics.median(values) for name, values in ratios.items()})


def measure(case: Case, rounds: int, device, dtype) -> None:
    model = build(case, device, dtype)
    steps = measured(case, model, soft_tokens(case, model), rounds)
    figures = "".join(f"{ratio:>14.3f}" for ratio in steps.ratios.values())
    print(f"{case.title:30}{1000 * steps.plain:>10.1f} ms{figures}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.sampling", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15, help="how often each variant is timed")
    parser.add_argument("--only", default="", metavar="TEXT", help="the cases whose title contains this")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    device = cases.enter("benchmarks.sampling", arguments)

    import torch

    has_gpu = device.type == "cuda"
    dtype = torch.float16 if has_gpu else torch.float32
    print(f"Time per step over that of the plain model: {machine()}, {dtype}, {arguments.rounds} rounds")
    print(f"{'':30}{'plain':>13}{'plain again':>14}{'strength 1':>14}{'strength 0.5':>14}{'strength 0':>14}")
    for case in GPU_CASES if has_gpu else CPU_CASES:
        if arguments.only in case.title:
            measure(case, arguments.rounds, device, dtype)


if __name__ == "__main__":
    main()
