"""The paper's tables as settings: Lee et al., arXiv 2503.08250, and the authors' scripts where the paper is silent.

Tables 4 and 7 are of the COCO captions of 2017's validation part: a picture of the first caption of each of its 5,000
photographs, by the scripts.
"""

from collections.abc import Mapping
from typing import Any

from ..errors import SoftREPAError, shown
from ..families import FAMILIES

SAMPLING: dict[str, dict[str, Any]] = {
    "sd15": {"steps": 30, "cfg": 7.0, "width": 512, "height": 512, "sampler_name": "ddim", "scheduler": "ddim_uniform"},
    "sdxl": {
        "steps": 30,
        "cfg": 7.0,
        "width": 1024,
        "height": 1024,
        "sampler_name": "ddim",
        "scheduler": "ddim_uniform",
        "zero_negative": True,
    },
    "sd3": {
        "steps": 28,
        "cfg": 4.0,
        "width": 1024,
        "height": 1024,
        "sampler_name": "euler",
        "scheduler": "normal",
        "tokenizer_options": {"t5xxl_min_length": 512},
    },
}
"""Of table 4: steps and CFG are the paper's; size, sampler and scheduler, the T5 of 512 tokens and SDXL's negative
prompt of zeros are those of the scripts."""

EDITING: dict[str, Any] = {
    "steps": 50,
    "scheduler": "normal",
    "source_cfg": 3.5,
    "width": 1024,
    "height": 1024,
    "n_max": "33",
    "target_cfg": "13.5, 16.5, 19.5",
    "tokens_n_max": "30",
    "tokens_target_cfg": "10, 12, 14",
    "tokenizer_options": SAMPLING["sd3"]["tokenizer_options"],
}
"""Of table 5. The script with tokens guides with v_c + s (v_c - v_u), which is a CFG of s + 1."""


def _figures(names: str, rows: dict[str, tuple[float, ...]]) -> dict[str, dict[str, float]]:
    return {arm: dict(zip(names.split(), values, strict=True)) for arm, values in rows.items()}


TABLE_4 = {
    family: _figures("imagereward pickscore clip hps fid lpips", {"plain": plain, "tokens": tokens})
    for family, plain, tokens in (
        ("sd15", (0.177, 21.478, 0.264, 0.250, 24.598, 0.438), (0.273, 21.541, 0.270, 0.252, 25.358, 0.437)),
        ("sdxl", (0.750, 22.389, 0.267, 0.273, 24.697, 0.420), (0.852, 22.620, 0.268, 0.283, 26.040, 0.423)),
        ("sd3", (0.942, 22.549, 0.263, 0.280, 31.595, 0.424), (1.085, 22.550, 0.269, 0.289, 36.214, 0.428)),
    )
}
TABLE_5 = _figures(
    "imagereward clip lpips",
    {
        "plain, n_max 33, cfg 13.5": (0.380, 0.261, 0.154),
        "plain, n_max 33, cfg 16.5": (0.466, 0.263, 0.180),
        "plain, n_max 33, cfg 19.5": (0.510, 0.265, 0.200),
        "tokens, n_max 30, cfg 10": (0.466, 0.263, 0.149),
        "tokens, n_max 30, cfg 12": (0.564, 0.268, 0.178),
        "tokens, n_max 30, cfg 14": (0.627, 0.272, 0.201),
    },
)
TABLE_7 = {
    f"{tokens}x{layers}": {"imagereward": reward}
    for tokens, layers, reward in (
        *((8, 2, 0.993), (8, 4, 1.009), (8, 6, 0.984), (8, 7, 0.944)),
        *((1, 5, 1.054), (4, 5, 1.063), (8, 5, 1.056), (16, 5, 0.801), (32, 5, 0.675)),
    )
}
"""Of SD3: tokens x layers, each a token file of its own."""

PAPER, ABLATION = "paper", "ablation"
PRESETS = ("", PAPER, ABLATION)


def preset_of(name: str, family: str, edits: bool) -> dict[str, Any]:
    """Settings that a preset stands for; what a CONFIG says besides goes before them. Raises SoftREPAError."""
    if name not in PRESETS:
        raise SoftREPAError(f'preset is "{shown(name)}", expected {PAPER} or {ABLATION}.')
    if not name:
        return {}
    if edits:
        if name == ABLATION:
            raise SoftREPAError("preset is ablation, expected paper for edits: table 7 is of text to image.")
        return EDITING
    if name == ABLATION:
        return SAMPLING["sd3"]
    if family not in FAMILIES:
        raise SoftREPAError(
            f'family is "{shown(family)}", expected one of {", ".join(FAMILIES)}: preset paper differs between them.'
        )
    return SAMPLING[family]


def published(name: str, family: str, edits: bool, settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """The paper's figures, by arm and metric; none where `settings` are not those of the preset."""
    if not name or any(settings[key] != value for key, value in preset_of(name, family, edits).items()):
        return {}
    if edits:
        return TABLE_5
    return TABLE_7 if name == ABLATION else TABLE_4[family]
