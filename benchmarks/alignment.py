"""What soft tokens do on the small world: they are trained by the pack's own engine and tested on what they never saw.

python3 -m benchmarks.alignment [ROW ...] [--everything | --places [--cfg CFG ...]] [--seeds 5] [--jobs 2]
                                [--train | --report | --draw | --again]

Without arguments the main comparison: the plain model, SoftREPA with the paper's constants, and as a control the same
tokens trained with the plain denoising loss; with guidance, without, and on more counting prompts. With --places the
tokens of a row at other guidances and strengths, on one half of guidance, in some of the steps.

What is done stays done: stopped, it goes on where it was, and every run writes smallworld/results/alignment.md anew, in
which rows that were not run are marked.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from functools import cache
from pathlib import Path
from unittest import mock

from benchmarks.alignment_rows import (
    BATCHES,
    CPU,
    DEVICES,
    EACH,
    EVERYTHING,
    FAST,
    FOLDER,
    GUIDANCES,
    HARD,
    MAIN_ROWS,
    NUMBERS,
    PICTURES,
    ROWS,
    SEEDS,
    SOFTREPA,
    TEMPERATURE,
    Job,
    Row,
    result_path,
    tokens_path,
)
from tools import environment
from tools.lock import exclusive


def set_up(work: Path, device: str) -> None:
    """A worker: ComfyUI with its folders in `work`, one thread; a card computes in full float32, as the CPU does."""
    import torch

    from softrepa.comfy import startup

    end_with_parent()
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    options = ["--cpu"] if device == CPU else ["--force-fp32", "--fp32-vae", "--fp32-text-enc"]
    options += ["--use-pytorch-cross-attention", "--base-directory", str(work)]
    startup.start(Path(os.environ["COMFYUI_PATH"]), options)
    import comfy.utils

    from benchmarks.smallworld import padding

    comfy.utils.PROGRESS_BAR_ENABLED = False
    padding.give_once()


def end_with_parent() -> None:
    """A worker whose parent was killed would train on, hold its locks and write results that nobody waits for."""

    def wait_for(parent) -> None:
        parent.join()
        os._exit(1)

    if parent := multiprocessing.parent_process():
        threading.Thread(target=wait_for, args=(parent,), daemon=True).start()


def prepare(work: Path) -> None:
    """The folders and the checkpoint."""
    from softrepa.smallworld.checkpoint import CHECKPOINT_NAME, write_checkpoint

    for name in ("models/checkpoints", "models/softrepa", "input", "output", "temp", "user"):
        (work / name).mkdir(parents=True, exist_ok=True)
    if not (work / "models" / "checkpoints" / CHECKPOINT_NAME).exists():
        write_checkpoint(work / "models" / "checkpoints" / CHECKPOINT_NAME)


def training_folder(work: Path) -> str:
    """Its name below `input`; it is drawn where it is not there."""
    from benchmarks.smallworld.study import write_training_folder

    folder = work / "input" / f"world{PICTURES}"
    with exclusive(work / "pictures.lock"):
        if not folder.exists():
            unfinished = folder.with_name("unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            write_training_folder(unfinished, PICTURES)
            unfinished.rename(folder)
    return folder.name


@cache
def stock_model(work: Path):
    from benchmarks.smallworld.measure import StockModel

    return StockModel(work / "models" / "checkpoints")


@cache
def test(work: Path, name: str):
    from benchmarks.alignment_tests import asked
    from benchmarks.smallworld.study import SEED, Test, held_out

    stock, one = stock_model(work), asked(name)
    pictures = held_out(stock, BATCHES, HARD, SEED + 2) if name == EVERYTHING else None
    return Test(stock, one.prompts, one.seed, pictures, one.spec_of, one.noise, one.batch)


def trained_tokens(work: Path, job: Job) -> Path:
    """The file of the job's tokens as the repository keeps it; they are trained first where it does not."""
    import io

    from softrepa.comfy import headless
    from softrepa.files import write_atomically
    from softrepa.smallworld.checkpoint import CHECKPOINT_NAME

    kept = tokens_path(job)
    with exclusive(work / f"{job.trained_as}.lock"):
        if not kept.exists():
            data = {"checkpoint": CHECKPOINT_NAME, "folder": training_folder(work), "resolution": 96}
            named = {"filename_prefix": job.trained_as, "resume": True}
            # training says its progress
            with wrong_by(job.wrong_by), contextlib.redirect_stderr(io.StringIO()):
                trained = headless.train(data | job.training | FAST | named)
            write_atomically(kept, lambda temporary: shutil.copyfile(trained, temporary))
    return kept


@contextlib.contextmanager
def wrong_by(what: str) -> Iterator[None]:
    """Hard negatives are wrong by other numbers where that is asked: the pack itself makes them by swapped words."""
    if what != NUMBERS:
        yield
        return
    from benchmarks.smallworld.study import other_numbers
    from softrepa.data import dataset

    with mock.patch.object(dataset, "swaps", other_numbers):
        yield


def patched(work: Path, job: Job):
    """The MODEL with the job's tokens on it, where the row says."""
    from softrepa.comfy.tokens.patching import apply_tokens
    from softrepa.token_files import load

    model = stock_model(work).model
    if job.row.training is None:
        return model
    return apply_tokens(model, load(trained_tokens(work, job)), **asdict(job.row.placing))


def train(work: Path, job: Job) -> tuple[str, float]:
    """Trains a job's tokens; returns what was done, and the seconds it took."""
    started = time.monotonic()
    trained_tokens(work, job)
    return f"trained {job.row.like or job.row.name}, seed {job.seed}", time.monotonic() - started


def run(work: Path, job: Job) -> tuple[str, float]:
    """Measures a job and writes what it found; returns what was done, and the seconds it took."""
    import torch

    from benchmarks.smallworld.measure import replace_text

    started = time.monotonic()
    found = test(work, job.row.test).measure(patched(work, job), TEMPERATURE, job.row.cfg)
    made = {"device": job.device, "torch": torch.__version__}
    replace_text(result_path(job), json.dumps(found.as_json() | {"made": made}, separators=(",", ":")))
    return f"{job.row.name}, seed {job.seed}", time.monotonic() - started


def run_all(work: Path, trainings: list[Job], jobs: list[Job], processes: int) -> None:
    """Trains, and measures each job as soon as its tokens are there."""
    started, done, total = time.monotonic(), 0, len(trainings) + len(jobs)
    work.mkdir(parents=True, exist_ok=True)
    waiting: dict[str, list[Job]] = {job.trained_as: [] for job in trainings}
    device = next(job.device for job in (*trainings, *jobs))
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), set_up, (work, device)) as pool:
        pool.submit(prepare, work).result()
        futures = {pool.submit(train, work, job): job.trained_as for job in trainings}
        for job in jobs:
            if job.row.training is not None and job.trained_as in waiting:
                waiting[job.trained_as].append(job)
            else:
                futures[pool.submit(run, work, job)] = ""
        while futures:
            for future in wait(futures, return_when=FIRST_COMPLETED).done:
                if future.exception():
                    pool.shutdown(wait=False, cancel_futures=True)  # an error shall not wait for hours of other jobs
                what, seconds = future.result()
                done, passed = done + 1, (time.monotonic() - started) / 60
                print(f"{done}/{total} {what}: {seconds:.0f} s ({passed:.0f} min)", flush=True)
                futures |= {pool.submit(run, work, job): "" for job in waiting.get(futures.pop(future), ())}


def is_measured(job: Job, again: bool) -> bool:
    """Whether there is a result; `again`: one with every figure that is recorded today."""
    path = result_path(job)
    return path.exists() and (not again or bool(json.loads(path.read_text(encoding="utf-8")).get("unasked")))


def run_rows(work: Path, rows: list[Row], chosen: argparse.Namespace) -> None:
    """Whatever of the rows is not there yet."""
    jobs = list({job.key: job for row in rows for job in row.jobs(chosen.device)[: chosen.seeds]}.values())
    # who takes another's tokens comes behind
    jobs.sort(key=lambda job: (bool(job.row.like), job.seed))
    to_measure = [] if chosen.train else [job for job in jobs if not is_measured(job, chosen.again)]
    needed = [job for job in (jobs if chosen.train else to_measure) if job.row.training is not None]
    trainings = {job.trained_as: job for job in needed if not tokens_path(job).exists()}
    if trainings or to_measure:
        run_all(work, list(trainings.values()), to_measure, chosen.jobs)


def run_places(work: Path, names: list[str], chosen: argparse.Namespace) -> None:
    """Of one guidance after the other all settings on development prompts, then the chosen one on others."""
    from benchmarks.alignment_figures import Found
    from benchmarks.alignment_places import development_rows, in_order, reported_rows
    from benchmarks.alignment_report import write_report

    if chosen.train:
        grid = [row for name in names for row in development_rows(name, in_order()[0])]
        run_rows(work, [*grid, *(ROWS[name] for name in names)], chosen)  # the latter's tokens are what is reported
        return
    for cfg in chosen.cfg or in_order():
        run_rows(work, [row for name in names for row in development_rows(name, cfg)], chosen)
        found = Found(chosen.device)
        run_rows(work, [row for name in names for row in reported_rows(found, name, cfg)], chosen)
        write_report()


def draw(work: Path, names: list[str]) -> None:
    """The first prompts of every category, a line of pictures for each row; the prompts of wrong ones are red."""
    from benchmarks.smallworld.measure import contact_sheet, replace_picture

    work.mkdir(parents=True, exist_ok=True)
    set_up(work, CPU)
    prepare(work)
    rows = [test(work, EVERYTHING).row(patched(work, ROWS[name].jobs()[0]), ROWS[name].cfg, EACH) for name in names]
    replace_picture(FOLDER / "alignment_pictures.png", contact_sheet(rows))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.alignment", description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}; without any, the main ones")
    parser.add_argument("--everything", action="store_true", help="every row")
    parser.add_argument("--places", action="store_true", help="where the tokens of the rows (SoftREPA) act best")
    parser.add_argument(
        "--cfg", nargs="+", type=float, choices=GUIDANCES, help="of --places: only these, in this order"
    )
    parser.add_argument("--device", choices=DEVICES, default=CPU, help="of its own results (cpu)")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"at most so many of each row ({SEEDS}, some have 3)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes of one thread (one a core)")
    parser.add_argument("--state", type=Path, default=environment.cache_folder() / "alignment", help="where it resumes")
    parser.add_argument(
        "--draw", action="store_true", help="draw pictures of the rows that are trained, measure nothing"
    )
    parser.add_argument(
        "--train", action="store_true", help="train the rows' tokens that are not there, measure nothing"
    )
    parser.add_argument("--again", action="store_true", help="measure also what lacks a figure that came later")
    parser.add_argument("--report", action="store_true", help="write the report of what is there, run nothing")
    chosen = parser.parse_args()
    known = [row.name for row in ROWS.values() if not chosen.places or row.has_own_tokens]
    if unknown := sorted(set(chosen.rows) - set(known)):
        parser.error(f"ROW is {', '.join(unknown)}, expected some of: {', '.join(known)}")
    if chosen.cfg and not chosen.places:
        parser.error("--cfg is given without --places, expected it with that alone: a row has its own guidance")
    environment.enter("benchmarks.alignment")
    import torch

    from benchmarks.alignment_report import write_report

    if chosen.device != CPU and not torch.cuda.is_available():
        parser.error(f"--device is {chosen.device}, but PyTorch finds no such device here, expected {CPU}")
    everything = list(ROWS) if chosen.everything else MAIN_ROWS
    names = chosen.rows or ([SOFTREPA] if chosen.places else everything)
    work = chosen.state.absolute() / chosen.device
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    if chosen.draw:
        draw(work, names)
        return
    try:
        if chosen.places and not chosen.report:
            run_places(work, names, chosen)
        elif not chosen.report:
            run_rows(work, [ROWS[name] for name in names], chosen)
    finally:
        write_report()


if __name__ == "__main__":
    main()
