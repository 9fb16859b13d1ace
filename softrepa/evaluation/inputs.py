"""CONFIG of `evaluate`: what is drawn or edited, in which arms, and by what it is judged."""

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from ..comparing.inputs import CompareInputs, number_text, parse_seeds, parse_strengths
from ..configuration import CLIP, check_kinds
from ..errors import SoftREPAError, shown
from ..numbers import ABOVE_0, FROM_0, Numbers, check_number
from .metrics import METRICS, Metric, metric_named
from .presets import ABLATION, TABLE_7, preset_of

PLAIN, TOKENS = "plain", "tokens"
"""Names of arms: the model as it is, and with the one token file."""
MOST_NUMBERS = 100
LPIPS_NETS = ("alex", "squeeze", "vgg")
SIZE = Numbers("16 to 16384, a multiple of 8", lambda value: 16 <= value <= 16384 and value % 8 == 0)


@dataclass(frozen=True)
class EvaluateInputs:
    """By the names of the nodes' inputs, where a node has them.

    tokens: files by the names of their arms, or one file; metrics: weights by the metric's name; images: the folder of
    the photographs of a table; count: only the first so many captions or edits, 0 for all.
    Raises SoftREPAError for what cannot be meant.
    """

    checkpoint: str = ""
    tokens: dict[str, str] = field(default_factory=dict)
    strengths: str = "0, 1"
    preset: str = ""
    family: str = ""
    metrics: dict[str, str] = field(default_factory=dict)
    images: str = ""
    count: int = 0
    seeds: str = "0"
    output: str = ""
    steps: int = CompareInputs.steps
    cfg: float = CompareInputs.cfg
    sampler_name: str = CompareInputs.sampler_name
    scheduler: str = CompareInputs.scheduler
    negative_prompt: str = CompareInputs.negative_prompt
    zero_negative: bool = False
    width: int = CompareInputs.width
    height: int = CompareInputs.height
    captions: str = ""
    edits: str = ""
    source_prompts: str = ""
    target_prompts: str = ""
    source_cfg: float = 3.5
    n_max: str = "33"
    target_cfg: str = "13.5"
    tokens_n_max: str = ""
    tokens_target_cfg: str = ""
    n_min: int = 0
    n_avg: int = 1
    imagereward_python: str = ""
    lpips_net: str = "vgg"
    hps_architecture: str = "ViT-H-14"
    tokenizer_options: dict[str, int] = field(default_factory=dict)
    clip_layer: int = CLIP["clip_layer"]  # type: ignore[assignment]

    def __post_init__(self):
        for name, expected in (("width", SIZE), ("height", SIZE), ("steps", ABOVE_0), ("n_avg", ABOVE_0)):
            check_number(name, getattr(self, name), expected)
        for name in ("count", "cfg", "source_cfg", "n_min"):
            check_number(name, getattr(self, name), FROM_0)
        if self.lpips_net not in LPIPS_NETS:
            raise SoftREPAError(f'lpips_net is "{shown(self.lpips_net)}", expected one of {", ".join(LPIPS_NETS)}.')
        for name in ("tokens", "metrics"):
            for key, value in getattr(self, name).items():
                if not (isinstance(value, str) and value and key):
                    raise SoftREPAError(f"{name} has {shown(repr(key))}: {shown(repr(value))}, expected two texts.")
        if self.preset == ABLATION and not self.tokens.keys() <= TABLE_7.keys():
            odd = sorted(self.tokens.keys() - TABLE_7.keys())
            raise SoftREPAError(f'tokens has "{shown(odd[0])}", expected names of table 7: {", ".join(TABLE_7)}.')
        self.chosen_metrics, parse_seeds(self.seeds), arms_of(self)

    @property
    def is_of_edits(self) -> bool:
        return bool(self.edits or self.source_prompts)

    @property
    def chosen_metrics(self) -> dict[str, Metric]:
        """In the order of the paper's tables."""
        chosen = {name: metric_named(name) for name in self.metrics}
        return {name: metric for name, metric in METRICS.items() if name in chosen}

    @property
    def chosen_strengths(self) -> list[float]:
        """Of the arms with tokens; the plain arm is there where 0 is one of them."""
        return parse_strengths(self.strengths)

    @property
    def drawn(self) -> dict[str, Any]:
        """The settings that decide a picture beside model, tokens, prompt and seed."""
        names = [*SAMPLED, "negative_prompt", "zero_negative", "width", "height", *CLIP]
        names += EDITED if self.is_of_edits else ["cfg"]
        return {name: getattr(self, name) for name in names}


SAMPLED = ("steps", "sampler_name", "scheduler")
EDITED = ("source_cfg", "n_min", "n_avg")
KINDS = {
    one.name: type(one.default_factory() if callable(one.default_factory) else one.default)
    for one in fields(EvaluateInputs)
}
FOR_CAPTIONS = ("captions", "cfg", "sampler_name")
FOR_EDITS = (
    *("edits", "source_prompts", "target_prompts", "source_cfg", "n_min", "n_avg"),
    *("n_max", "target_cfg", "tokens_n_max", "tokens_target_cfg"),
)


def inputs_of(config: dict, edits: bool) -> EvaluateInputs:
    """CONFIG, with what its preset stands for. Raises SoftREPAError."""
    config = dict(config)
    if isinstance(config.get("tokens"), str):
        config["tokens"] = {TOKENS: config["tokens"]} if config["tokens"] else {}
    check_kinds(config, KINDS, "evaluate")
    if not config.get("checkpoint"):
        raise SoftREPAError("CONFIG lacks checkpoint, expected the model to draw with.")
    foreign = sorted(config.keys() & set(FOR_CAPTIONS if edits else FOR_EDITS))
    if foreign:
        where = "without --edits" if edits else "with --edits"
        raise SoftREPAError(f"CONFIG has {', '.join(foreign)}, expected it only {where}.")
    found = EvaluateInputs(**preset_of(config.get("preset", ""), config.get("family", ""), edits) | config)
    if edits and not (found.edits or (found.source_prompts and found.target_prompts)):
        raise SoftREPAError("CONFIG lacks edits, expected a table of edits, or source_prompts and target_prompts.")
    if not edits and not found.captions:
        raise SoftREPAError("CONFIG lacks captions, expected a file or a folder of captions.")
    if not edits and "structure" in found.metrics:
        raise SoftREPAError(
            "metrics has structure, expected it only with --edits: it compares a picture with its source."
        )
    return found


@dataclass(frozen=True)
class EditArm:
    """How deep and how strongly an arm edits; `tokens` names its file, empty for the plain model."""

    name: str
    tokens: str
    strength: float
    n_max: int
    target_cfg: float


def arms_of(inputs: EvaluateInputs) -> dict[str, tuple[str, float]]:
    """Token file and strength of each arm by its name; the plain model comes first and has neither.

    Raises SoftREPAError for two arms of one name.
    """
    arms: dict[str, tuple[str, float]] = {PLAIN: ("", 0.0)} if 0 in inputs.chosen_strengths or not inputs.tokens else {}
    for name, file in inputs.tokens.items():
        for strength in filter(None, inputs.chosen_strengths):
            arm = name if strength == 1 else f"{name} {number_text(strength)}"
            if arm in (PLAIN, *arms):
                raise SoftREPAError(
                    f'tokens and strengths call two arms "{shown(arm)}", expected another name of tokens.'
                )
            arms[arm] = (file, strength)
    return arms


def edit_arms_of(inputs: EvaluateInputs) -> list[EditArm]:
    """Every n_max with every target CFG; arms with tokens may have their own."""
    found = []
    whole = Numbers(f"a whole number from 1 to steps, {inputs.steps}", lambda n: 1 <= n <= inputs.steps and n % 1 == 0)
    for name, (file, strength) in arms_of(inputs).items():
        own = ("tokens_n_max", "tokens_target_cfg") if file else ("n_max", "target_cfg")
        n_max, target_cfg = (
            numbers(key, text) if (text := getattr(inputs, key)) else numbers(usual, getattr(inputs, usual))
            for key, usual in zip(own, ("n_max", "target_cfg"), strict=True)
        )
        for steps in n_max:
            check_number(own[0], steps, whole)
            for cfg in target_cfg:
                found.append(
                    EditArm(f"{name}, n_max {steps:g}, cfg {number_text(cfg)}", file, strength, int(steps), cfg)
                )
    return found


def numbers(name: str, text: str) -> list[float]:
    """ "10, 12.5" -> [10.0, 12.5]. Raises SoftREPAError."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not 0 < len(found) <= MOST_NUMBERS or len(set(found)) < len(found) or not all(map(FROM_0.holds, found)):
        raise SoftREPAError(f'{name} is "{shown(text)}", expected different numbers with commas between them.')
    return found


def photograph_folder(inputs: EvaluateInputs) -> Path | None:
    return Path(inputs.images) if inputs.images else None


def settings_text(inputs: EvaluateInputs) -> str:
    """All of it, as JSON holds it."""
    return json.dumps(asdict(inputs), indent=1)
