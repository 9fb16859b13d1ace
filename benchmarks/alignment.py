"""What soft tokens do on the small world: they are trained by the pack's own engine and tested on what they never saw.

python3 -m benchmarks.alignment [ROW ...] [--everything] [--seeds 5] [--jobs 2] [--report | --draw]

Without arguments the main comparison: the plain model, SoftREPA with the paper's constants, and as a control the same
tokens trained with the plain denoising loss; with guidance, without, and on more counting prompts. What is done stays
done: stopped, it goes on where it was, and every run writes smallworld/results/alignment.md anew, in which rows that
were not run are marked.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from pathlib import Path

from benchmarks.alignment_rows import (
    BATCHES,
    COUNTING,
    EACH,
    EVERYTHING,
    FAST,
    FOLDER,
    HARD,
    MAIN_ROWS,
    PICTURES,
    ROWS,
    SEEDS,
    TEMPERATURE,
    TESTS,
    Job,
    result_path,
)
from tools import environment
from tools.lock import exclusive


def set_up(work: Path) -> None:
    """A worker: ComfyUI with its folders in `work`, the small world in it, one thread."""
    import torch

    from softrepa.comfy import startup

    torch.set_num_threads(1)
    startup.start(Path(os.environ["COMFYUI_PATH"]), ["--base-directory", str(work)])
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
    folder = work / "input" / f"world{PICTURES}"
    if not folder.exists():
        unfinished = folder.with_name("unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        write_training_folder(unfinished, PICTURES)
        unfinished.rename(folder)


@cache
def stock_model(work: Path):
    from benchmarks.smallworld.measure import StockModel

    return StockModel(work / "models" / "checkpoints")


@cache
def test(work: Path, name: str):
    from benchmarks.smallworld.study import SEED, Test, held_out
    from softrepa.smallworld.world import CATEGORIES

    stock, number = stock_model(work), list(TESTS).index(name)
    categories = ("counting",) if name == COUNTING else CATEGORIES
    pictures = held_out(stock, BATCHES, HARD, SEED + 2) if name == EVERYTHING else None
    return Test(stock, dict.fromkeys(categories, TESTS[name]), SEED + 1 + 2 * number, pictures)


def patched(work: Path, job: Job):
    """The MODEL with the job's tokens on it; they are trained first where they are not there."""
    import contextlib
    import io

    from softrepa.comfy import headless
    from softrepa.comfy.tokens.patching import apply_tokens
    from softrepa.smallworld.checkpoint import CHECKPOINT_NAME
    from softrepa.token_files import load

    model = stock_model(work).model
    if job.row.training is None:
        return model
    data = {"checkpoint": CHECKPOINT_NAME, "folder": f"world{PICTURES}", "resolution": 96}
    with exclusive(work / f"{job.trained_as}.lock"), contextlib.redirect_stderr(io.StringIO()):  # its progress line
        path = headless.train(data | job.training | FAST | {"filename_prefix": job.trained_as, "resume": True})
    return apply_tokens(model, load(path))


def run(work: Path, job: Job) -> tuple[Job, float]:
    """Measures a job and writes what it found; returns the seconds it took."""
    from benchmarks.smallworld.measure import replace_text

    started = time.monotonic()
    found = test(work, job.row.test).measure(patched(work, job), TEMPERATURE, job.row.cfg)
    replace_text(result_path(job), json.dumps(found.as_json(), separators=(",", ":")))
    return job, time.monotonic() - started


def run_all(work: Path, jobs: list[Job], processes: int) -> None:
    started = time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), set_up, (work,)) as pool:
        pool.submit(prepare, work).result()
        futures = [pool.submit(run, work, job) for job in jobs]
        for number, future in enumerate(as_completed(futures), 1):
            if future.exception():
                pool.shutdown(wait=False, cancel_futures=True)  # an error shall not wait for hours of other jobs
            job, seconds = future.result()
            passed = (time.monotonic() - started) / 60
            print(
                f"{number}/{len(jobs)} {job.row.name}, seed {job.seed}: {seconds:.0f} s ({passed:.0f} min)", flush=True
            )


def draw(work: Path, names: list[str]) -> None:
    """The first prompts of every category, a line of pictures for each row; the prompts of wrong ones are red."""
    from benchmarks.smallworld.measure import contact_sheet, replace_picture

    work.mkdir(parents=True, exist_ok=True)
    set_up(work)
    prepare(work)
    rows = [test(work, EVERYTHING).row(patched(work, ROWS[name].jobs()[0]), ROWS[name].cfg, EACH) for name in names]
    replace_picture(FOLDER / "alignment_pictures.png", contact_sheet(rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.alignment", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; without any, the main ones")
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
    from benchmarks.alignment_report import write_report

    names = list(ROWS) if chosen.everything else chosen.rows or MAIN_ROWS
    work = chosen.state.absolute()
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    if chosen.draw:
        draw(work, names)
        return
    if not chosen.report:
        jobs = [job for name in names for job in ROWS[name].jobs() if job.seed < chosen.seeds]
        jobs.sort(key=lambda job: (bool(job.row.like), job.seed))  # who takes another's tokens comes behind
        jobs = [job for job in jobs if not result_path(job).exists()]
        try:
            run_all(work, jobs, chosen.jobs)
        finally:
            write_report()
    else:
        write_report()


if __name__ == "__main__":
    main()
