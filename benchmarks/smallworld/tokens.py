"""Trains soft tokens in a real ComfyUI from a folder of drawn pictures, and measures them on pictures it never saw."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from softrepa.smallworld.checkpoint import CHECKPOINT_NAME
from softrepa.smallworld.pictures import CATEGORIES, write_pictures
from softrepa.smallworld.text import FastEncoder
from softrepa.smallworld.world import (
    IMAGE_SIZE,
    draw,
    hard_negatives,
    plain_caption,
    random_scene,
    random_spec,
)
from softrepa.statistics import mean_interval
from tools.server import ComfyServer

from . import flux

PICTURES = "small world"
BATCH_SIZE = 4
BATCHES = 24
TIMESTEPS = (800, 900, 950)
TEMPERATURES = (0.07, 2.0)  # the reference's, of which one file is shipped; and one at which large errors matter too
NAMES = {
    "loss": "contrastive loss",
    "retrieval": "retrieval among the batch's captions",
    "hard_retrieval": "retrieval among captions wrong by one fact",
}


def graph(seed: int, steps: int, network: str = "model", **training) -> dict:
    """From the folder to a token file, in API format. The CLIP is the first model's for every network."""
    options = {"batch_size": BATCH_SIZE, "learning_rate": 1e-3, "seed": seed, "steps": steps} | training
    checkpoints = {"model": CHECKPOINT_NAME, "flux": flux.CHECKPOINT_NAME}
    data = {"folder": PICTURES, "clip": ["model", 1], "vae": [network, 2], "resolution": IMAGE_SIZE}
    return {
        name: {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoints[name]}}
        for name in sorted({"model", network})
    } | {
        "data": {"class_type": "SoftREPADataset", "inputs": data},
        "train": {
            "class_type": "SoftREPATrain",
            "inputs": {"model": [network, 0], "dataset": ["data", 0], "filename_prefix": f"seed{seed}"} | options,
        },
    }


def train(server: ComfyServer, seed: int, steps: int, **training) -> Path:
    """Run the training graph; returns the file of tokens that it wrote."""
    folder = server.work / "models" / "softrepa"
    before = set(folder.glob("seed*.safetensors"))
    server.run(graph(seed, steps, **training), timeout=3600)
    (path,) = set(folder.glob("seed*.safetensors")) - before
    return path


@dataclass(frozen=True)
class Alignment:
    """Of held-out pictures, by picture: in-batch loss and retrieval, and retrieval beside captions wrong by a fact."""

    loss: torch.Tensor
    retrieval: torch.Tensor
    hard_retrieval: torch.Tensor


class HeldOut:
    """Pictures, captions and noise that stay the same for every model they measure."""

    def __init__(
        self,
        stock,
        batches: int = BATCHES,
        hard: int = 96,
        seed: int = 99,
        timesteps: tuple[int, ...] = TIMESTEPS,
        spec_of: Callable = random_spec,
    ):
        import comfy.sd1_clip

        from softrepa.data.dataset import Batch

        text = FastEncoder(comfy.sd1_clip.SDTokenizer())

        def cond(caption: str) -> dict:
            context, pooled = text.as_comfyui(caption)
            return {"cross_attn": context, "pooled_output": pooled}

        rng = np.random.default_rng(seed)
        self.timesteps, self.batches, self.hard = timesteps, [], []
        for _ in range(batches):
            specs = [spec_of(rng, str(rng.choice(CATEGORIES))) for _ in range(BATCH_SIZE)]
            captions = [plain_caption(spec) for spec in specs]
            if len(set(captions)) < BATCH_SIZE:
                continue
            latents = self._latents(stock, rng, specs)
            self.batches.append(Batch(latents, captions, [cond(one) for one in captions], captions))
        while len(self.hard) < hard:
            spec = spec_of(rng, ("counting", "position", "colour_attribution", "mixed")[len(self.hard) % 4])
            if others := hard_negatives(spec):
                conds = [cond(plain_caption(one)) for one in (spec, *others)]
                self.hard.append((self._latents(stock, rng, [spec]), conds))

    @staticmethod
    def _latents(stock, rng, specs) -> torch.Tensor:
        pictures = torch.from_numpy(np.stack([draw(random_scene(rng, spec)) for spec in specs]))
        with torch.inference_mode():
            return stock.vae.encode(pictures).clone()

    def measure(self, model, temperature: float) -> Alignment:
        """`model` is a MODEL, with tokens or without; `temperature` is the loss's."""
        found = self.in_batch(model, temperature)
        mean = (found.losses.mean(0), found.retrieved.float().mean(0))
        return Alignment(*mean, self.beside_wrong_captions(model))

    def in_batch(self, model, temperature: float):
        """The Score among each batch's own captions."""
        from softrepa.comfy.training.score import score

        return score(model, self.batches, self.timesteps, temperature=temperature, micro_batch=BATCH_SIZE**2)

    def beside_wrong_captions(self, model) -> torch.Tensor:
        """Whether the true caption fits best (N,). The model must be loaded."""
        from softrepa.comfy.training.pairs import pair_errors

        hits = []
        for number, (latents, conds) in enumerate(self.hard):
            seen, total = model.model.process_latent_in(latents.clone()), 0
            for t in self.timesteps:
                generator = torch.Generator().manual_seed(1000 * number + t)
                noise = torch.randn(seen.shape, generator=generator)
                total = total + pair_errors(model, None, seen, noise, conds, t, len(conds))
            hits.append(float(total.argmin() == 0))
        return torch.tensor(hits)


@dataclass(frozen=True)
class Change:
    """Tokens against the plain model on the same pictures and noise: the mean over seeds, and 95% intervals."""

    before: float
    after: float
    over_seeds: tuple[float, float]
    over_pictures: tuple[float, float]

    def beyond(self) -> bool:
        """Whether neither interval of the difference contains 0."""
        return all(low > 0 or high < 0 for low, high in (self.over_seeds, self.over_pictures))


def change(before: torch.Tensor, after: list[torch.Tensor]) -> Change:
    """`before` (N,) of the plain model, `after` one such of each seed."""
    differences = torch.stack([one - before for one in after])
    mean, half, _ = mean_interval(differences.mean(1))
    by_picture = differences.mean(0)
    spread = 1.96 * by_picture.std().item() / math.sqrt(len(by_picture))
    return Change(
        before.mean().item(),
        torch.stack(after).mean().item(),
        (mean - half, mean + half),
        (by_picture.mean().item() - spread, by_picture.mean().item() + spread),
    )


def prepare(work: Path, pictures: int, seed: int = 5, network: str = "model") -> None:
    """The checkpoints and the training folder below a ComfyUI base directory."""
    from softrepa.smallworld.checkpoint import write_checkpoint

    checkpoints = work / "models" / "checkpoints"
    write_checkpoint(checkpoints / CHECKPOINT_NAME)
    if network == "flux":
        flux.write_checkpoint(checkpoints / flux.CHECKPOINT_NAME)
    shutil.rmtree(work / "input" / PICTURES, ignore_errors=True)
    write_pictures(work / "input" / PICTURES, pictures, seed)


def study(
    work: Path,
    pictures: int,
    steps: int,
    seeds: int,
    network: str = "model",
    temperatures: Sequence[float] = TEMPERATURES,
    say: Callable = print,
) -> tuple[dict, Path]:
    """{temperature: {measure: Change}}, and a file of tokens of the first temperature."""
    from softrepa.comfy.tokens.patching import apply_tokens
    from softrepa.token_files import load

    from .measure import StockModel

    prepare(work, pictures, network=network)
    files = {}
    with ComfyServer(work) as server:
        for temperature in temperatures:
            for seed in range(seeds):
                files[temperature, seed] = train(server, seed, temperature=temperature, steps=steps, network=network)
                say(f"temperature {temperature}, seed {seed}: {files[temperature, seed].name}")
    stock = StockModel(work / "models" / "checkpoints", network)
    held_out, changes = HeldOut(stock), {}
    for temperature in temperatures:
        before = held_out.measure(stock.model, temperature)
        after = [
            held_out.measure(apply_tokens(stock.model, load(files[temperature, seed])), temperature)
            for seed in range(seeds)
        ]
        changes[temperature] = {
            name: change(getattr(before, name), [getattr(one, name) for one in after])
            for name in Alignment.__dataclass_fields__
        }
        say(f"temperature {temperature}: {changes[temperature]}")
    return changes, files[temperatures[0], 0]


def report(changes: dict, pictures: int, steps: int, seeds: int, network: str = "model") -> str:
    """A table in Markdown."""
    of = "the small world" if network == "model" else f"`{network}.safetensors`"
    lines = [
        f"# Tokens of {of} after a short training",
        "",
        f"{steps} updates of {BATCH_SIZE} x {BATCH_SIZE} pairs on {pictures} drawn pictures, {seeds} seeds, by the "
        f"training node; held-out pictures at timesteps {', '.join(map(str, TIMESTEPS))}, the same noise for all. "
        "Intervals are of the difference, at 95%.",
        "",
        "| temperature | measure | without | with | over seeds | over pictures |",
        "|---|---|---|---|---|---|",
    ]
    for temperature, measures in changes.items():
        for name, one in measures.items():
            spans = (f"{low:+.4f} to {high:+.4f}" for low, high in (one.over_seeds, one.over_pictures))
            cells = (temperature, NAMES[name], f"{one.before:.4f}", f"{one.after:.4f}", *spans)
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join([*lines, ""])
