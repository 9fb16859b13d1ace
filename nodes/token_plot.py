"""A picture of soft tokens: norms by layer and timestep, similarity of the rows."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..softrepa.charts import INK, MUTED, PAPER, as_image
from ..softrepa.tokens import BUCKETS, SoftTokens

MARGIN, PANEL, GAP = 64, 360, 110
# Viridis (matplotlib, CC0) at five points; linear in between.
RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)


def draw(tokens: SoftTokens) -> torch.Tensor:
    """An IMAGE (1, H, W, 3)."""
    norms, time_axis = norm_map(tokens)
    image = Image.new("RGB", (2 * (MARGIN + PANEL) + GAP + 90, PANEL + 2 * MARGIN + 20), PAPER)
    canvas = ImageDraw.Draw(image)
    title = f"{tokens.family.title}, {tokens.layers} x {tokens.count} tokens of width {tokens.width}: {tokens.name}"
    canvas.text((MARGIN, 16), title, INK, ImageFont.load_default(18))
    across = "timestep 0 ... 999 (mean over tokens)" if time_axis else "token (no time table: static)"
    heatmap(image, (MARGIN, MARGIN + 14), norms, "norm", across, "layer")
    rows = tokens.tokens.reshape(-1, tokens.width)
    unit = torch.nn.functional.normalize(rows, dim=-1)
    similarity = (unit @ unit.T).numpy()
    corner = (MARGIN + PANEL + GAP, MARGIN + 14)
    heatmap(image, corner, similarity, "cosine similarity", "row (layer-major)", "row", bounds=(-1.0, 1.0))
    return as_image(image)


def norm_map(tokens: SoftTokens) -> tuple[np.ndarray, bool]:
    """Mean norm over the m rows, (L, 100), or each row's own, (L, m), without a time table."""
    if tokens.is_text_width and tokens.time_table is not None:
        # the rows pass through the model's embedder first, so only the table can be shown over time
        parts = tokens.time_table.unflatten(1, (tokens.layers, -1))
        return parts.norm(dim=-1).T.numpy(), True
    if tokens.time_table is None:
        return tokens.at(torch.zeros(1))[0].norm(dim=-1).numpy(), False
    return tokens.at(torch.arange(BUCKETS) * 10).norm(dim=-1).mean(dim=-1).T.numpy(), True


def heatmap(image, corner, values: np.ndarray, title: str, across: str, down: str, bounds=None) -> None:
    """A square panel with its title, axes and colour bar."""
    low, high = bounds or (float(values.min()), float(values.max()))
    scaled = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    x, y = corner
    image.paste(Image.fromarray(colour(scaled)).resize((PANEL, PANEL), Image.Resampling.NEAREST), corner)
    bar = colour(np.linspace(1, 0, 64)[:, None])
    image.paste(Image.fromarray(bar).resize((14, PANEL), Image.Resampling.BILINEAR), (x + PANEL + 10, y))
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    canvas.rectangle((x - 1, y - 1, x + PANEL, y + PANEL), outline=MUTED)
    canvas.text((x, y - 20), title, INK, font)
    canvas.text((x, y + PANEL + 8), across, MUTED, font)
    canvas.text((x + PANEL + 28, y - 4), f"{high:.3g}", MUTED, font)
    canvas.text((x + PANEL + 28, y + PANEL - 12), f"{low:.3g}", MUTED, font)
    count = len(values)
    for row in range(0, count, max(1, count // 10)):
        canvas.text((x - 22, y + (row + 0.5) * PANEL / count - 7), str(row), MUTED, font)
    canvas.text((x - 44, y - 20), down, MUTED, font)


def colour(values: np.ndarray) -> np.ndarray:
    """0..1 -> uint8 RGB along the ramp."""
    at = np.clip(values, 0, 1) * (len(RAMP) - 1)
    index = np.minimum(at.astype(int), len(RAMP) - 2)
    share = (at - index)[..., None]
    return (RAMP[index] * (1 - share) + RAMP[index + 1] * share).astype(np.uint8)
