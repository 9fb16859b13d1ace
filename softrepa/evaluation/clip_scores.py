"""CLIP score and PickScore, by transformers."""

from pathlib import Path

import torch
from transformers import CLIPModel, CLIPProcessor
from transformers.utils import logging

from .pictures import Judge, Picture

LONGEST = 77
"""Tokens that CLIP reads of a prompt."""


class ClipScore(Judge):
    """Cosine of the angle between prompt and picture, as in the paper's tables (not times 100).

    Hessel et al., arXiv 2104.08718, without its factor and floor.
    """

    def __init__(self, folder: Path, device: torch.device):
        logging.disable_progress_bar()
        self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self.model = CLIPModel.from_pretrained(folder, local_files_only=True).train(False).to(device)
        self.device = device

    def notes(self, prompts: list[str]) -> list[str]:
        lengths = map(len, self.processor.tokenizer(sorted(set(prompts))).input_ids)
        cut = sum(length > LONGEST for length in lengths)
        return [f"{cut:,} prompts are longer than the {LONGEST} tokens that it reads"] if cut else []

    @torch.inference_mode()
    def __call__(self, pictures: list[Picture]) -> list[float]:
        prompts = [picture.prompt for picture in pictures]
        given = self.processor(
            text=prompts,
            images=[picture.image() for picture in pictures],
            padding=True,
            truncation=True,
            max_length=LONGEST,
            return_tensors="pt",
        ).to(self.device)
        found = self.model(**given)  # its embeddings have length 1
        return (self.factor() * (found.text_embeds * found.image_embeds).sum(-1)).tolist()

    def factor(self) -> float:
        return 1.0


class PickScore(ClipScore):
    """The same, by a model that was trained on people's choices, times its temperature: arXiv 2305.01569."""

    def factor(self) -> float:
        return self.model.logit_scale.exp().item()
