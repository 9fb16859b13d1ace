"""What soft tokens do on the small world: they are trained by the pack's own engine and tested on what they never saw.

python3 -m benchmarks.alignment [ROW ...] [--everything] [--seeds 5] [--jobs 2] [--report | --draw]

Without arguments the main comparison: the plain model, SoftREPA with the paper's constants, and as a control the same
tokens trained with the plain denoising loss. What is done stays done: stopped, it goes on where it was, and every run
writes smallworld/results/alignment.md anew, in which rows that were not run are marked.
"""

import argparse
import hashlib
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from benchmarks import environment

FOLDER = Path(__file__).absolute().parent / "smallworld" / "results"
RESULTS = FOLDER / "alignment"
"""A file for each run. They come with the repository, so that a further row does not cost those that are there."""
STEPS, PICTURES, SEEDS = 1500, 1200, 5
PROMPTS, BATCHES, HARD = 40, 48, 144  # of each category; of four held-out pictures; beside captions wrong by a fact
CFG, TEMPERATURE = 2.0, 0.07
EACH = 2  # pictures of each category in the README
REFERENCE = {"batch_size": 4, "learning_rate": 1e-3}
FAST = {"micro_batch": 64, "checkpointing": False, "checkpoint_every": 250}
STUDENT_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 8: 2.365, 10: 2.262}


@dataclass(frozen=True)
class Row:
    """A model to measure: trained with `training` beside the reference's constants, or the plain one where it is None.

    `like` is the row whose tokens it takes instead of training its own.
    """

    name: str
    training: dict | None
    part: str
    seeds: int = SEEDS
    cfg: float = CFG
    like: str = ""

    def jobs(self) -> list["Job"]:
        return [Job(self, seed) for seed in range(self.seeds if self.training is not None else 1)]


BASELINE, SOFTREPA, CONTROL = "plain model", "SoftREPA", "denoising loss only"
MAIN, OPTIONS = "The main comparison", "Other ways to train"
RELATIVE = {"temperature_mode": "relative", "temperature": 1.0}
AGSM = {"objective": "agsm"}


def _rows() -> Iterator[Row]:
    yield Row(BASELINE, None, MAIN)
    yield Row(SOFTREPA, {}, MAIN)
    yield Row(CONTROL, {"objective": "denoising"}, MAIN)
    yield Row("relative temperature", RELATIVE, OPTIONS)
    yield Row("symmetric loss", {"symmetric": True}, OPTIONS)
    yield Row("hard negatives", {"hard_negatives": 1}, OPTIONS)
    yield Row("AGSM", AGSM, OPTIONS)
    yield Row("AGSM, hard negatives", AGSM | {"hard_negatives": 1}, OPTIONS)
    for part, name, values in (
        ("Number of tokens (4)", "n_tokens", (1, 2, 8, 16)),
        ("Number of blocks with tokens (3)", "blocks", ("1", "2")),
        ("Weight of the denoising loss (0)", "denoising_weight", (1.0, 10.0)),
        ("Batch size (4)", "batch_size", (2, 8)),
        ("Temperature (0.07)", "temperature", (0.02, 0.2, 2.0)),
    ):
        for value in values:
            yield Row(f"{name} {value}", {name: value}, part, seeds=3)
    for cfg in (1.0, 3.0, 5.0):
        yield Row(f"{BASELINE}, cfg {cfg:g}", None, "Guidance (2)", cfg=cfg)
        yield Row(f"{SOFTREPA}, cfg {cfg:g}", {}, "Guidance (2)", seeds=3, cfg=cfg, like=SOFTREPA)


ROWS = {row.name: row for row in _rows()}


@dataclass(frozen=True)
class Job:
    """One training run and what is measured of it."""

    row: Row
    seed: int

    @property
    def training(self) -> dict:
        """The inputs of the node."""
        own = ROWS[self.row.like].training if self.row.like else self.row.training
        return REFERENCE | {"seed": self.seed, "steps": STEPS} | (own or {})

    @property
    def key(self) -> str:
        """Changes with anything that decides the result."""
        trained = None if self.row.training is None else self.training
        facts = [trained, self.row.cfg, PICTURES, PROMPTS, BATCHES, HARD, TEMPERATURE]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def trained_as(self) -> str:
        return hashlib.sha256(json.dumps([self.training, PICTURES], sort_keys=True).encode()).hexdigest()[:16]


def result_path(job: Job) -> Path:
    return RESULTS / f"{job.key}.json"


# ---------------------------------------------------------------- running


def set_up(work: Path) -> None:
    """A worker: ComfyUI with its folders in `work`, the small world in it, one thread."""
    import torch

    from softrepa import headless

    torch.set_num_threads(1)
    headless.start(Path(os.environ["COMFYUI_PATH"]), ["--base-directory", str(work)])
    import comfy.utils

    comfy.utils.PROGRESS_BAR_ENABLED = False


def prepare(work: Path) -> None:
    """The checkpoint and the training folder."""
    from benchmarks.smallworld.study import write_training_folder
    from softrepa.smallworld.checkpoint import CHECKPOINT_NAME, write_checkpoint

    for name in ("models/checkpoints", "models/softrepa", "input", "output", "temp", "user"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if not (work / "models" / "checkpoints" / CHECKPOINT_NAME).exists():
        write_checkpoint(work / "models" / "checkpoints" / CHECKPOINT_NAME)
    if not (work / "input" / f"world{PICTURES}").exists():
        write_training_folder(work / "input" / f"world{PICTURES}", PICTURES)


@cache
def test(work: Path):
    from benchmarks.smallworld.measure import StockModel
    from benchmarks.smallworld.study import Test

    return Test(StockModel(work / "models" / "checkpoints"), PROMPTS, BATCHES, HARD)


def patched(work: Path, job: Job):
    """The MODEL with the job's tokens on it; they are trained first where they are not there."""
    import contextlib
    import io

    from softrepa import headless
    from softrepa.checkpoint import load
    from softrepa.comfy.patching import apply_tokens
    from softrepa.smallworld.checkpoint import CHECKPOINT_NAME

    model = test(work).stock.model
    if job.row.training is None:
        return model
    data = {"checkpoint": CHECKPOINT_NAME, "folder": f"world{PICTURES}", "resolution": 96}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress line
        path = headless.train(data | job.training | FAST | {"filename_prefix": job.trained_as, "resume": True})
    return apply_tokens(model, load(path))


def run(work: Path, job: Job) -> tuple[Job, float]:
    """Measures a job and writes what it found; returns the seconds it took."""
    from benchmarks.smallworld.measure import replace_text

    started = time.monotonic()
    found = test(work).measure(patched(work, job), TEMPERATURE, job.row.cfg)
    replace_text(result_path(job), json.dumps(found.as_json(), separators=(",", ":")))
    return job, time.monotonic() - started


def run_all(work: Path, jobs: list[Job], processes: int) -> None:
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), set_up, (work,)) as pool:
        pool.submit(prepare, work).result()
        futures = [pool.submit(run, work, job) for job in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            job, seconds = future.result()
            passed = (time.monotonic() - started) / 60
            print(
                f"{number}/{len(jobs)} {job.row.name}, seed {job.seed}: {seconds:.0f} s ({passed:.0f} min)", flush=True
            )


def draw(work: Path, names: list[str]) -> None:
    """The first prompts of every category, a line of pictures for each row; the prompts of wrong ones are red."""
    from benchmarks.smallworld.measure import contact_sheet, replace_picture

    set_up(work)
    rows = [test(work).row(patched(work, ROWS[name].jobs()[0]), ROWS[name].cfg, EACH) for name in names]
    replace_picture(FOLDER / "alignment_pictures.png", contact_sheet(rows))


# ---------------------------------------------------------------- what was found


@dataclass(frozen=True)
class Measure:
    """A figure of each picture (or one of a whole run), found in a result by `of`."""

    title: str
    of: tuple[str, ...]
    percent: bool = True

    def values(self, result: dict) -> list[float]:
        found = result[self.of[0]]
        if self.of[0] == "right" and len(self.of) == 1:
            return [value for category in found.values() for value in category]
        for part in self.of[1:]:
            found = found[part]
        return found if isinstance(found, list) else [found]

    def text(self, value: float, signed: bool = False) -> str:
        if self.percent:
            return f"{100 * value:+.1f}" if signed else f"{100 * value:.1f}%"
        return f"{value:+.4f}" if signed else f"{value:.4f}"


CATEGORIES = ("single_object", "two_objects", "counting", "colours", "position", "colour_attribution")
ALL_RIGHT = Measure("prompts drawn right", ("right",))
COUNTING = Measure("counting prompts", ("right", "counting"))
RETRIEVAL = Measure("retrieval among 4 captions", ("retrieval",))
HARD_RETRIEVAL = Measure("retrieval beside captions wrong by a fact", ("hard_retrieval",))
LOSS = Measure("contrastive loss", ("loss",), percent=False)
DISTANCE = Measure("distance to drawn scenes", ("distance",), percent=False)
CLEAN = Measure("things drawn cleanly", ("clean",))
MEASURES = (
    ALL_RIGHT,
    *(Measure(f"- {name.replace('_', ' ')}", ("right", name)) for name in CATEGORIES),
    *(Measure(f"facts: {name.replace('_', ' ')}", ("facts", name)) for name in CATEGORIES),
    RETRIEVAL,
    HARD_RETRIEVAL,
    LOSS,
    CLEAN,
    DISTANCE,
)
SHORT = (ALL_RIGHT, COUNTING, RETRIEVAL, HARD_RETRIEVAL, CLEAN, DISTANCE)


@dataclass(frozen=True)
class Difference:
    """Of two rows on the same prompts and noise: the mean and half the width of its 95% interval."""

    mean: float
    half: float

    def beyond(self) -> bool:
        return abs(self.mean) > self.half


def difference(ones: list[list[float]], others: list[list[float]]) -> Difference | None:
    """`ones` and `others` are figures by seed and picture; a row without seeds stands against every seed.

    Seeds and pictures are both drawn at random: the interval is Student's over seeds, its variance the sum of that of
    the mean over seeds and that of the mean over pictures.
    """
    if not ones or not others:
        return None
    others = others * len(ones) if len(others) == 1 else others
    if len(ones) == 1 and len(others) > 1:
        ones = ones * len(others)
    pairs = [
        [a - b for a, b in zip(one, other, strict=True) if not math.isnan(a)]
        for one, other in zip(ones, others, strict=False)
    ]
    by_seed = [statistics.fmean(row) for row in pairs]
    if len(by_seed) < 2:
        return None
    variance = statistics.variance(by_seed) / len(by_seed)
    by_picture = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
    if len(by_picture) > 1:
        variance += statistics.variance(by_picture) / len(by_picture)
    return Difference(statistics.fmean(by_seed), STUDENT_95[len(by_seed)] * math.sqrt(variance))


@dataclass
class Found:
    """Results of all rows so far."""

    results: dict[str, list[dict]] = field(default_factory=dict)

    def of(self, name: str) -> list[dict]:
        if name not in self.results:
            paths = [result_path(job) for job in ROWS[name].jobs()]
            self.results[name] = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
        return self.results[name]

    def values(self, name: str, measure: Measure) -> list[list[float]]:
        return [measure.values(result) for result in self.of(name)]

    def mean(self, name: str, measure: Measure) -> str:
        values = [value for row in self.values(name, measure) for value in row if not math.isnan(value)]
        return measure.text(statistics.fmean(values)) if values else ""

    def change(self, name: str, other: str, measure: Measure) -> Difference | None:
        return difference(self.values(name, measure), self.values(other, measure))


def shown(change: Difference | None, measure: Measure) -> str:
    """Bold where the interval does not contain 0."""
    if change is None:
        return ""
    low, high = (measure.text(change.mean + side * change.half, signed=True) for side in (-1, 1))
    text = f"{measure.text(change.mean, signed=True)} ({low} to {high})"
    return f"**{text}**" if change.beyond() else text


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]
    return [*lines, ""]


def report(found: Found) -> str:
    lines = [
        "# Soft tokens on the small world",
        "",
        f"""Written by `python3 -m benchmarks.alignment`. Tokens are trained by the pack's own engine on {PICTURES}
drawn pictures, {STEPS} updates with the paper's constants but what a row names, and tested on captions that say what no
training caption says: other colours of shapes, other numbers of them, other pairs. {PROMPTS} prompts of each category
are drawn at cfg {CFG:g} and read by the checker; retrieval and loss are of {4 * BATCHES} held-out pictures, and of
{HARD} beside captions that are wrong by one fact, with the same noise for all. Differences are in points for shares,
with 95% intervals over seeds and pictures; **bold** where 0 is outside. There is no correction for the number of
figures: of 20 differences that are nothing, one will be bold.""",
        "",
        f"## {MAIN}",
        "",
    ]
    versus = ((SOFTREPA, BASELINE), (SOFTREPA, CONTROL), (CONTROL, BASELINE))
    head = ["", *(f"{name} ({len(found.of(name))} runs)" for name in (BASELINE, SOFTREPA, CONTROL))]
    rows = [
        [
            measure.title,
            *(found.mean(name, measure) or "not run" for name in (BASELINE, SOFTREPA, CONTROL)),
            *(shown(found.change(*pair, measure), measure) for pair in versus),
        ]
        for measure in MEASURES
    ]
    lines += table([*head, *(f"{one} - {other}" for one, other in versus)], rows)
    for part in dict.fromkeys(row.part for row in ROWS.values() if row.part != MAIN):
        lines += [f"## {part}", "", "Differences from the plain model at the same guidance.", ""]
        rows = []
        for row in [ROWS[SOFTREPA], *(row for row in ROWS.values() if row.part == part)]:
            plain = next(one.name for one in ROWS.values() if one.training is None and one.cfg == row.cfg)
            done = len(found.of(row.name))
            if row.training is None:
                cells = [found.mean(row.name, measure) for measure in SHORT]
            else:
                cells = [shown(found.change(row.name, plain, measure), measure) for measure in SHORT]
            rows.append([row.name, str(done) if done else "not run", *cells])
        lines += table(["row", "runs", *(measure.title for measure in SHORT)], rows)
    return "\n".join(lines)


def plot(found: Found, path: Path) -> None:
    """Differences from the plain model with their intervals, a panel for each of a few measures."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from softrepa.files import write_atomically

    names = [row.name for row in ROWS.values() if row.part in (MAIN, OPTIONS) and row.training is not None]
    names = [name for name in names if len(found.of(name)) > 1]
    panels = (ALL_RIGHT, COUNTING, RETRIEVAL, HARD_RETRIEVAL)
    figure, axes = plt.subplots(1, len(panels), figsize=(14, 1.2 + 0.4 * len(names)), sharey=True)
    for axis, measure in zip(axes, panels, strict=True):
        for place, name in enumerate(names):
            change = found.change(name, BASELINE, measure)
            axis.errorbar(100 * change.mean, place, xerr=100 * change.half, fmt="o", capsize=3, color="#31688e")
        axis.axvline(0, color="#6e6e76", linewidth=1)
        axis.set_title(measure.title, fontsize=10)
        axis.set_xlabel("points, against the plain model", fontsize=8)
        axis.grid(axis="x", color="#e2e2e0")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.tight_layout()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=90))
    plt.close(figure)


def write_report() -> None:
    from benchmarks.smallworld.measure import replace_text

    found = Found()
    replace_text(FOLDER / "alignment.md", report(found))
    if len(found.of(SOFTREPA)) > 1 and found.of(BASELINE):
        plot(found, FOLDER / "alignment.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.alignment", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; without any, the first three")
    parser.add_argument("--everything", action="store_true", help="every row")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"at most so many of each row ({SEEDS}, some have 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of one thread (one a core)")
    parser.add_argument("--state", type=Path, default=environment.cache_folder() / "alignment", help="where it resumes")
    parser.add_argument(
        "--draw", action="store_true", help="draw pictures of the rows that are trained, measure nothing"
    )
    parser.add_argument("--report", action="store_true", help="write the report of what is there, run nothing")
    chosen = parser.parse_args()
    if unknown := sorted(set(chosen.rows) - ROWS.keys()):
        parser.error(f"ROW is {', '.join(unknown)}, expected some of: {', '.join(ROWS)}")
    environment.enter("benchmarks.alignment")
    names = list(ROWS) if chosen.everything else chosen.rows or [row.name for row in ROWS.values() if row.part == MAIN]
    work = chosen.state.absolute()
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    if chosen.draw:
        draw(work, names)
        return
    if not chosen.report:
        jobs = [job for name in names for job in ROWS[name].jobs() if job.seed < chosen.seeds]
        jobs.sort(key=lambda job: job.seed)
        jobs = [job for job in jobs if not result_path(job).exists()]
        run_all(work, jobs, chosen.jobs)
    write_report()


if __name__ == "__main__":
    main()
