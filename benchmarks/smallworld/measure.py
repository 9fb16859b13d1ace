"""Measures the model as a user meets it: stock nodes of a real ComfyUI, the checker's verdict, 95% intervals."""

import json
import math
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from softrepa.files import write_atomically
from softrepa.smallworld.autoencoder import encode
from softrepa.smallworld.checkpoint import CHECKPOINT_NAME, read_shipped, write_checkpoint
from softrepa.smallworld.text import FastEncoder
from softrepa.smallworld.world import (
    CATEGORIES,
    IMAGE_SIZE,
    Spec,
    draw,
    hard_negatives,
    plain_caption,
    random_scene,
    random_spec,
)

from . import checker, flux, model

SAMPLING = {"steps": 20, "cfg": 2.0, "sampler_name": "euler", "scheduler": "simple"}
IMAGES_A_PROMPT = 4
HARD_CATEGORIES = ("counting", "position", "colour_attribution")
SIGMAS = (0.5, 0.7, 0.8, 0.9, 0.95)


def wilson(right: int, total: int) -> tuple[float, float]:
    """95% score interval of a share."""
    z = 1.96
    centre = (right + z * z / 2) / (total + z * z)
    half = z * math.sqrt(right * (total - right) / total + z * z / 4) / (total + z * z)
    return centre - half, centre + half


def share(verdicts: list[bool]) -> dict:
    right, total = int(sum(verdicts)), len(verdicts)
    low, high = wilson(right, total)
    return {"right": right, "of": total, "share": round(right / total, 4), "ci95": [round(low, 4), round(high, 4)]}


def prompts(count: int, seed: int = 2026) -> list[tuple[str, Spec]]:
    """`count` prompts (category, spec), the categories in turn."""
    rng = np.random.default_rng(seed)
    names = [CATEGORIES[i % len(CATEGORIES)] for i in range(count)]
    return [(name, random_spec(rng, name)) for name in names]


class StockModel:
    """The checkpoint behind ComfyUI's own nodes, in this process; with the network of another one where named."""

    def __init__(self, folder: Path, network: str = "model"):
        import folder_paths

        import nodes

        checkpoint = folder / CHECKPOINT_NAME
        if not checkpoint.exists():
            write_checkpoint(checkpoint)
        folder_paths.add_model_folder_path("checkpoints", str(folder), is_default=True)
        self.nodes = nodes
        self.model, self.clip, self.vae = nodes.CheckpointLoaderSimple().load_checkpoint(CHECKPOINT_NAME)
        if network == "flux":
            flux.write_checkpoint(folder / flux.CHECKPOINT_NAME)
            self.model, _, self.vae = nodes.CheckpointLoaderSimple().load_checkpoint(flux.CHECKPOINT_NAME)
        self.vae.first_stage_model.to(memory_format=torch.channels_last)  # its convolutions take two thirds of the time
        self.negative = self.encode("")
        self._encoded: dict = {}  # a study draws the same prompts again and again; 1.3 MB each

    @torch.inference_mode()
    def encode(self, text: str):
        return self.nodes.CLIPTextEncode().encode(self.clip, text)[0]

    def encode_all(self, texts: list[str]):
        """A conditioning with a text for each picture of a batch."""
        self._encoded |= {text: self.encode(text) for text in texts if text not in self._encoded}
        parts = [self._encoded[text][0] for text in texts]
        pooled = torch.cat([extra["pooled_output"] for _, extra in parts])
        return [[torch.cat([context for context, _ in parts]), {"pooled_output": pooled}]]

    @torch.inference_mode()
    def pictures(self, text: str, count: int, seed: int) -> np.ndarray:
        """`count` pictures of one prompt, float32 BHWC."""
        latent = {"samples": torch.zeros(count, 16, IMAGE_SIZE // 8, IMAGE_SIZE // 8)}
        out = self.nodes.KSampler().sample(
            self.model, seed, positive=self.encode(text), negative=self.negative, latent_image=latent, **SAMPLING
        )[0]
        return self.nodes.VAEDecode().decode(self.vae, out)[0].float().clamp(0, 1).cpu().numpy()


def measure_pictures(stock: StockModel, images: int) -> tuple[dict, Image.Image]:
    """The share of prompts drawn right by category, of single facts, of clean things; and a contact sheet."""
    prompt_right, fact_right, clean = defaultdict(list), defaultdict(list), []
    sheet = defaultdict(list)
    for number, (category, spec) in enumerate(prompts(math.ceil(images / IMAGES_A_PROMPT))):
        text = plain_caption(spec)
        for picture in stock.pictures(text, IMAGES_A_PROMPT, seed=number):
            found = checker.find(picture)
            verdict = checker.facts(found, spec)
            prompt_right[category].append(all(verdict.values()))
            for fact, holds in verdict.items():
                fact_right[fact].append(holds)
            clean += [thing.shape is not None and thing.colour is not None for thing in found]
            if len(sheet[category]) < 12:
                sheet[category].append((picture, text, prompt_right[category][-1]))
    hard = [verdict for category in HARD_CATEGORIES for verdict in prompt_right[category]]
    report = {
        "prompts": {category: share(prompt_right[category]) for category in CATEGORIES},
        "counting, position and colour_attribution prompts together": share(hard),
        "facts": {fact: share(verdicts) for fact, verdicts in fact_right.items()},
        "things drawn cleanly": share(clean),
    }
    return report, contact_sheet([sheet[category] for category in CATEGORIES])


def contact_sheet(rows: list[list[tuple[np.ndarray, str, bool]]]) -> Image.Image:
    """Pictures with their prompts; a wrong one's prompt is red."""
    height = IMAGE_SIZE + 26
    sheet = Image.new("RGB", (max(map(len, rows)) * IMAGE_SIZE, len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for y, row in enumerate(rows):
        for x, (picture, text, right) in enumerate(row):
            sheet.paste(Image.fromarray((picture * 255).round().astype(np.uint8)), (x * IMAGE_SIZE, y * height))
            half = text.rfind(" ", 0, 18) if len(text) > 17 else len(text)
            lines = f"{text[:half]}\n{text[half + 1 :]}"
            pen.text((x * IMAGE_SIZE + 2, y * height + IMAGE_SIZE), lines, "black" if right else "red", font_size=9)
    return sheet


def trained(network: str, text: FastEncoder) -> model.Velocity | flux.Velocity:
    """The network called "model" or "flux" as training runs it."""
    kind, weights = (flux, flux.read()) if network == "flux" else (model, read_shipped()["model"])
    module = kind.make_model()
    module.load_state_dict(weights, strict=False)
    return kind.Velocity(module, text)


def measure_retrieval(text: FastEncoder, count: int = 100, seed: int = 7, network: str = "model") -> dict:
    """How often the true caption has the lowest denoising error beside captions that differ by one fact."""
    encoder, velocity = read_shipped()["encoder"], trained(network, text)
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    hits, chance = defaultdict(list), defaultdict(list)
    for category in (*HARD_CATEGORIES, "mixed"):
        while len(hits[category]) < count:
            spec = random_spec(rng, category)
            others = hard_negatives(spec)
            if not others:
                continue
            captions = [plain_caption(one) for one in (spec, *others)]
            clean = encode(encoder, torch.from_numpy(draw(random_scene(rng, spec)))[None])
            encoded, error = text(captions), torch.zeros(len(captions))
            for sigma in SIGMAS:
                noise = torch.randn(clean.shape, generator=generator)
                noisy = ((1 - sigma) * clean + sigma * noise).expand(len(captions), -1, -1, -1)
                with torch.no_grad():
                    prediction = velocity(noisy, torch.full((len(captions),), sigma), encoded)
                error += (prediction - (noise - clean)).square().mean((1, 2, 3))
            hits[category].append(int(error.argmin()) == 0)
            chance[category].append(1 / len(captions))
    return {
        category: {**share(verdicts), "chance": round(float(np.mean(chance[category])), 4)}
        for category, verdicts in hits.items()
    }


def measure_checker(count: int = 4000, seed: int = 11) -> dict:
    """The checker on drawn scenes: how often it misreads one, and whether it refuses captions that are wrong."""
    rng = np.random.default_rng(seed)
    read, accepted, refused = [], [], []
    for number in range(count):
        spec = random_spec(rng, (*CATEGORIES, "mixed")[number % 7])
        scene = random_scene(rng, spec)
        found = checker.find(draw(scene))
        seen = sorted((str(thing.shape), str(thing.colour), thing.size) for thing in found)
        read.append(seen == sorted((thing.shape, thing.colour, thing.size) for thing in scene.things))
        accepted.append(all(checker.facts(found, spec).values()))
        refused += [not all(checker.facts(found, other).values()) for other in hard_negatives(spec)]
    return {
        "scenes read exactly": share(read),
        "true captions accepted": share(accepted),
        "captions wrong by one fact refused": share(refused),
    }


def write_report(folder: Path, report: dict, sheet: Image.Image | None, network: str = "model") -> str:
    """results.json, contact_sheet.png, and the text of results.md; another network's have its name in theirs."""
    of, end, option = (
        ("the shipped file", "", "")
        if network == "model"
        else (f"`{network}.safetensors`", f"-{network}", f" --network {network}")
    )
    lines = [f"# Figures of {of}", "", f"Written by `python3 -m benchmarks.smallworld measure{option}`.", ""]
    for title, value in report.items():
        rows = {title: value} if "share" in value else value
        if not all(isinstance(row, dict) for row in rows.values()):
            lines += [f"{title}: {', '.join(f'{key} {entry}' for key, entry in rows.items())}", ""]
            continue
        lines += [f"| {title} | right | of | share | 95% interval |", "|---|---|---|---|---|"]
        for name, row in rows.items():
            low, high = row["ci95"]
            note = f" (chance {row['chance']:.0%})" if "chance" in row else ""
            cells = (name + note, row["right"], row["of"], f"{row['share']:.1%}", f"{low:.1%} to {high:.1%}")
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    replace_text(folder / f"results{end}.json", json.dumps(report, indent=1) + "\n")
    replace_text(folder / f"results{end}.md", "\n".join(lines))
    if sheet is not None:
        replace_picture(folder / f"contact_sheet{end}.png", sheet)
    return "\n".join(lines)


def replace_picture(path: Path, picture: Image.Image) -> None:
    """Write a PNG so that an interrupted write leaves the old one."""
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG", optimize=True))


def replace_text(path: Path, content: str) -> None:
    """Write a text file so that an interrupted write leaves the old one."""
    write_atomically(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
