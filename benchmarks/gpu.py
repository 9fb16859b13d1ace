"""Every figure that needs a GPU, as one table: sampling with tokens, FlowEdit and training, by family and resolution.

    python3 -m benchmarks.gpu

Real model sizes with random weights in float16; they fit a card of 24 GB. It takes less than six minutes: each family
has a time of its own, after which its remaining figures are left out. Without a GPU it says what it would measure.
`--small` runs small models on whatever there is, once and without a limit, to try the command.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from tools import environment

from . import cases, training, variants
from .cases import Case, build, machine, sd3, sd15, sdxl, soft_tokens, unet

PARTS: dict[str, float] = {"sd15": 75, "sdxl": 120, "sd3": 150}
"""Seconds of each family, the start of ComfyUI included."""

CASES = (
    Case("SD1.5 512 px", "sd15", sd15(320), 64, 77),
    Case("SDXL 512 px", "sdxl", sdxl(320), 64, 77),
    Case("SDXL 1024 px", "sdxl", sdxl(320), 128, 77),
    Case("SD3 512 px", "sd3", sd3(1536, 24), 64, 154),
    Case("SD3 1024 px", "sd3", sd3(1536, 24), 128, 154),
)
_HEADS = {"num_heads": -1, "num_head_channels": 64, "use_linear_in_transformer": True}
_LABELS = {"adm_in_channels": 2816, "num_classes": "sequential"}
SMALL_CASES = (
    Case("SD1.5 / 10, 64 px", "sd15", sd15(32), 8, 77),
    Case("SDXL / 5, 64 px", "sdxl", unet(64, [1, 2], [0, 1], 1, context_dim=2048, **_HEADS, **_LABELS), 8, 77),
    Case("SD3 / 12, 6 blocks, 64 px", "sd3", sd3(128, 6), 8, 154),
    Case("SD3 / 12, 6 blocks, 128 px", "sd3", sd3(128, 6), 16, 154),
)
START_UP = 15
"""Seconds of a part for ComfyUI, CUDA and a figure that takes longer than its share."""

UNLIMITED = 3600
ROUNDS = 15
IMAGES = 4
"""Of a training step."""

FAILED = "failed"
STAYS = 0.25
"""Of an offloaded model on the card."""

SAMPLING = ("plain step", "plain again", "strength 1", "strength 0.5", "strength 0")
FLOWEDIT = ("FlowEdit step", "in two forwards")
ON_CARD = {
    "one graph": training.ONE_GRAPH,
    "one row at a time": training.BY_ROW,
    "training": training.DEFAULT,
    "all pairs at once": training.ALL_AT_ONCE,
    "checkpoints": training.CHECKPOINTING,
}
OFFLOADED = {"offloaded": training.DEFAULT, "offloaded, checkpoints": training.CHECKPOINTING}

COLUMNS = (*SAMPLING, *FLOWEDIT, *ON_CARD, *OFFLOADED)
LEGEND = (
    "Sampling: the time of a plain step, batch 1 with guidance, and that of others over it. FlowEdit: of a step as one "
    f"forward of four samples, and of two over it. Training: image-caption pairs a second of a step of {IMAGES**2}, "
    "their ratio to the first column that had memory, the peak beside the weights, and how many pairs ran at once. One "
    "graph and one row at a time are the reference's arithmetic, training is the default, offloaded: "
    f"{STAYS:.0%} of the weights stay on the card."
)


@dataclass(frozen=True)
class Cell:
    row: str
    column: str
    text: str


class Clock:
    """Divides the time until `end` among the figures that are still to come."""

    def __init__(self, end: float, figures: int):
        self.end, self.figures = end, figures

    def until(self) -> float:
        """When the next figure is to be there."""
        now = time.monotonic()
        share = max(0.0, self.end - now) / max(1, self.figures)
        self.figures -= 1
        return now + share


def figures_of(chosen: list[Case], device, rounds: int, end: float) -> Iterator[Cell]:
    """All figures of one family's cases; the weights are made once."""
    import comfy.model_management as memory
    import torch
    from comfy.model_patcher import ModelPatcher

    clock = Clock(end, len(chosen) * 4)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = build(chosen[0], device, dtype)
    tokens = soft_tokens(chosen[0], model)
    for case in chosen:
        yield from or_failed(case, ON_CARD, training_cells(case, model, tokens, ON_CARD, rounds, clock))
        yield from or_failed(case, SAMPLING, sampling_cells(case, model, tokens, rounds, clock))
        yield from or_failed(case, FLOWEDIT, flowedit_cells(case, model, rounds, clock))
    memory.unload_all_models()
    model = ModelPatcher(model.model.to("cpu"), device, torch.device("cpu"))
    model.load(device, lowvram_model_memory=int(STAYS * model.model_size()))
    if not model.loaded_size() < model.model_size():
        raise RuntimeError("nothing is offloaded")
    for case in chosen:
        yield from or_failed(case, OFFLOADED, training_cells(case, model, tokens, OFFLOADED, rounds, clock))


def sampling_cells(case: Case, model, tokens, rounds: int, clock: Clock) -> Iterator[Cell]:
    from .sampling import measured

    steps = measured(case, model, tokens, rounds, clock.until())
    texts = [f"{1000 * steps.plain:.1f} ms", *(f"{ratio:.3f}" for ratio in steps.ratios.values())]
    for column, text in zip(SAMPLING, texts, strict=True):
        yield Cell(case.title, column, text)


def flowedit_cells(case: Case, model, rounds: int, clock: Clock) -> Iterator[Cell]:
    from .flowedit import measured

    steps = measured(case, model, ("two",), rounds, clock.until())
    texts = [f"{1000 * steps.plain:.1f} ms", f"{steps.ratios['two']:.3f}"]
    for column, text in zip(FLOWEDIT, texts, strict=True):
        yield Cell(case.title, column, text)


def training_cells(case: Case, model, tokens, columns: dict[str, training.Way], rounds, clock) -> Iterator[Cell]:
    found = training.compared(case, model, tokens, IMAGES, rounds, tuple(columns.values()), clock.until())
    for column, way in columns.items():
        figures = found[way.title]
        text = "out of memory"
        if figures is not None:
            peak = figures.peak / training.GIGABYTE
            text = f"{figures.pairs_a_second:.2f}/s ({figures.ratio:.2f}), {peak:.1f} GB, {figures.at_once} at once"
        yield Cell(case.title, column, text)


def or_failed(case: Case, columns: Iterable[str], cells: Iterator[Cell]) -> Iterator[Cell]:
    """`cells`, and where they end in an error a word of it in `columns`; the next ones are measured all the same."""
    try:
        yield from cells
    except Exception:
        traceback.print_exc()
        for column in columns:
            yield Cell(case.title, column, FAILED)


def collected(command: list[str], seconds: float) -> tuple[list[Cell], str]:
    """What `command` prints, a cell a line, in `seconds` at most, and why it ended before its end, or nothing."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as printed:
        trouble = ""
        try:
            done = subprocess.run(command, stdout=printed, timeout=seconds, check=False)
            if done.returncode:
                trouble = f"ended with code {done.returncode}"
        except subprocess.TimeoutExpired:
            trouble = f"was not done in {seconds:.0f} s"
        printed.seek(0)
        lines = [line for line in printed if line.endswith("}\n") and line.startswith("{")]
    return [Cell(**json.loads(line)) for line in lines], trouble


def head() -> list[list[str]]:
    return [["model", *COLUMNS], ["---"] * (1 + len(COLUMNS))]


def rows_of(chosen: Iterable[Case], cells: list[Cell]) -> list[list[str]]:
    """A row a case; a dash where a figure is missing."""
    found = {(cell.row, cell.column): cell.text for cell in cells}
    return [[case.title, *(found.get((case.title, column), "-") for column in COLUMNS)] for case in chosen]


def print_rows(rows: list[list[str]]) -> None:
    """In markdown, at once: whoever ends the command keeps what was measured."""
    for row in rows:
        print("| " + " | ".join(row) + " |", flush=True)


def listing() -> str:
    """What it would measure."""
    total = sum(PARTS.values())
    lines = [f"No GPU here. On one this would measure, in {total // 60:.0f}:{total % 60:02.0f} minutes at most:"]
    for case in CASES:
        lines.append(f"- {case.title} ({PARTS[case.family]} s for its family): {'; '.join(COLUMNS)}")
    return "\n".join([*lines, LEGEND])


def run_part(chosen: list[Case], device, rounds: int, seconds: float) -> None:
    """Prints a cell a line, as soon as it is known."""
    for cell in figures_of(chosen, device, rounds, time.monotonic() + seconds):
        print(json.dumps(vars(cell)), flush=True)


def run_all(chosen: tuple[Case, ...], command: Callable[[str], list[str]], parts: dict[str, float]) -> int:
    """Prints the table by family; 1 where figures are missing or failed. `parts`: seconds of each."""
    cells, troubles = [], []
    print(f"{machine()}\n", flush=True)
    print_rows(head())
    for family, seconds in parts.items():
        found, trouble = collected(command(family), seconds)
        print_rows(rows_of([case for case in chosen if case.family == family], found))
        cells += found
        troubles += [f"{family} {trouble}"] if trouble else []
    print(f"\n{LEGEND}")
    print("\n".join(troubles), file=sys.stderr)
    return int(bool(troubles) or any(cell.text == FAILED for cell in cells))


def run_variants(part: str | None, is_small: bool, device, again: list[str]) -> None:
    """Prints a line a variant as it is known; each part is a process of its own, which time may end."""
    chosen = variants.SMALL_CASES if is_small else variants.CASES
    if part:
        for line in variants.lines(part, chosen, device):
            print(line, flush=True)
        return
    print(f"{machine()}\n{variants.LEGEND}", flush=True)
    for name, seconds in variants.PARTS.items():
        try:
            subprocess.run([*again, "--part", name], timeout=UNLIMITED if is_small else seconds, check=False)
        except subprocess.TimeoutExpired:
            print(f"{name} was not done in {seconds} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="small models, on a CPU too")
    parser.add_argument("--part", help="only this family, its figures a line each in JSON; with --variants plain text")
    parser.add_argument("--variants", action="store_true", help="only what could make a training step faster")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    device = cases.enter("benchmarks.gpu", arguments)
    chosen = SMALL_CASES if arguments.small else CASES
    again = [sys.executable, "-m", "benchmarks.gpu", *(["--small"] if arguments.small else [])]
    if arguments.variants:
        run_variants(arguments.part, arguments.small, device, [*again, "--variants"])
    elif device.type != "cuda" and not arguments.small:
        print(listing())
    elif arguments.part:
        own = [case for case in chosen if case.family == arguments.part]
        rounds, seconds = (1, UNLIMITED) if arguments.small else (ROUNDS, PARTS[arguments.part] - START_UP)
        run_part(own, device, rounds, seconds)
    else:
        parts = dict.fromkeys(PARTS, UNLIMITED) if arguments.small else PARTS
        sys.exit(run_all(chosen, lambda family: [*again, "--part", family], parts))


if __name__ == "__main__":
    main()
