"""Small judges with random weights, in the file formats of the real ones."""

import json
from pathlib import Path

import torch
from PIL import Image

WORDS = ["a", "red", "green", "blue", "cat", "dog", "house", "on", "the", "hill"]


def clip_folder(folder: Path, seed: int = 0) -> Path:
    """A CLIP as transformers saves it: model, tokenizer, image processor."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    torch.manual_seed(seed)
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *"abcdefghijklmnopqrstuvwxyz"]
    vocabulary += [f"{letter}</w>" for letter in "abcdefghijklmnopqrstuvwxyz"]
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    config = CLIPConfig(
        text_config={
            **size,
            **ends,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 77,
            "projection_dim": 16,
        },
        vision_config={**size, "image_size": 32, "patch_size": 8, "projection_dim": 16},
        projection_dim=16,
    )
    CLIPModel(config).save_pretrained(folder)
    pieces = folder / "pieces"
    pieces.mkdir()
    (pieces / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(vocabulary)}))
    (pieces / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer.from_pretrained(pieces)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def vit_folder(folder: Path) -> Path:
    """A ViT as transformers saves it."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTModel(ViTConfig(**size, image_size=224, patch_size=16)).save_pretrained(folder)
    return folder


def photograph(path: Path, seed: int, size: tuple[int, int] = (48, 48)) -> Path:
    noise = torch.randint(0, 256, (6, 6, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise.numpy()).resize(size, Image.Resampling.BICUBIC).save(path)
    return path
