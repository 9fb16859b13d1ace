"""Image files as upright RGB, cropped to the training size the way the reference does it."""

import struct
import zlib
from functools import cache
from io import BytesIO
from typing import IO, cast

import torch
from PIL import Image, ImageCms, ImageOps
from torch import Tensor

PREPARATION = 1
"""Counted up when the same file would give other pixels: cached encodings are keyed by it."""

UNREADABLE: tuple[type[Exception], ...] = (OSError, ValueError, SyntaxError, EOFError, MemoryError, TypeError, KeyError)
UNREADABLE += (IndexError, RuntimeError, OverflowError, struct.error, zlib.error, Image.DecompressionBombError)
"""What PIL raises on files that are cut, damaged, foreign or oversized."""

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "BMP", "TIFF", "GIF", "TGA", "PPM", "JPEG2000", "HEIF", "JXL")
"""What a file may be whatever its name says. PIL knows others that start programs, as EPS does Ghostscript."""

NARROWEST = 16
"""Longer side to shorter side: of a longer strip hardly anything would be seen."""

FAR = 4
"""Of a picture that is longer than its training size by this factor, the ends are cut off before it is resized."""

ORIENTATION = 0x0112
SIDEWAYS = (5, 6, 7, 8)
"""EXIF orientations that swap width and height."""

BITS, PHOTOMETRIC = 258, 262
"""Tags of a TIFF."""


def upright_size(file: IO[bytes], whole: bool) -> tuple[int, int]:
    """(width, height) as seen; after reading the `whole` file, or no more of it than its head. Raises UNREADABLE."""
    with _opened(file) as image:
        width, height = image.size
        sideways = image.getexif().get(ORIENTATION) in SIDEWAYS
        if whole:
            image.draft(None, (1, 1))  # JPEG: every byte is read, few pixels are computed
            image.load()
    return (height, width) if sideways else (width, height)


def decode(data: bytes) -> Image.Image:
    """The picture upright, in 8-bit RGB, transparent parts over white. Raises one of UNREADABLE."""
    with _opened(BytesIO(data)) as file:
        image = ImageOps.exif_transpose(file)
        profile = file.info.get("icc_profile")
        white, is_inverted = _grey_levels(file)
    if image.mode.startswith("I"):  # more than 8 bits in grey; PIL cuts colour to 8 itself
        factor, offset = (-255 / white, 255.5) if is_inverted else (255 / white, 0.5)
        return image.convert("I").point(lambda value: value * factor + offset).convert("L").convert("RGB")
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
    image = _without_far_ends(decode(data), size)
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


def _without_far_ends(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The middle of a strip: what would be cut off anyway need not be enlarged before."""
    width, height = image.size
    kept_width = min(width, FAR * max(1, height * size[0] // size[1]))
    kept_height = min(height, FAR * max(1, width * size[1] // size[0]))
    left, top = (width - kept_width) // 2, (height - kept_height) // 2
    return image.crop((left, top, left + kept_width, top + kept_height))


@cache
def _formats() -> list[str]:
    """Those of FORMATS that are installed."""
    Image.init()
    return [one for one in FORMATS if one in Image.OPEN]


def _opened(file: IO[bytes]) -> Image.Image:
    """One still picture of a format and of pixels that are read right. Raises one of UNREADABLE."""
    image = Image.open(file, formats=_formats())
    if getattr(image, "is_animated", False) and image.format != "MPO":  # an MPO is a photo with previews behind it
        raise ValueError("several frames or pages")
    if image.mode == "F":
        raise ValueError("float pixels")
    if image.format == "TIFF" and image.mode == "I":  # signed, or of 32 bits: nobody says what is white
        raise ValueError("pixels of signed or of 32-bit numbers")
    if max(image.size) > NARROWEST * min(image.size):
        raise ValueError(f"a strip whose sides are over {NARROWEST}:1")
    return image


def _grey_levels(file: Image.Image) -> tuple[int, bool]:
    """The number that is white where a grey pixel has more than 8 bits, and whether it is black instead."""
    tags = getattr(file, "tag_v2", {})  # of a TIFF
    bits = tags.get(BITS, (16,))[0]
    return 2**bits - 1, tags.get(PHOTOMETRIC) == 0


def _through_profile(image: Image.Image, profile: bytes) -> Image.Image:
    """CMYK by its own profile: the plain formula makes neon colours of print inks."""
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
        return cast(Image.Image, converted)  # None is only given for a change in place
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
