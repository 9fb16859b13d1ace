"""Synthetic files of the shapes and pickling that SoftREPA and AGSM publish."""

from pathlib import Path

import torch

SHAPES = {
    "sd15": ((4, 768), (100, 768)),
    "sdxl": ((4, 2048), None),
    "sd3": ((5, 4, 1536), (100, 7680)),
}


def write(folder: Path, family: str, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor | None]:
    """dc_tokens.pth (a parameter) and dc_t_tokens.pth (a whole pickled embedding module)."""
    folder.mkdir(parents=True, exist_ok=True)
    shape, table_shape = SHAPES[family]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(shape, generator=generator) * scale
    torch.save(torch.nn.Parameter(tokens.clone()), folder / "dc_tokens.pth")
    if table_shape is None:
        return tokens, None
    embedding = torch.nn.Embedding(*table_shape)
    embedding.weight.data = torch.randn(table_shape, generator=generator) * scale
    torch.save(embedding, folder / "dc_t_tokens.pth")
    return tokens, embedding.weight.detach()


def write_agsm(folder: Path, shape: tuple[int, ...]) -> torch.Tensor:
    """soft_tokens.pth with a positive and a negative bank in front."""
    folder.mkdir(parents=True, exist_ok=True)
    banks = torch.randn((2, *shape), generator=torch.Generator().manual_seed(1))
    torch.save(torch.nn.Parameter(banks.clone()), folder / "soft_tokens.pth")
    return banks
