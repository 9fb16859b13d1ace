"""Image files as upright RGB, cropped to the training size the way the reference does it."""

import struct
import zlib
from io import BytesIO
from typing import cast

import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

PREPARATION = 1
"""Counted up when the same file would give other pixels: cached encodings are keyed by it."""

UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, SyntaxError, EOFError, MemoryError, TypeError, KeyError)
UNREADABLE += (struct.error, zlib.error, Image.DecompressionBombError)
"""What PIL raises on files that are cut, damaged, foreign or oversized."""

ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) as seen, after reading the whole file. Raises one of UNREADABLE."""
    with Image.open(BytesIO(data)) as image:
        _check(image)
        width, height = image.size
        sideways = image.getexif().get(ORIENTATION) in SIDEWAYS
        image.draft(None, (1, 1))  # JPEG: every byte is read, few pixels are computed
        image.load()
    return (height, width) if sideways else (width, height)


def decode(data: bytes) -> Image.Image:
    """The picture upright, in 8-bit RGB, transparent parts over white. Raises one of UNREADABLE."""
    with Image.open(BytesIO(data)) as file:
        _check(file)
        image = ImageOps.exif_transpose(file)
        profile = file.info.get("icc_profile")
    if image.mode.startswith("I"):  # 16 bits in grey; PIL cuts 16-bit colour to 8 itself
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode == "CMYK" and profile:
        return _through_profile(image, profile)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def prepared(data: bytes, size: tuple[int, int]) -> Tensor:
    """Pixels (height, width, 3) float32 in 0..1 at `size` (width, height).

    The shorter side is resized (bicubic) so that the size is covered, and the centre is cut out of the rest: for a
    square the arithmetic of torchvision's Resize and CenterCrop.
    """
    image = decode(data)
    target_width, target_height = size
    width, height = image.size
    if target_width * height >= target_height * width:
        covering = target_width, height * target_width // width
    else:
        covering = width * target_height // height, target_height
    image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (round((have - want) / 2) for have, want in zip(covering, size, strict=True))
    image = image.crop((left, top, left + target_width, top + target_height))
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(target_height, target_width, 3).float() / 255


def _check(image: Image.Image) -> None:
    if getattr(image, "is_animated", False) and image.format != "MPO":  # an MPO is a photo with previews behind it
        raise ValueError(f"{getattr(image, 'n_frames', 'several')} frames or pages")
    if image.mode == "F":
        raise ValueError("float pixels")


def _through_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """CMYK by its own profile: the plain formula makes neon colours of print inks."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return cast(Image.Image, converted)  # None is only given for a change in place
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
