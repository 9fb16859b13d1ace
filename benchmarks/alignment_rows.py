"""The rows of the study of soft tokens: what is trained, how it is tested, and where its results lie."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER = Path(__file__).absolute().parent / "smallworld" / "results"
RESULTS = FOLDER / "alignment"
"""A file for each run. They come with the repository, so that a further row does not cost those that are there."""
TOKENS = RESULTS / "tokens"
"""What was trained, a file for each run: who measures it once more, or otherwise, needs no training."""
STEPS, PICTURES, SEEDS = 1500, 1200, 5
PROMPTS, BATCHES, HARD = 40, 48, 144  # of each category; of four held-out pictures; beside captions wrong by a fact
CFG, TEMPERATURE = 2.0, 0.07
EACH = 2  # pictures of each category in the README
EVERYTHING, GUIDANCE, COUNTING = "everything", "guidance", "counting"
DEVELOPMENT, REPORTED, CONFIRMED = "development", "reported", "confirmed"
TESTS = {EVERYTHING: PROMPTS, GUIDANCE: 80, COUNTING: 160, DEVELOPMENT: 40, REPORTED: 80, CONFIRMED: 80}
"""Prompts of each category. Each test has its own; the first has held-out pictures besides, the third one category.

DEVELOPMENT and REPORTED have no caption and no noise in common, so that what is chosen on one can be reported on the
other. CONFIRMED has noise of its own, and captions of its own where the world has enough of them.
"""
FIRST_NEW = 7
"""Runs of earlier seeds are reported on, or settings were chosen with them."""
GUIDANCES = (1.0, 1.25, 1.5, 2.0, 3.0)
"""At which it is asked where tokens act best."""
REFERENCE = {"batch_size": 4, "learning_rate": 1e-3}
FAST = {"micro_batch": 64, "checkpointing": False, "checkpoint_every": 250, "on_no_contrast": "go on"}
CPU = "cpu"
DEVICES = (CPU, "cuda")
"""Where the study trains and draws. A card rounds otherwise: its tokens and results have files of their own."""
VERSION = 1
"""Raised with any other change that decides a result: the world, the small world's file, the pack's own training."""


@dataclass(frozen=True)
class Placing:
    """Where and how strongly a row's tokens act while it draws: options of `apply_tokens`."""

    strength: float = 1.0
    apply_to: str = "both"
    start_percent: float = 0.0
    end_percent: float = 1.0

    @property
    def title(self) -> str:
        """What differs from the reference, in words."""
        halves = {"both": "", "positive": "conditional half only", "negative": "unconditional half only"}
        window = (self.start_percent, self.end_percent)
        parts = (
            halves[self.apply_to],
            f"strength {self.strength:g}" if self.strength != 1 else "",
            "steps {:.0%} to {:.0%}".format(*window) if window != (0, 1) else "",
        )
        return ", ".join(filter(None, parts)) or "as in the reference"


SWAPS, NUMBERS = "", "numbers"


@dataclass(frozen=True)
class Row:
    """A model to measure: trained with `training` beside the reference's constants, or the plain one where it is None.

    `like` is the row whose tokens it takes instead of training its own, `test` which of `TESTS` it takes, `placing`
    where the tokens act in it, `first_seed` the seed of the first of its runs. Its hard negatives are the pack's own,
    two swapped words, or with `wrong_by` NUMBERS those of `study.other_numbers`.
    """

    name: str
    training: dict | None
    part: str
    seeds: int = SEEDS
    cfg: float = CFG
    like: str = ""
    test: str = EVERYTHING
    placing: Placing = Placing()
    first_seed: int = 0
    wrong_by: str = SWAPS

    @property
    def has_own_tokens(self) -> bool:
        return self.training is not None and not self.like

    def jobs(self, device: str = CPU) -> list["Job"]:
        runs = range(self.seeds if self.training is not None else 1)
        return [Job(self, self.first_seed + run, device) for run in runs]


BASELINE, SOFTREPA, CONTROL = "plain model", "SoftREPA", "denoising loss only"
MAIN, OPTIONS = "The main comparison", "Other ways to train"
ABLATION = "Tokens (4) and blocks that have them (3)"
GUIDANCE_PART, COUNTING_PART = "Other guidance (2 above)", "Counting, with more prompts"
AGAIN_PART, CONFIRMED_PART = "Without guidance, drawn again", "Without guidance, trained anew"
RELATIVE = {"temperature_mode": "relative", "temperature": 1.0}
AGSM = {"objective": "agsm"}
RANKING = {"contrast": "ranking"}
GUIDED = {"objective": "guided contrast", "guidance_scale": 2.0}
HIGH, HIGH_NOISE = "high noise", {"min_timestep": 750}
OTHER_NUMBERS = "negatives of other numbers"
LEARNED, BOTH = "guidance 2 learned", "SoftREPA and guidance 2 learned"
BOTH_LEARNED = {"guidance_weight": 10.0, "guidance_scale": 2.0}


def _rows() -> Iterator[Row]:
    yield Row(BASELINE, None, MAIN)
    yield Row(SOFTREPA, {}, MAIN)
    yield Row(CONTROL, {"objective": "denoising"}, MAIN)
    yield Row("relative temperature", RELATIVE, OPTIONS)
    yield Row("symmetric loss", {"symmetric": True}, OPTIONS)
    yield Row("hard negatives", {"hard_negatives": 1}, OPTIONS)
    yield Row(OTHER_NUMBERS, {"hard_negatives": 2}, OPTIONS, wrong_by=NUMBERS)
    yield Row("AGSM", AGSM, OPTIONS)
    yield Row("AGSM, hard negatives", AGSM | {"hard_negatives": 1}, OPTIONS)
    for scale in (2.0, 3.0):
        yield Row(f"guidance {scale:g} learned", {"objective": "guidance", "guidance_scale": scale}, OPTIONS)
    yield Row(BOTH, BOTH_LEARNED, OPTIONS)
    yield Row("guided contrast 2", GUIDED, OPTIONS)
    yield Row("ranking loss", RANKING, OPTIONS)
    yield Row("guided contrast 2, ranking loss", GUIDED | RANKING, OPTIONS)
    yield Row(HIGH, HIGH_NOISE, OPTIONS)
    yield Row(f"{HIGH}, hard negatives", HIGH_NOISE | {"hard_negatives": 1}, OPTIONS)
    yield Row(f"{HIGH}, guided contrast 2", HIGH_NOISE | GUIDED, OPTIONS)
    for part, name, values in (
        (ABLATION, "n_tokens", (1, 2, 8, 16)),
        (ABLATION, "blocks", ("1", "2")),
        ("Weight of the denoising loss (0)", "denoising_weight", (1.0, 10.0)),
        ("Batch size (4)", "batch_size", (2, 8, 16)),
        (f"Number of updates ({STEPS})", "steps", (5000,)),
        ("Temperature (0.07)", "temperature", (0.02, 0.2, 2.0)),
    ):
        for value in values:
            yield Row(f"{name} {value}", {name: value}, part, seeds=3)
    ways = (BASELINE, SOFTREPA, CONTROL, "relative temperature", "symmetric loss", "hard negatives", "AGSM")
    without = (*ways, LEARNED, "guidance 3 learned", BOTH, HIGH, OTHER_NUMBERS)
    for cfg, names in ((1.0, without), (3.0, ways[:2]), (5.0, ways[:2])):
        for name in names:
            yield _again(name, f"cfg {cfg:g}", GUIDANCE_PART, cfg=cfg, test=GUIDANCE)
    compared = (BASELINE, SOFTREPA, BOTH, LEARNED)
    for name in compared:
        yield _again(name, "cfg 1, drawn again", AGAIN_PART, cfg=1.0, test=REPORTED)
    for name in compared:
        yield _again(name, "cfg 1, trained anew", CONFIRMED_PART, cfg=1.0, test=CONFIRMED, first_seed=FIRST_NEW)
    for name in (*ways, HIGH, "guided contrast 2", OTHER_NUMBERS):
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
    device: str = CPU

    @property
    def training(self) -> dict:
        """The inputs of the node."""
        return REFERENCE | {"seed": self.seed, "steps": STEPS} | (self._trains.training or {})

    @property
    def wrong_by(self) -> str:
        return self._trains.wrong_by

    @property
    def key(self) -> str:
        trained = None if self.row.training is None else self._trained
        facts = [VERSION, trained, self.row.cfg, PICTURES, PROMPTS, BATCHES, HARD, TEMPERATURE]
        if self.row.test != EVERYTHING:
            facts.append([self.row.test, TESTS[self.row.test]])
        if self.row.placing != Placing():
            facts.append(asdict(self.row.placing))
        return self._hash(facts)

    @property
    def trained_as(self) -> str:
        return self._hash([VERSION, self._trained, PICTURES])

    @property
    def _trains(self) -> Row:
        """Whose tokens these are."""
        return ROWS[self.row.like] if self.row.like else self.row

    @property
    def _trained(self) -> dict:
        """What decides the tokens."""
        return self.training | ({"wrong_by": self.wrong_by} if self.wrong_by else {})

    def _hash(self, facts: list) -> str:
        own = [] if self.device == CPU else [self.device]
        return hashlib.sha256(json.dumps([*facts, *own], sort_keys=True).encode()).hexdigest()[:16]


def result_path(job: Job) -> Path:
    return RESULTS / f"{job.key}.json"


def tokens_path(job: Job) -> Path:
    return TOKENS / f"{job.trained_as}.safetensors"
