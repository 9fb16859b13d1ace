"""A training loop that can be stopped at any time and goes on where it was: both parts of the model use it."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset

from softrepa.files import write_atomically


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up, a constant rate, and half a cosine down to 1% over the last `descent` of the steps."""

    steps: int
    lr: float
    seed: int
    warmup: int = 200
    descent: float = 1.0
    weight_decay: float = 0.01
    muon: float = 0.0  # rate of the matrices that `is_hidden` names, as a multiple of AdamW's; 0 leaves all to AdamW
    ema: float = 0.999
    save_every: int = 200
    stop: int | None = None  # ends before the last step, with the rate still above its lowest

    def rate(self, step: int) -> float:
        """AdamW's learning rate at a step."""
        start = max(self.warmup, self.steps * (1 - self.descent))
        progress = max(0.0, step - start) / max(1.0, self.steps - start)
        return self.lr * min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def save_atomically(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that an interrupted write leaves the old one."""
    contiguous = {key: value.contiguous() for key, value in tensors.items()}
    write_atomically(path, lambda temporary: save_file(contiguous, temporary, metadata))


@dataclass(frozen=True)
class Steps(Dataset):
    """What `draw` makes of each step's generator, and that generator as it is then. Any process can draw any step."""

    draw: Callable[[np.random.Generator], Any]
    seed: int
    first: int
    last: int

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> tuple[Any, np.random.Generator]:
        rng = np.random.default_rng((self.seed, self.first + index))
        return self.draw(rng), rng


def _as_drawn(example):
    return example


def fit(
    module: torch.nn.Module,
    draw: Callable[[np.random.Generator], Any],
    loss: Callable[[Any, np.random.Generator, torch.Generator], torch.Tensor],
    schedule: Schedule,
    folder: Path,
    name: str,
    is_hidden: Callable[[str], bool] = lambda name: False,
    workers: int = 0,
) -> dict[str, torch.Tensor]:
    """Train `module` where it lies and return the running average of its weights.

    `draw` makes a step's batch, ahead of it in `workers` processes; `loss` takes the batch and two generators. All are
    seeded by the step alone: a resumed run repeats an uninterrupted one. State is kept in
    `folder/name.state.safetensors`, the log in `folder/name.log.jsonl`.
    """
    state_path, log_path = folder / f"{name}.state.safetensors", folder / f"{name}.log.jsonl"
    parameters = dict(module.named_parameters())
    average = {key: value.detach().clone() for key, value in parameters.items()}
    optimizers = _optimizers(parameters, schedule, is_hidden)
    first, seconds = 0, 0.0
    if state_path.exists():
        first, seconds = _restore(state_path, parameters, average, optimizers)
    losses, mark = [], time.monotonic()
    last = schedule.stop or schedule.steps
    steps = Steps(draw, schedule.seed, first, last)
    ahead = DataLoader(steps, batch_size=None, collate_fn=_as_drawn, num_workers=workers)
    for step, (batch, rng) in enumerate(ahead, first):
        for optimizer, factor in optimizers:
            optimizer.param_groups[0]["lr"] = schedule.rate(step) * factor
        value = loss(batch, rng, torch.Generator().manual_seed(schedule.seed * 1_000_003 + step))
        module.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        for optimizer, _ in optimizers:
            optimizer.step()
        decay = min(schedule.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
        losses.append(value.detach())
        if (step + 1) % schedule.save_every == 0 or step + 1 == last:
            seconds += time.monotonic() - mark
            mark = time.monotonic()
            _save(state_path, step + 1, seconds, parameters, average, optimizers)
            entry = {"step": step + 1, "loss": round(float(torch.stack(losses).mean()), 5), "seconds": round(seconds)}
            with log_path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
            print(f"{name} {json.dumps(entry)}", flush=True)
            losses = []
    return average


def _optimizers(parameters, schedule: Schedule, is_hidden) -> list[tuple[torch.optim.Optimizer, float]]:
    """AdamW, and Muon (orthogonal updates) for matrices inside the network, each with its rate's factor."""
    hidden = {key for key, value in parameters.items() if schedule.muon and value.ndim == 2 and is_hidden(key)}
    others = [value for key, value in parameters.items() if key not in hidden]
    made = [(torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=schedule.weight_decay), 1.0)]
    if hidden:
        matrices = [parameters[key] for key in parameters if key in hidden]
        muon = torch.optim.Muon(matrices, weight_decay=schedule.weight_decay, adjust_lr_fn="match_rms_adamw")
        made.append((muon, schedule.muon))
    return made


def _save(path: Path, step: int, seconds: float, parameters, average, optimizers) -> None:
    tensors = {}
    for key, parameter in parameters.items():
        tensors[f"weight/{key}"] = parameter.detach()
        tensors[f"average/{key}"] = average[key]
        for optimizer, _ in optimizers:
            tensors |= {f"{part}/{key}": value for part, value in optimizer.state.get(parameter, {}).items()}
    save_atomically(tensors, path, {"step": str(step), "seconds": str(seconds)})


def _restore(path: Path, parameters, average, optimizers) -> tuple[int, float]:
    """Continue from `path`; returns the steps and seconds done."""
    owners = {parameter: one for one, _ in optimizers for parameter in one.param_groups[0]["params"]}
    with safe_open(path, "pt") as file, torch.no_grad():
        for entry in file.keys():  # noqa: SIM118  (no mapping)
            part, key = entry.split("/", 1)
            value = file.get_tensor(entry)
            if part == "weight":
                parameters[key].copy_(value)
            elif part == "average":
                average[key].copy_(value)
            else:
                # AdamW counts its steps on the CPU
                device = value.device if part == "step" else parameters[key].device
                owners[parameters[key]].state[parameters[key]][part] = value.to(device)
        return int(file.metadata()["step"]), float(file.metadata()["seconds"])
