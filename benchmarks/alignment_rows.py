"""The rows of the study of soft tokens: what is trained, how it is tested, and where its results lie."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).absolute().parent / "smallworld" / "results"
RESULTS = FOLDER / "alignment"
"""A file for each run. They come with the repository, so that a further row does not cost those that are there."""
STEPS, PICTURES, SEEDS = 1500, 1200, 5
PROMPTS, BATCHES, HARD = 40, 48, 144  # of each category; of four held-out pictures; beside captions wrong by a fact
CFG, TEMPERATURE = 2.0, 0.07
EACH = 2  # pictures of each category in the README
EVERYTHING, GUIDANCE, COUNTING = "everything", "guidance", "counting"
TESTS = {EVERYTHING: PROMPTS, GUIDANCE: 80, COUNTING: 160}
"""Prompts of each category. Each test has its own; the first has held-out pictures besides, the last one category."""
REFERENCE = {"batch_size": 4, "learning_rate": 1e-3}
FAST = {"micro_batch": 64, "checkpointing": False, "checkpoint_every": 250, "on_no_contrast": "go on"}
VERSION = 1
"""Raised with any other change that decides a result: the world, the small world's file, the pack's own training."""


@dataclass(frozen=True)
class Row:
    """A model to measure: trained with `training` beside the reference's constants, or the plain one where it is None.

    `like` is the row whose tokens it takes instead of training its own, `test` which of `TESTS` it takes.
    """

    name: str
    training: dict | None
    part: str
    seeds: int = SEEDS
    cfg: float = CFG
    like: str = ""
    test: str = EVERYTHING

    def jobs(self) -> list["Job"]:
        return [Job(self, seed) for seed in range(self.seeds if self.training is not None else 1)]


BASELINE, SOFTREPA, CONTROL = "plain model", "SoftREPA", "denoising loss only"
MAIN, OPTIONS = "The main comparison", "Other ways to train"
GUIDANCE_PART, COUNTING_PART = "Other guidance (2 above)", "Counting, with more prompts"
RELATIVE = {"temperature_mode": "relative", "temperature": 1.0}
AGSM = {"objective": "agsm"}
RANKING = {"contrast": "ranking"}
GUIDED = {"objective": "guided contrast", "guidance_scale": 2.0}


def _rows() -> Iterator[Row]:
    yield Row(BASELINE, None, MAIN)
    yield Row(SOFTREPA, {}, MAIN)
    yield Row(CONTROL, {"objective": "denoising"}, MAIN)
    yield Row("relative temperature", RELATIVE, OPTIONS)
    yield Row("symmetric loss", {"symmetric": True}, OPTIONS)
    yield Row("hard negatives", {"hard_negatives": 1}, OPTIONS)
    yield Row("AGSM", AGSM, OPTIONS)
    yield Row("AGSM, hard negatives", AGSM | {"hard_negatives": 1}, OPTIONS)
    for scale in (2.0, 3.0):
        yield Row(f"guidance {scale:g} learned", {"objective": "guidance", "guidance_scale": scale}, OPTIONS)
    yield Row("guided contrast 2", GUIDED, OPTIONS)
    yield Row("ranking loss", RANKING, OPTIONS)
    yield Row("guided contrast 2, ranking loss", GUIDED | RANKING, OPTIONS)
    for part, name, values in (
        ("Number of tokens (4)", "n_tokens", (1, 2, 8, 16)),
        ("Number of blocks with tokens (3)", "blocks", ("1", "2")),
        ("Weight of the denoising loss (0)", "denoising_weight", (1.0, 10.0)),
        ("Batch size (4)", "batch_size", (2, 8)),
        ("Temperature (0.07)", "temperature", (0.02, 0.2, 2.0)),
    ):
        for value in values:
            yield Row(f"{name} {value}", {name: value}, part, seeds=3)
    ways = (BASELINE, SOFTREPA, CONTROL, "relative temperature", "symmetric loss", "hard negatives", "AGSM")
    learned = ("guidance 2 learned", "guidance 3 learned")
    for cfg, names in ((1.0, (*ways, *learned)), (3.0, ways[:2]), (5.0, ways[:2])):
        for name in names:
            yield _again(name, f"cfg {cfg:g}", GUIDANCE_PART, cfg=cfg, test=GUIDANCE)
    for name in ways:
        yield _again(name, "counting", COUNTING_PART, test=COUNTING)


def _again(name: str, suffix: str, part: str, **other) -> Row:
    """The tokens of row `name` in another test."""
    return Row(f"{name}, {suffix}", None if name == BASELINE else {}, part, like=name, **other)


ROWS = {row.name: row for row in _rows()}
MAIN_ROWS = [
    form.format(name) for form in ("{}", "{}, cfg 1", "{}, counting") for name in (BASELINE, SOFTREPA, CONTROL)
]
"""What the main comparison is made of."""


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
        trained = None if self.row.training is None else self.training
        facts = [VERSION, trained, self.row.cfg, PICTURES, PROMPTS, BATCHES, HARD, TEMPERATURE]
        if self.row.test != EVERYTHING:
            facts.append([self.row.test, TESTS[self.row.test]])
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @property
    def trained_as(self) -> str:
        return hashlib.sha256(json.dumps([VERSION, self.training, PICTURES], sort_keys=True).encode()).hexdigest()[:16]


def result_path(job: Job) -> Path:
    return RESULTS / f"{job.key}.json"
