"""The paper's tables as settings: Lee et al., arXiv 2503.08250, and the authors' scripts where the paper is silent.

Both tables are of the COCO captions of 2017's validation part: the first caption of each of 5,000 photographs, a picture
of each.
"""

from typing import Any

from ..errors import SoftREPAError, shown
from ..families import FAMILIES

SAMPLING: dict[str, dict[str, Any]] = {
    "sd15": {"steps": 30, "cfg": 7.0, "width": 512, "height": 512, "sampler_name": "ddim", "scheduler": "ddim_uniform"},
    "sdxl": {
        **{"steps": 30, "cfg": 7.0, "width": 1024, "height": 1024, "sampler_name": "ddim", "scheduler": "ddim_uniform"},
        "zero_negative": True,
    },
    "sd3": {
        **{"steps": 28, "cfg": 4.0, "width": 1024, "height": 1024, "sampler_name": "euler", "scheduler": "normal"},
        "tokenizer_options": {"t5xxl_min_length": 512},
    },
}
"""Of table 4: steps and CFG are the paper's; size, sampler and scheduler, the T5 of 512 tokens and SDXL's negative
prompt of zeros are those of the scripts."""

EDITING: dict[str, Any] = {
    **{"steps": 50, "scheduler": "normal", "source_cfg": 3.5, "width": 1024, "height": 1024},
    **{"n_max": "33", "target_cfg": "13.5, 16.5, 19.5", "tokens_n_max": "30", "tokens_target_cfg": "10, 12, 14"},
    "tokenizer_options": SAMPLING["sd3"]["tokenizer_options"],
}
"""Of table 5. The script with tokens guides with v_c + s (v_c - v_u), which is a CFG of s + 1."""

TABLE_4 = {
    "sd15": {
        "plain": {"imagereward": 0.177, "pickscore": 21.478, "clip": 0.264, "hps": 0.250, "fid": 24.598, "lpips": 0.438},
        "tokens": {"imagereward": 0.273, "pickscore": 21.541, "clip": 0.270, "hps": 0.252, "fid": 25.358, "lpips": 0.437},
    },
    "sdxl": {
        "plain": {"imagereward": 0.750, "pickscore": 22.389, "clip": 0.267, "hps": 0.273, "fid": 24.697, "lpips": 0.420},
        "tokens": {"imagereward": 0.852, "pickscore": 22.620, "clip": 0.268, "hps": 0.283, "fid": 26.040, "lpips": 0.423},
    },
    "sd3": {
        "plain": {"imagereward": 0.942, "pickscore": 22.549, "clip": 0.263, "hps": 0.280, "fid": 31.595, "lpips": 0.424},
        "tokens": {"imagereward": 1.085, "pickscore": 22.550, "clip": 0.269, "hps": 0.289, "fid": 36.214, "lpips": 0.428},
    },
}  # fmt: skip
TABLE_5 = {
    "plain, n_max 33, cfg 13.5": {"imagereward": 0.380, "clip": 0.261, "lpips": 0.154},
    "plain, n_max 33, cfg 16.5": {"imagereward": 0.466, "clip": 0.263, "lpips": 0.180},
    "plain, n_max 33, cfg 19.5": {"imagereward": 0.510, "clip": 0.265, "lpips": 0.200},
    "tokens, n_max 30, cfg 10": {"imagereward": 0.466, "clip": 0.263, "lpips": 0.149},
    "tokens, n_max 30, cfg 12": {"imagereward": 0.564, "clip": 0.268, "lpips": 0.178},
    "tokens, n_max 30, cfg 14": {"imagereward": 0.627, "clip": 0.272, "lpips": 0.201},
}
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


def published(name: str, family: str, edits: bool) -> dict[str, dict[str, float]]:
    """The paper's figures, by arm and metric."""
    if not name:
        return {}
    if edits:
        return TABLE_5
    return TABLE_7 if name == ABLATION else TABLE_4[family]
