"""A training run's state and its file, the checkpoint: with it a run goes on as if it had never stopped.

On a CPU bit for bit.
"""

import json
from dataclasses import astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import SoftREPAError, said, shown
from ..files import parse_json, read_tensors, write_tensors
from .trainer import StepRecord, Trainer

FORMAT = "softrepa-training"
VERSION = "1"

MOST_BYTES = 1 << 32
"""Of a checkpoint: of the largest tokens it holds five copies, and 48 bytes of every step."""
FIELDS = {"optimizer": dict, "step": int, "position": dict, "identity": dict}
"""What stands in the metadata, as JSON."""
SHOWN_VALUE = 80
"""Characters of a setting in what makes a run another one."""
TABLES = {"records": 6, "held_out": 3}
"""Columns of the tables among the tensors."""
WHOLE = {"records": 2, "held_out": 1}
"""How many of them, the first, hold whole numbers: steps and timesteps."""


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
    """Puts `trainer`, freshly made from the same configuration, where `state` was taken.

    Raises SoftREPAError where its parts are not those of this run: the file was changed.
    """
    try:
        _put_back(trainer, state)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        found = shown(str(error).partition("\n")[0])
        raise SoftREPAError(
            f"The checkpoint does not fit the run it is of ({type(error).__name__}: {found}), expected it as this pack "
            "has written it."
        ) from error


def _put_back(trainer: Trainer, state: TrainingState) -> None:
    trainer.step_index = state.step
    trainer.generator.set_state(state.tensors["generator"])
    with torch.no_grad():
        for key, parameter in trainer.tokens.named_parameters():
            _copy(parameter, state.tensors[f"parameter/{key}"])
            _copy(trainer.average[key], state.tensors[f"average/{key}"])
        if trainer.teacher is not None:
            for key, parameter in trainer.teacher.named_parameters():
                _copy(parameter, state.tensors[f"teacher/{key}"])
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


def _copy(target: Tensor, value: Tensor) -> None:
    """PyTorch's own would also stretch a smaller tensor."""
    if target.shape != value.shape:
        raise ValueError(f"shape {list(value.shape)} for {list(target.shape)}")
    target.copy_(value)


def save(state: TrainingState, path: Path) -> None:
    """Writes `state`; `path` holds the old checkpoint or the whole new one."""
    fields = {"optimizer": state.optimizer, "step": state.step, "position": state.position, "identity": state.identity}
    metadata = {"format": FORMAT, "format_version": VERSION}
    metadata |= {key: json.dumps(value, sort_keys=True) for key, value in fields.items()}
    records = [astuple(record) for record in state.records]
    tables = {"records": records, "held_out": state.held_out}
    tensors = state.tensors | {name: _table(rows, TABLES[name]) for name, rows in tables.items()}
    write_tensors(path, tensors, metadata)


def load(path: Path) -> TrainingState:
    """Raises SoftREPAError for anything that is not a whole checkpoint. Keeps no hold on the file."""
    label = f'Checkpoint "{shown(path.name)}"'
    try:
        tensors, metadata = read_tensors(path, MOST_BYTES)
        if metadata.get("format") != FORMAT or metadata.get("format_version") != VERSION:
            raise SoftREPAError(f"{label} is not of format {FORMAT} {VERSION}.")
        if missing := sorted(TABLES.keys() - tensors.keys()) + sorted(FIELDS.keys() - metadata.keys()):
            raise SoftREPAError(f"{label} lacks {', '.join(missing)}, expected a whole one.")
        values = {key: parse_json(metadata[key]) for key in FIELDS}
    except OSError as error:
        raise SoftREPAError(f"{label} cannot be read ({said(error)}), expected a whole file.") from None
    tables = {name: tensors.pop(name) for name in TABLES}
    odd = [key for key, kind in FIELDS.items() if type(values[key]) is not kind]
    odd += [name for name, table in tables.items() if not _is_table(table, TABLES[name], WHOLE[name])]
    if odd:
        raise SoftREPAError(f"{label} has {', '.join(odd)} of another kind, expected what this pack writes.")
    records = [StepRecord(int(row[0]), int(row[1]), *row[2:]) for row in tables["records"].tolist()]
    held_out = [(int(step), accuracy, loss) for step, accuracy, loss in tables["held_out"].tolist()]
    if len(records) != values["step"]:
        raise SoftREPAError(f"{label} has {len(records)} records, expected one of each of its {values['step']} steps.")
    return TrainingState(tensors=tensors, records=records, held_out=held_out, **values)


def differences(saved: dict, now: dict) -> list[str]:
    """What makes the run `now` another one than `saved`, a phrase each."""
    names = sorted(saved.keys() | now.keys())
    return [
        f"{shown(name)} was {shown(saved.get(name), SHOWN_VALUE)}, is {shown(now.get(name), SHOWN_VALUE)}"
        for name in names
        if saved.get(name) != now.get(name)
    ]


def _is_table(tensor: Tensor, columns: int, whole: int) -> bool:
    """Whether the rows are of a table that `save` writes, which begin with `whole` whole numbers."""
    fits = tensor.dtype == torch.float64 and tensor.ndim == 2 and tensor.shape[1] == columns
    return fits and bool(tensor[:, :whole].isfinite().all())


def _table(rows: list[tuple], columns: int) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), columns)
