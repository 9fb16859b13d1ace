"""The autoencoder in TAESD's format: an encoder written down rather than trained, and a small trained decoder.

A latent pixel describes its own 8 x 8 patch: 13 principal components of the mask of things, then the mean colour.
TAESD's convolutions can compute that exactly, and training reads its latents from one matrix product. The decoder
is TAESD's without the last two blocks of its third stage.
"""

import torch
import torch.nn.functional as F

PATCH = 8
CHANNELS = 16
OUTLINE = 13  # latent channels that hold the mask; the last three hold the colour
BRIGHT, DEPTH = 0.80, 0.50  # the mask rises from 0 to 1 as the least of a pixel's channels falls from .80 to .30
PAPER, COLOUR_GAIN = 0.91, 3.0
SCALE, SHIFT = 1.5305, 0.0609  # ComfyUI's SD3 latent format: model = (latent - SHIFT) * SCALE
IDENTITY_BLOCKS = (14, 15)  # of TAESD's decoder
_QUARTERS = ((0, 0), (0, 1), (1, 0), (1, 1))
VAE_SCALE = 0.5  # keeps the decoder's input inside TAESD's clamp


def mask(images: torch.Tensor) -> torch.Tensor:
    """BHWC pictures -> (B, H, W): 1 in a thing, 0 in the background, between at an edge."""
    return ((BRIGHT - images.amin(-1)) / DEPTH).clamp(0, 1)


def patches(planes: torch.Tensor) -> torch.Tensor:
    """(B, H, W) -> (B, h, w, 64), each patch row by row."""
    b, height, width = planes.shape
    grid = planes.reshape(b, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.transpose(2, 3).reshape(b, height // PATCH, width // PATCH, PATCH * PATCH)


def encode(encoder: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """BHWC pictures in 0..1 -> latents (B, 16, h, w) as the diffusion model sees them."""
    outline = F.linear(patches(mask(images)), encoder["outline"]).movedim(-1, 1)
    colour = F.avg_pool2d(images.movedim(-1, 1), PATCH) - PAPER
    return torch.cat([outline, colour * COLOUR_GAIN], dim=1)


def taesd_encoder(encoder: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same map as weights of TAESD's encoder.

    The first block computes the mask: the least of three channels is a - relu(a - b), twice. Strided convolutions
    then sort 2 x 2 pixels into channels, and the last of them applies the matrix. A value that may be negative
    travels as two channels, itself and its negative, of which a ReLU keeps one.
    """
    sd: dict[str, torch.Tensor] = {}
    for index in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        sd |= _zero_block(f"{index}.")
    sd["0.weight"], sd["0.bias"] = _taps({(i, i): 1 for i in range(3)})[:, :3], torch.zeros(64)
    red, green, blue = range(3)
    sd["1.conv.0.weight"] = _taps({(0, red): 1, (1, red): 1, (1, green): -1, (2, blue): 1})  # r, relu(r - g), b
    sd["1.conv.2.weight"] = _taps({(0, 0): 1, (0, 1): -1, (1, 0): 1, (1, 1): -1, (1, 2): -1})  # a, relu(a - b)
    slope = 1 / DEPTH
    sd["1.conv.4.weight"] = _taps({(out, i): sign for out in (3, 4) for i, sign in ((0, -slope), (1, slope))})
    sd["1.conv.4.bias"][3:5] = torch.tensor([BRIGHT / DEPTH, BRIGHT / DEPTH - 1])  # relu(m), relu(m - 1)
    weight = torch.zeros(64, 64, 3, 3)
    for place, (row, column) in enumerate(_QUARTERS):
        for channel, source, sign in ((0, 0, 1), (1, 1, 1), (2, 2, 1), (3, 3, 1), (3, 4, -1)):
            weight[place * 4 + channel, source, 1 + row, 1 + column] = sign
    sd["2.weight"] = weight
    weight = torch.zeros(64, 64, 3, 3)
    for place, (row, column) in enumerate(_QUARTERS):
        weight[place * 16 : place * 16 + 16, :16, 1 + row, 1 + column] = torch.eye(16)
    sd["6.weight"] = weight
    # what arrives now is 2 x 2 places of 64 channels: half, quarter, plane
    outline = encoder["outline"].reshape(OUTLINE, *[2] * 6)  # out, y from the coarsest bit on, x likewise
    matrix = torch.zeros(CHANNELS, 2, 2, 4, 4, 4)  # out, place y, place x, half, quarter, plane
    for half, (y1, x1) in enumerate(_QUARTERS):
        for quarter, (y2, x2) in enumerate(_QUARTERS):
            matrix[:OUTLINE, :, :, half, quarter, 3] = outline[:, :, y1, y2, :, x1, x2]
            for channel in range(3):
                matrix[OUTLINE + channel, :, :, half, quarter, channel] = COLOUR_GAIN / PATCH**2
    weight = torch.zeros(64, 64, 3, 3)
    weight[:CHANNELS, :, 1:, 1:] = matrix.flatten(3).permute(0, 3, 1, 2)
    weight[CHANNELS : 2 * CHANNELS] = -weight[:CHANNELS]
    sd["10.weight"] = weight
    scale = VAE_SCALE / SCALE
    sd["14.weight"] = _taps({(i, i): scale for i in range(CHANNELS)} | {
        (i, i + CHANNELS): -scale for i in range(CHANNELS)
    })[:CHANNELS]  # fmt: skip
    sd["14.bias"] = torch.zeros(CHANNELS)
    sd["14.bias"][OUTLINE:] = -PAPER * COLOUR_GAIN * scale
    return sd


def _taps(entries: dict[tuple[int, int], float]) -> torch.Tensor:
    """A 64 -> 64 convolution of centre taps."""
    weight = torch.zeros(64, 64, 3, 3)
    for (out, source), value in entries.items():
        weight[out, source, 1, 1] = value
    return weight


def _zero_block(prefix: str) -> dict[str, torch.Tensor]:
    """A residual block that returns its (positive) input."""
    shapes = {"weight": (64, 64, 3, 3), "bias": (64,)}
    return {f"{prefix}conv.{i}.{name}": torch.zeros(shape) for i in (0, 2, 4) for name, shape in shapes.items()}


def checkpoint_tensors(encoder: dict[str, torch.Tensor], decoder: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The whole autoencoder under the names of a TAESD file."""
    sd = {f"taesd_encoder.{key}": value for key, value in taesd_encoder(encoder).items()}
    sd |= {f"taesd_decoder.{key}": value for key, value in decoder.items()}
    for index in IDENTITY_BLOCKS:
        sd |= _zero_block(f"taesd_decoder.{index}.")
    return sd | {"vae_scale": torch.tensor(VAE_SCALE), "vae_shift": torch.tensor(SHIFT)}
