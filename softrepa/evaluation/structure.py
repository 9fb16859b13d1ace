"""Structure distance, by a DINO ViT of transformers."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import ViTModel
from transformers.utils import logging

from .pictures import Judge, Picture, as_tensor

SHORTER, LONGEST = 224, 480
"""Pixels of the sides at which pictures are compared."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class StructureDistance(Judge):
    """How far the layout of a picture is from that of its photograph, whatever the colours and surfaces.

    Mean squared difference of the cosine similarities of all pairs of patches, by the keys of the last layer: Splice,
    arXiv 2201.00424; sizes as in PIE-Bench, arXiv 2310.01506. There it is given times 1000.
    """

    def __init__(self, folder: Path, device: torch.device):
        logging.disable_progress_bar()
        logging.set_verbosity_error()  # a layer that is not used is told of otherwise
        self.model = (
            ViTModel.from_pretrained(folder, local_files_only=True, add_pooling_layer=False).train(False).to(device)
        )
        keys = [one for name, one in self.model.named_modules() if name.endswith((".k_proj", ".key"))]
        keys[-1].register_forward_hook(lambda _, __, found: setattr(self, "keys", found))
        self.keys = torch.empty(0)
        self.device = device

    @torch.inference_mode()
    def __call__(self, pictures: list[Picture]) -> list[float]:
        return [self._distance(picture) for picture in pictures]

    def _distance(self, picture: Picture) -> float:
        one, other = (self.similarities(image) for image in (picture.image(), picture.photograph()))
        return (one - other).square().mean().item()

    def similarities(self, image: Image.Image) -> Tensor:
        """(tokens, tokens) cosines of the keys."""
        factor = min(SHORTER / min(image.size), LONGEST / max(image.size))
        width, height = (round(side * factor) for side in image.size)
        pixels = as_tensor(image.resize((width, height), Image.Resampling.BILINEAR)).to(self.device).float() / 255
        mean, deviation = (pixels.new_tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
        self.model((pixels - mean)[None] / deviation, interpolate_pos_encoding=True)
        keys = torch.nn.functional.normalize(self.keys[0], dim=-1)
        return keys @ keys.T
