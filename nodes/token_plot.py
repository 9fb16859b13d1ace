"""A picture of soft tokens: norms by layer and timestep, similarity of the rows."""

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ..softrepa.charts import TEXT, TITLE, Theme, as_image
from ..softrepa.tokens import BUCKETS, SoftTokens

LEFT, TOP, PANEL, RIGHT, BOTTOM = 70, 120, 440, 150, 60
# Viridis (matplotlib, CC0) at five points; linear in between.
RAMP = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=float)


def draw(tokens: SoftTokens, theme: Theme) -> torch.Tensor:
    """An IMAGE (1, H, W, 3)."""
    norms, time_axis = norm_map(tokens)
    image = Image.new("RGB", (2 * (LEFT + PANEL + RIGHT), TOP + PANEL + BOTTOM), theme.paper)
    canvas = ImageDraw.Draw(image)
    title = f"{tokens.family.title}, {tokens.layers} x {tokens.count} tokens of width {tokens.width}: {tokens.name}"
    canvas.text((16, 12), title, theme.ink, ImageFont.load_default(TITLE))
    across = "timestep 0 ... 999, mean of tokens" if time_axis else "token (no time table)"
    heatmap(image, (LEFT, TOP), norms, "norm by layer", across, theme)
    rows = tokens.tokens.reshape(-1, tokens.width)
    unit = torch.nn.functional.normalize(rows, dim=-1)
    similarity = (unit @ unit.T).numpy()
    corner = (LEFT + PANEL + RIGHT + LEFT, TOP)
    heatmap(image, corner, similarity, "cosine similarity", "row, by layer", theme, bounds=(-1.0, 1.0))
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


def heatmap(image, corner, values: np.ndarray, title: str, across: str, theme: Theme, bounds=None) -> None:
    """A square panel with its title, axes and colour bar."""
    low, high = bounds or (float(values.min()), float(values.max()))
    scaled = (values - low) / (high - low) if high > low else np.full_like(values, 0.5)
    x, y = corner
    image.paste(Image.fromarray(colour(scaled)).resize((PANEL, PANEL), Image.Resampling.NEAREST), corner)
    bar = colour(np.linspace(1, 0, 64)[:, None])
    image.paste(Image.fromarray(bar).resize((14, PANEL), Image.Resampling.BILINEAR), (x + PANEL + 10, y))
    canvas, font = ImageDraw.Draw(image), ImageFont.load_default(TEXT)
    canvas.rectangle((x - 1, y - 1, x + PANEL, y + PANEL), outline=theme.muted)
    canvas.text((x, y - TEXT - 14), title, theme.ink, font)
    canvas.text((x, y + PANEL + 8), across, theme.muted, font)
    canvas.text((x + PANEL + 32, y), f"{high:.3g}", theme.muted, font)
    canvas.text((x + PANEL + 32, y + PANEL), f"{low:.3g}", theme.muted, font, anchor="ls")
    count = len(values)
    for row in range(0, count, max(1, -(-count // 6))):
        canvas.text((x - 12, y + (row + 0.5) * PANEL / count), str(row), theme.muted, font, anchor="rm")


def colour(values: np.ndarray) -> np.ndarray:
    """0..1 -> uint8 RGB along the ramp."""
    at = np.clip(values, 0, 1) * (len(RAMP) - 1)
    index = np.minimum(at.astype(int), len(RAMP) - 2)
    share = (at - index)[..., None]
    return (RAMP[index] * (1 - share) + RAMP[index + 1] * share).astype(np.uint8)
