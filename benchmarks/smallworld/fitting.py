"""A training loop that can be stopped at any time and goes on where it was: both parts of the model use it."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file


@dataclass(frozen=True)
class Schedule:
    """AdamW: a linear warm-up, a constant rate, and half a cosine down to 1% over the last `descent` of the steps."""

    steps: int
    lr: float
    seed: int
    warmup: int = 200
    descent: float = 1.0
    weight_decay: float = 0.01
    ema: float = 0.999
    save_every: int = 200

    def rate(self, step: int) -> float:
        start = max(self.warmup, self.steps * (1 - self.descent))
        progress = max(0.0, step - start) / max(1.0, self.steps - start)
        return self.lr * min(1.0, (step + 1) / self.warmup) * (0.01 + 0.99 * (1 + math.cos(math.pi * progress)) / 2)


def save_atomically(tensors: dict[str, torch.Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file so that an interrupted write leaves the old one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        save_file({key: value.contiguous() for key, value in tensors.items()}, temporary, metadata)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def fit(
    module: torch.nn.Module,
    loss: Callable[[np.random.Generator, torch.Generator], torch.Tensor],
    schedule: Schedule,
    folder: Path,
    name: str,
) -> dict[str, torch.Tensor]:
    """Train `module` and return the running average of its weights.

    `loss` draws its batch from the two generators, which are seeded by the step alone: a resumed run repeats an
    uninterrupted one. State is kept in `folder/name.state.safetensors`, the log in `folder/name.log.jsonl`.
    """
    state_path, log_path = folder / f"{name}.state.safetensors", folder / f"{name}.log.jsonl"
    parameters = dict(module.named_parameters())
    average = {key: value.detach().clone() for key, value in parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), betas=(0.9, 0.99), weight_decay=schedule.weight_decay)
    first, seconds = 0, 0.0
    if state_path.exists():
        first, seconds = _restore(state_path, parameters, average, optimizer)
    losses, mark = [], time.monotonic()
    for step in range(first, schedule.steps):
        for group in optimizer.param_groups:
            group["lr"] = schedule.rate(step)
        value = loss(np.random.default_rng((schedule.seed, step)), torch.Generator().manual_seed(
            schedule.seed * 1_000_003 + step
        ))  # fmt: skip
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        decay = min(schedule.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(parameters.values()), 1 - decay)
        losses.append(value.detach())
        if (step + 1) % schedule.save_every == 0 or step + 1 == schedule.steps:
            seconds += time.monotonic() - mark
            mark = time.monotonic()
            _save(state_path, step + 1, seconds, parameters, average, optimizer)
            entry = {"step": step + 1, "loss": round(float(torch.stack(losses).mean()), 5), "seconds": round(seconds)}
            with log_path.open("a", encoding="utf-8") as log:
                log.write(json.dumps(entry) + "\n")
            print(f"{name} {json.dumps(entry)}", flush=True)
            losses = []
    return average


def _save(path: Path, step: int, seconds: float, parameters, average, optimizer) -> None:
    tensors = {}
    for key, parameter in parameters.items():
        tensors[f"weight.{key}"] = parameter.detach()
        tensors[f"average.{key}"] = average[key]
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors[f"{moment}.{key}"] = optimizer.state[parameter][moment]
    save_atomically(tensors, path, {"step": str(step), "seconds": str(seconds)})


def _restore(path: Path, parameters, average, optimizer) -> tuple[int, float]:
    with safe_open(path, "pt") as file, torch.no_grad():
        step, seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
        for key, parameter in parameters.items():
            parameter.copy_(file.get_tensor(f"weight.{key}"))
            average[key].copy_(file.get_tensor(f"average.{key}"))
            optimizer.state[parameter] = {
                "step": torch.tensor(float(step)),
                **{moment: file.get_tensor(f"{moment}.{key}") for moment in ("exp_avg", "exp_avg_sq")},
            }
    return step, seconds
