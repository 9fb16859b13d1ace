"""FID and LPIPS, by torchmetrics."""

import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchmetrics.functional.image.lpips import _LPIPS
from torchmetrics.image.fid import FrechetInceptionDistance

from .pictures import Judge, Picture, as_tensor
from .weights import put, read_weights

FEATURES = 2048
SLICE = re.compile(r"slices?\.?\d+\.")


class PerceptualDistance(Judge):
    """LPIPS of a picture to its photograph: arXiv 1801.03924. 0 is the same picture.

    The backbone's weights are those of torchvision's `net`, alex, squeeze or vgg; the weights of its layers come with
    torchmetrics. `side`: both are resized to a square of so many pixels, as the paper does for text to image.
    """

    def __init__(self, weights: Path, device: torch.device, net: str = "vgg", side: int | None = None):
        self.net = _LPIPS(net=net, pnet_rand=True)  # the public class downloads a backbone
        put("metrics lpips", weights, self.net.net, _slices(self.net.net, read_weights("metrics lpips", weights)))
        self.net.to(device)
        self.device, self.side = device, side

    @torch.inference_mode()
    def __call__(self, pictures: list[Picture]) -> list[float]:
        return [self._distance(picture) for picture in pictures]

    def _distance(self, picture: Picture) -> float:
        pair = (self._pixels(picture.image()), self._pixels(picture.photograph()))
        return self.net(*pair, normalize=True).item()

    def _pixels(self, image: Image.Image) -> Tensor:
        if self.side is not None:
            image = image.resize((self.side, self.side), Image.Resampling.BILINEAR)
        return as_tensor(image).to(self.device).float()[None] / 255


def _slices(backbone: torch.nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's `features.3.weight` under the name that torchmetrics has for it: `slice2.3.weight`."""
    names = {name: SLICE.sub("", name) for name in backbone.state_dict()}
    return {name: weights[key] for name, own in names.items() if (key := f"features.{own}") in weights}


class FrechetDistance:
    """FID of all pictures of an arm to all photographs: arXiv 1706.08500. Smaller is nearer.

    Inception as it was converted from TensorFlow, resized without antialiasing, as the paper's pytorch-fid has it.
    """

    def __init__(self, weights: Path, device: torch.device):
        found = read_weights("metrics fid", weights)
        with tempfile.TemporaryDirectory() as folder:
            copied = Path(folder) / "inception.pth"  # torch-fidelity unpickles what it reads: this is ours
            torch.save(found, copied)
            self.metric = FrechetInceptionDistance(
                feature=FEATURES, feature_extractor_weights_path=str(copied), antialias=False, reset_real_features=False
            )
        self.metric.to(device)
        self.device = device

    @torch.inference_mode()
    def photographs(self, images: Iterable[Image.Image]) -> None:
        """Must come before any arm."""
        self._update(images, real=True)

    @torch.inference_mode()
    def distance(self, images: Iterable[Image.Image]) -> float:
        self.metric.reset()
        self._update(images, real=False)
        return self.metric.compute().item()

    def _update(self, images: Iterable[Image.Image], real: bool) -> None:
        for image in images:
            self.metric.update(as_tensor(image)[None].to(self.device), real=real)
