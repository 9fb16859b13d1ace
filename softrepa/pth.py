"""Reads the one tensor of a .pth file without unpickling it.

`torch.save` writes a pickle, which is a program, and the numbers beside it. The few commands of that program which say
where a tensor's numbers lie are followed here; nothing is imported, called or made that the program names, and its
numbers are bounded by those that the file holds. (`torch.load` with weights_only runs no code, but it makes whatever
sizes the program asks for.)
"""

import io
import math
import pickletools
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .errors import shown
from .files import MOST_DIMENSIONS, UnreadableError, read_bounded

MOST_PICKLE = 1 << 16
"""Bytes of the program; for a tensor or an embedding it takes about 1000."""
MOST_RECORDS = 64
"""Files in the .zip; torch writes about 5."""
MOST_ALONG = 1 << 31

EMBEDDING = "torch.nn.modules.sparse.Embedding"
REBUILT = {"torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor"}
"""Make a tensor: of storage, offset, size and stride."""
WRAPPED = {"torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state"}
"""Make a parameter: of a tensor and what does not matter here."""
LEFT_EMPTY = {"collections.OrderedDict", "__builtin__.set", "builtins.set"}
"""Hold an embedding's parameters, which come after, and its hooks."""
STORED = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
KNOWN = {EMBEDDING, *REBUILT, *WRAPPED, *LEFT_EMPTY, *STORED}

LEGACY = ((0x1950A86A20F9469CFC6C,), (1001,))
"""The first two pickles of a file that torch before 1.6 wrote."""


@dataclass(frozen=True)
class Name:
    """What a pickle would import."""

    text: str


@dataclass(frozen=True)
class Storage:
    """Numbers that lie beside the pickle, under a key."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True)
class Strided:
    """A tensor that is yet to be made of them."""

    storage: Storage
    offset: int
    size: tuple
    stride: tuple


@dataclass
class Embedding:
    """What an nn.Embedding holds; it is never made."""

    state: dict = field(default_factory=dict)


def read_pth(path: Path, most: int) -> Tensor:
    """A tensor, parameter or the weight of an `nn.Embedding`, as torch saved it. Raises OSError, as `read_bounded`."""
    content = read_bounded(path, most)
    try:
        return _zipped(content) if content.startswith(b"PK") else _legacy(content)
    except UnreadableError:
        raise
    except Exception:  # a broken pickle or .zip can lead anywhere
        raise UnreadableError("it is not a whole file saved by torch") from None


def _zipped(content: bytes) -> Tensor:
    if content.count(b"PK\x01\x02") > MOST_RECORDS:  # the mark of an entry in the list at the end
        raise UnreadableError(f"a .zip of more than {MOST_RECORDS} files")
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        for record in archive.infolist():
            if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
                raise UnreadableError("its contents are compressed")
        records = {record.filename: record for record in archive.infolist()}
        (main,) = (name for name in records if name.endswith("/data.pkl"))
        folder = main.removesuffix("data.pkl")
        if records[main].file_size > MOST_PICKLE:
            raise UnreadableError(f"a pickle of {records[main].file_size:,} bytes, expected at most {MOST_PICKLE:,}")
        if f"{folder}byteorder" in records and archive.read(f"{folder}byteorder") != b"little":
            raise UnreadableError("its numbers are of another byte order")
        tensor = _tensor_of(_Pickle(archive.read(main)).result())
        return _made(tensor, archive.read(f"{folder}data/{tensor.storage.key}"))


def _legacy(content: bytes) -> Tensor:
    """Five pickles, and the numbers: of each storage how many there are, and themselves."""
    position, results = 0, []
    for _ in range(5):
        pickle = _Pickle(content[position : position + MOST_PICKLE])
        results.append(pickle.result())
        position += pickle.length
        if len(results) == 2 and tuple((value,) for value in results) != LEGACY:
            raise UnreadableError("it is not a whole file saved by torch")
    tensor = _tensor_of(results[3])
    if results[4] != [tensor.storage.key]:
        raise UnreadableError("it holds more than one tensor")
    return _made(tensor, content[position + 8 :])


def _tensor_of(value: Any) -> Strided:
    if isinstance(value, Embedding):
        value = value.state["_parameters"]["weight"]
    if not isinstance(value, Strided):
        raise UnreadableError(f"it holds a {type(value).__name__}")
    return value


def _made(tensor: Strided, numbers: bytes) -> Tensor:
    """The tensor, where all that it names is there."""
    size, stride, storage = tensor.size, tensor.stride, tensor.storage
    values = (tensor.offset, storage.count, *size, *stride)
    fits = len(size) == len(stride) <= MOST_DIMENSIONS and all(0 <= value < MOST_ALONG for value in values)
    if not fits or len(numbers) != storage.count * storage.dtype.itemsize:
        raise UnreadableError("it is not a whole file saved by torch")
    if 0 in size:
        raise UnreadableError(f"it holds an empty tensor of shape {list(size)}")
    last = tensor.offset + sum((along - 1) * step for along, step in zip(size, stride, strict=True))
    if math.prod(size) > storage.count or last >= storage.count:
        raise UnreadableError(f"it holds {storage.count:,} numbers for a tensor of shape {list(size)}")
    flat = torch.frombuffer(bytearray(numbers), dtype=storage.dtype)
    return flat.as_strided(size, stride, tensor.offset).clone(memory_format=torch.contiguous_format)


class _Pickle:
    """One program, followed to its end. `length` is how many bytes it had."""

    def __init__(self, content: bytes):
        self.file = io.BytesIO(content)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    @property
    def length(self) -> int:
        return self.file.tell()

    def result(self) -> Any:
        """Raises UnreadableError where a command is none of those that lead to a tensor, others where it is broken."""
        for opcode, argument, _ in pickletools.genops(self.file):
            self._follow(opcode.name, argument)
        return self.stack.pop()

    def _follow(self, command: str, argument: Any) -> None:
        stack = self.stack
        match command:
            case "PROTO" | "STOP":
                pass
            case "MARK":
                self.marks.append(len(stack))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(command == "NEWTRUE")
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "BINFLOAT" | "BINUNICODE":
                stack.append(argument)
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._taken(int(command[-1]))))
            case "TUPLE":
                stack.append(tuple(self._marked()))
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "APPEND" | "APPENDS":
                items = self._marked() if command == "APPENDS" else self._taken(1)
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = self._marked() if command == "SETITEMS" else self._taken(2)
                stack[-1].update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "GLOBAL":
                stack.append(_known(argument.replace(" ", ".", 1)))
            case "BINPERSID":
                stack.append(_storage(*stack.pop()))
            case "REDUCE" | "NEWOBJ":
                called, given = self._taken(2)
                stack.append(_called(called.text, given, makes_object=command == "NEWOBJ"))
            case "BUILD":
                (state,) = self._taken(1)
                if isinstance(stack[-1], Embedding):
                    stack[-1].state = state
            case _:
                raise UnreadableError(f"its pickle has a command {command}")

    def _taken(self, count: int) -> list[Any]:
        start = len(self.stack) - count
        if start < 0:
            raise UnreadableError("it is not a whole file saved by torch")
        taken, self.stack[start:] = self.stack[start:], []
        return taken

    def _marked(self) -> list[Any]:
        return self._taken(len(self.stack) - self.marks.pop())


def _known(name: str) -> Name:
    if name not in KNOWN:
        raise UnreadableError(f"it asks for {shown(name, 80)} to be run")
    return Name(name)


def _key(key: Any) -> Any:
    """The key of a dictionary; hashing other ones could go deep."""
    if not isinstance(key, (str, int)):
        raise UnreadableError(f"it holds a dictionary with a {type(key).__name__} for a key")
    return key


def _storage(kind: str, storage: Name, key: str, _: str, count: int, view: None = None) -> Storage:
    if kind != "storage" or view is not None:
        raise UnreadableError("it holds a view of numbers that are not there")
    return Storage(STORED[storage.text], str(key), int(count))


def _called(name: str, given: tuple, makes_object: bool) -> Any:
    """What the program would have called. Raises UnreadableError where that makes no part of a tensor."""
    if makes_object and name == EMBEDDING:
        return Embedding()
    if not makes_object and name in LEFT_EMPTY:
        return {}
    if not makes_object and name in REBUILT:
        storage, offset, size, stride, *_ = given
        return Strided(storage, offset, size, stride)
    if not makes_object and name in WRAPPED:
        return given[0]
    raise UnreadableError(f"it asks for {name} to be run")
