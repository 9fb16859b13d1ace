"""Pictures on disk as judges want them."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..data.images import UNREADABLE, decode, prepared
from ..data.sources import Source, WholeFile, content_identity
from ..errors import SoftREPAError, said, shown

MOST_BYTES = 2**28


class Judge:
    """Gives each picture a score, to `batch` of them at once."""

    batch = 8

    def __call__(self, pictures: list["Picture"]) -> list[float]:
        raise NotImplementedError

    def notes(self, prompts: list[str]) -> list[str]:
        """What a reader of their scores should know."""
        return []


@dataclass(frozen=True)
class Picture:
    """A drawn picture, what it should show, and the photograph it is compared with where there is one."""

    path: Path
    prompt: str
    reference: Source | None = None

    def image(self) -> Image.Image:
        """In RGB. Raises SoftREPAError, as `photograph`."""
        try:
            return decode(WholeFile(self.path).read(MOST_BYTES))
        except UNREADABLE as error:
            raise unreadable(self.path, error) from None

    def photograph(self) -> Image.Image:
        """The reference, resized and cropped in the middle to the size of the picture."""
        assert self.reference is not None  # who asks for it has checked
        return sized(self.reference, self.image().size)


def sized(source: Source, size: tuple[int, int]) -> Image.Image:
    """A photograph at (width, height): resized, and cropped in the middle. Raises SoftREPAError."""
    try:
        pixels = prepared(source.read(MOST_BYTES), size)
    except UNREADABLE as error:
        raise unreadable(source.path, error) from None
    return Image.fromarray((255 * pixels).round().byte().numpy())


def photograph_key(source: Source | None) -> str:
    """Which photograph: another one under the same name has another key. Raises SoftREPAError."""
    if source is None:
        return ""
    try:
        return content_identity(source, MOST_BYTES)
    except UNREADABLE as error:
        raise unreadable(source.path, error) from None


def unreadable(path: Path, error: Exception) -> SoftREPAError:
    reason = said(error) if isinstance(error, OSError) else shown(error)
    return SoftREPAError(f'Picture "{shown(path)}" cannot be read ({reason}), expected an image.')


def as_tensor(image: Image.Image) -> Tensor:
    """(3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_png(image: Image.Image) -> bytes:
    file = BytesIO()
    image.save(file, "PNG")
    return file.getvalue()
