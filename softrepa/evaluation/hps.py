"""HPSv2, by open_clip."""

from pathlib import Path

import open_clip
import torch

from .pictures import Judge, Picture


class HumanPreferenceScore(Judge):
    """Cosine of the angle between prompt and picture by a CLIP that was trained on people's rankings: arXiv 2306.09341.

    `architecture` is open_clip's name of it.
    """

    def __init__(self, checkpoint: Path, device: torch.device, architecture: str = "ViT-H-14"):
        self.model, _, self.prepare = open_clip.create_model_and_transforms(
            architecture, pretrained=str(checkpoint), device=device, weights_only=True
        )
        self.model.train(False)
        self.tokens = open_clip.get_tokenizer(architecture)
        self.device = device

    @torch.inference_mode()
    def __call__(self, pictures: list[Picture]) -> list[float]:
        pixels = torch.stack([self.prepare(picture.image()) for picture in pictures]).to(self.device)
        texts = self.tokens([picture.prompt for picture in pictures]).to(self.device)
        seen = self.model.encode_image(pixels, normalize=True)
        read = self.model.encode_text(texts, normalize=True)
        return (seen * read).sum(-1).tolist()
