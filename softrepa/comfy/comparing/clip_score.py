"""CLIP as a judge: the cosine between what a CLIP vision model sees and what the text model of the same CLIP reads."""

import comfy.model_management as memory
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.sd import CLIP
from torch import Tensor, nn

from ...comparing.judging import Compared, Scorer
from ...comparing.records import Record
from ...errors import SoftREPAError
from ...statistics import Unit
from ..identity import clip_identity, vision_identity

PROJECTION = "text_projection"
LEAST_SPREAD = 1e-3
"""Standard deviation of a text projection's weights: CLIP's own are 0.02 and more."""


class CLIPJudge:
    title = "CLIP score"
    unit = Unit()

    def __init__(self, clip: CLIP, clip_vision: ClipVisionModel):
        self.clip, self.vision = clip, clip_vision

    def check(self, compared: Compared) -> None:
        """Both halves must end in one space, as those of one CLIP do."""
        text = self.text("a photograph")
        image = self.image(torch.full((1, 64, 64, 3), 0.5))
        if text.shape[-1] != image.shape[-1]:
            raise SoftREPAError(
                f"The CLIP judge has a text model of width {text.shape[-1]} and a vision model of width "
                f"{image.shape[-1]}, expected both of one CLIP: clip_l.safetensors with a ViT-L vision model, say."
            )

    def key(self, compared: Compared) -> str:
        return f"{clip_identity(self.clip)} {vision_identity(self.vision)}"

    def note(self) -> str:
        return "cosine of picture and prompt"

    def opened(self, compared: Compared) -> Scorer:
        known: dict[str, Tensor] = {}

        def score(one: Record, picture: Tensor) -> float:
            memory.throw_exception_if_processing_interrupted()
            if one.text not in known:
                known.clear()  # pictures of a prompt come together
                known[one.text] = self.text(one.text)
            return torch.cosine_similarity(self.image(picture), known[one.text]).item()

        return score

    def text(self, prompt: str) -> Tensor:
        """(1, width), projected here: of a text model alone ComfyUI gives the pooled output as it is before.

        Raises SoftREPAError for a text encoder that has no such thing.
        """
        tokens = self.clip.tokenize(prompt, disable_weights=True)
        pooled = self.clip.encode_from_tokens(tokens, return_pooled="unprojected")[1]
        width = 0 if pooled is None else pooled.shape[-1]
        projection = self._projection(width)
        if projection is None:
            raise SoftREPAError(
                f"The CLIP judge has a text encoder with a pooled output of width {width} and no projection for it, "
                "expected one CLIP text model, such as clip_l.safetensors in Load CLIP."
            )
        check_weights(projection.get_parameter("weight"))
        return projection(pooled.float().to(self.clip.patcher.load_device)).float().to(pooled.device)

    def image(self, picture: Tensor) -> Tensor:
        """(1, width), projected."""
        return self.vision.encode_image(picture)["image_embeds"].float()

    def _projection(self, width: int) -> nn.Module | None:
        modules = self.clip.cond_stage_model.named_modules()
        found = (module for name, module in modules if name.endswith(PROJECTION))
        return next((one for one in found if one.weight is not None and one.weight.shape[1] == width), None)


def check_weights(weight: Tensor) -> None:
    """Checkpoints leave the projection out, for no picture needs it; ComfyUI then has memory as it found it."""
    weight = weight.float().cpu()
    spread = weight.std().item()
    if not weight.isfinite().all() or spread < LEAST_SPREAD or torch.equal(weight, torch.eye(*weight.shape)):
        raise SoftREPAError(
            f"The CLIP judge has a text model without its projection (weights of spread {spread:.2g}), expected a file "
            "with it, such as clip_l.safetensors in Load CLIP; checkpoints leave it out."
        )
