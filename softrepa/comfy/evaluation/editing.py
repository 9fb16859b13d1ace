"""The edits of an evaluation, by FlowEdit."""

from collections.abc import Sequence

import comfy.sd
import numpy as np
import torch
from comfy.model_patcher import ModelPatcher
from torch import Tensor

from ...comparing.records import Record
from ...data.sources import Source
from ...evaluation.captions import Edit
from ...evaluation.inputs import EditArm, EvaluateInputs
from ...evaluation.pictures import sized
from ..data.encoding import decoded_still, encode_image
from ..editing.checks import check_counts
from ..editing.flowedit import FlowEditGuider, FlowEditSampler, edit_latent, edit_sigmas
from .drawing import Prompts


class Editor:
    """Edits as the FlowEdit Sampler node does, between VAE Encode and VAE Decode."""

    def __init__(
        self,
        inputs: EvaluateInputs,
        clip: comfy.sd.CLIP,
        vae: comfy.sd.VAE,
        edits: Sequence[Edit],
        records: Sequence[Record],
    ):
        check_counts(inputs.steps, inputs.steps, inputs.n_min)
        self.inputs, self.vae, self.edits = inputs, vae, edits
        order = [edits[one.prompt] for one in records]
        self.prompts = Prompts(inputs, clip, (text for edit in order for text in (edit.source, edit.target)))
        self.photograph: tuple[Source, Tensor] | None = None

    def draw(self, model: ModelPatcher, arm: EditArm, one: Record) -> Tensor:
        """(H, W, 3) of 0 to 1."""
        edit, inputs = self.edits[one.prompt], self.inputs
        guider = FlowEditGuider(model)
        source, target = self.prompts.positive(edit.source), self.prompts.positive(edit.target)
        guider.set_conds(source, self.prompts.negative, target, self.prompts.negative)
        guider.set_cfg(inputs.source_cfg, arm.target_cfg)
        sigmas = edit_sigmas(model, inputs.scheduler, inputs.steps, arm.n_max)
        latent = {"samples": self.latent(edit.photograph)}
        edited = edit_latent(guider, FlowEditSampler(inputs.n_min, inputs.n_avg), sigmas, latent, one.seed)
        return decoded_still(self.vae, edited["samples"])

    def latent(self, photograph: Source) -> Tensor:
        """(1, C, h, w); encoded once for all arms, which come one after the other."""
        if self.photograph is None or self.photograph[0] != photograph:
            image = sized(photograph, (self.inputs.width, self.inputs.height))
            pixels = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255)
            self.photograph = photograph, encode_image(self.vae, pixels, photograph.path.name)[None]
        return self.photograph[1]
