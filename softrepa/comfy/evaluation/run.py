"""An evaluation from its CONFIG to its table. ComfyUI must be started."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comfy.model_management as memory
import folder_paths
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...comparing.inputs import parse_seeds
from ...comparing.records import Arm, Record, record, short_hash, write_records
from ...configuration import CLIP
from ...evaluation.captions import Caption, Edit, check_photographs, paired_edits, read_captions, read_edits
from ...evaluation.inputs import EditArm, EvaluateInputs, arms_of, edit_arms_of, photograph_folder
from ...evaluation.measuring import Drawn, measure
from ...evaluation.metrics import JudgeOptions, check_weights
from ...evaluation.presets import ABLATION, published
from ...evaluation.ranks import Rank, wait_for_others
from ...evaluation.report import CURVE, TABLE, Report, curve
from ...files import write_atomically
from ...tokens import SoftTokens
from .. import headless
from ..identity import clip_identity, model_identity, vae_identity
from ..models import check_positions
from ..tokens.patching import apply_tokens
from .drawing import Painter, draw_missing
from .editing import Editor

FOLDER = "softrepa_evaluation"
"""In ComfyUI's output folder, where CONFIG names no other."""
LPIPS_SIDE = 299
"""Pixels to which the paper's script resizes a picture and its photograph."""
Tell = Callable[[str], None]
