"""A training run's checkpoint: with it a run goes on as if it had never stopped, bit for bit on a CPU."""

import json
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import SoftREPAError
from .files import write_tensors
from .trainer import StepRecord, Trainer

FORMAT = "softrepa-training"
VERSION = "1"


@dataclass(frozen=True)
class TrainingState:
    """Everything that changes while a run goes on, and `identity`: what decides its result, by name.

    `held_out` are (step, retrieval accuracy, loss) where they were measured; `position` is the dataset's.
    """

    tensors: dict[str, Tensor]
    optimizer: dict
    step: int
    records: list[StepRecord]
    held_out: list[tuple[int, float, float]]
    position: dict
    identity: dict


def capture(
    trainer: Trainer,
    records: list[StepRecord],
    held_out: list[tuple[int, float, float]],
    position: dict,
    identity: dict,
) -> TrainingState:
    """The state after the last finished step."""
    tensors = {"generator": trainer.generator.get_state()}
    tensors |= {f"parameter/{key}": value.detach() for key, value in trainer.tokens.named_parameters()}
    tensors |= {f"average/{key}": value for key, value in trainer.average.items()}
    if trainer.teacher is not None:
        tensors |= {f"teacher/{key}": value for key, value in trainer.teacher.named_parameters()}
    held = trainer.optimizer.state_dict()
    numbers = {}
    for index, entries in held["state"].items():
        for key, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer/{index}/{key}"] = value
            else:
                numbers[f"{index}/{key}"] = value
    groups = [{key: value for key, value in group.items() if key != "params"} for group in held["param_groups"]]
    optimizer = {"groups": groups, "numbers": numbers}
    copies = {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()}
    return TrainingState(copies, optimizer, trainer.step_index, list(records), list(held_out), position, identity)


def restore(trainer: Trainer, state: TrainingState) -> None:
    """Puts `trainer`, freshly made from the same configuration, where `state` was taken."""
    trainer.step_index = state.step
    trainer.generator.set_state(state.tensors["generator"])
    with torch.no_grad():
        for key, parameter in trainer.tokens.named_parameters():
            parameter.copy_(state.tensors[f"parameter/{key}"])
            trainer.average[key].copy_(state.tensors[f"average/{key}"])
        if trainer.teacher is not None:
            for key, parameter in trainer.teacher.named_parameters():
                parameter.copy_(state.tensors[f"teacher/{key}"])
    entries: dict[int, dict] = {}
    for key, value in state.tensors.items():
        if key.startswith("optimizer/"):
            _, index, name = key.split("/", 2)
            entries.setdefault(int(index), {})[name] = value
    for key, value in state.optimizer["numbers"].items():
        index, name = key.split("/", 1)
        entries.setdefault(int(index), {})[name] = value
    current = trainer.optimizer.state_dict()["param_groups"]
    groups = [group | {"params": now["params"]} for group, now in zip(state.optimizer["groups"], current, strict=True)]
    trainer.optimizer.load_state_dict({"state": entries, "param_groups": groups})


def save(state: TrainingState, path: Path) -> None:
    """Writes `state`; `path` holds the old checkpoint or the whole new one."""
    fields = {"optimizer": state.optimizer, "step": state.step, "position": state.position, "identity": state.identity}
    metadata = {"format": FORMAT, "format_version": VERSION}
    metadata |= {key: json.dumps(value, sort_keys=True) for key, value in fields.items()}
    records = [astuple(record) for record in state.records]
    tensors = state.tensors | {"records": _table(records, 6), "held_out": _table(state.held_out, 3)}
    write_tensors(path, tensors, metadata)


def load(path: Path) -> TrainingState:
    """Raises SoftREPAError for anything that is not a whole checkpoint. Keeps no hold on the file."""
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("format_version") != VERSION:
                raise SoftREPAError(f'Checkpoint "{path.name}" is not of format {FORMAT} {VERSION}.')
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118  (no mapping)
    except (SafetensorError, OSError) as error:
        raise SoftREPAError(f'Checkpoint "{path.name}" cannot be read ({error}), expected a whole file.') from None
    fields = {"optimizer", "step", "position", "identity"}
    if missing := sorted({"records", "held_out"} - tensors.keys()) + sorted(fields - metadata.keys()):
        raise SoftREPAError(f'Checkpoint "{path.name}" lacks {", ".join(missing)}, expected a whole one.')
    values = {key: json.loads(metadata[key]) for key in fields}
    records = [StepRecord(int(row[0]), int(row[1]), *row[2:]) for row in tensors.pop("records").tolist()]
    held_out = [(int(step), accuracy, loss) for step, accuracy, loss in tensors.pop("held_out").tolist()]
    return TrainingState(tensors=tensors, records=records, held_out=held_out, **values)


def differences(saved: dict, now: dict) -> list[str]:
    """What makes the run `now` another one than `saved`, a phrase each."""
    names = sorted(saved.keys() | now.keys())
    return [f"{name} was {saved.get(name)}, is {now.get(name)}" for name in names if saved.get(name) != now.get(name)]


def _table(rows: list[tuple], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), columns)
