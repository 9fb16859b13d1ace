"""Token files and caption tables, and what damage, carelessness and malice make of them; everything from a seed."""

import io
import json
import random
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save

ODD_NUMBERS = ("0", "-1", "3", "2147483648", "9223372036854775808", "1e999", "NaN", "1" * 5000, "null", '"x"', "[]")
ODD_TEXTS = ("", "x" * 20_000, "\ud800", "\0", "a\nb", "\u2028")
ODD_VALUES = (None, True, 5, -1, 10**400, 1e308, float("nan"), *ODD_TEXTS, [], {}, [[]], [5])
ODD_BYTES = (b"\0", b"\xff", b"\n", b'"', b"[" * 2000, b"\xed\xa0\x80", b"\xe2\x80\xa8", b"\x1b[2J", b"\xff\xfe")
TYPES = ("F32", "F16", "BF16", "F64", "I32", "BOOL", "F8_E4M3", "F4", "C64", "U64", "X")
COMMANDS = b"()]}.0ab23eutsdlNIJKMLUVXGFQRcio\x80\x81\x82\x85\x86\x87\x88\x89\x8a\x8b\x8c\x8e\x94\x95Chjpqr"
"""Of a pickle."""
PICTURES = ("cats/1.png", "2.png", "dogs/3.png")


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Bytes flipped, cut, repeated, put in; numbers that are written out replaced by odd ones."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        if not data:
            break
        place = rng.randrange(min(len(data), rng.choice((64, 512, len(data)))))
        length = rng.choice((1, 2, 4, 16, 200))
        match rng.randrange(8):
            case 0 | 1:
                data[place] ^= 1 << rng.randrange(8)
            case 2:
                data[place] = rng.randrange(256)
            case 3:
                del data[place : len(data) if rng.random() < 0.3 else place + length]
            case 4:
                data[place:place] = data[place : place + length]
            case 5:
                data[place:place] = rng.choice(ODD_BYTES)
            case 6:
                data[place : place + length] = rng.randbytes(length)
            case 7:
                if numbers := list(re.finditer(rb"\d+", data[:4096])):
                    start, end = rng.choice(numbers).span()
                    data[start:end] = rng.choice(ODD_NUMBERS).encode()
    return bytes(data)


def odd(value, rng: random.Random):
    """A JSON value, somewhere inside replaced by an odd one, or with a key changed or gone."""
    if not isinstance(value, (dict, list)) or not value or rng.random() < 0.15:
        return rng.choice(ODD_VALUES)
    changed = dict(value) if isinstance(value, dict) else list(value)
    place = rng.choice(list(changed)) if isinstance(changed, dict) else rng.randrange(len(changed))
    chance = rng.random()
    if chance < 0.1:
        del changed[place]
    elif chance < 0.2 and isinstance(changed, dict):
        changed[rng.choice(("x", "", "text", "file_name", "\ud800", "x" * 500))] = changed.pop(place)
    else:
        changed[place] = odd(changed[place], rng)
    return changed


# Token files


def whole_token_files() -> dict[str, bytes]:
    """Small whole ones of every kind, by the name that they need."""
    draw = torch.Generator().manual_seed(0)

    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    ours = {"format": "softrepa", "format_version": "1", "inputs": '{"steps": 2}', "steps": "2"}
    sd3 = {"tokens": numbers(2, 2, 8), "time_table": numbers(100, 16), "negative_tokens": numbers(2, 2, 8)}
    embedding = torch.nn.Embedding(100, 16)
    return {
        "sd3.safetensors": save(sd3, ours | {"family": "sd3", "blocks": "2"}),
        "sd15.safetensors": save({"tokens": numbers(1, 768).half()}, ours | {"family": "sd15", "blocks": "down,mid"}),
        "anima_lora.safetensors": save(
            {"tokens": numbers(2, 2, 2, 8), "t_offsets.weight": numbers(5, 32)},
            {"ss_splice_position": "front_of_padding"},
        ),
        "bare.safetensors": save({"tokens": numbers(2, 2, 8)}),
        "dc_tokens.pth": _saved(torch.nn.Parameter(numbers(2, 2, 8))),
        "plain.pth": _saved(numbers(2, 8, 2).transpose(1, 2)),
        "legacy.pth": _saved(numbers(2, 2, 8), _use_new_zipfile_serialization=False),
        "soft_tokens.pth": _saved(torch.nn.Parameter(numbers(2, 2, 2, 8))),
        "dc_t_tokens.pth": _saved(embedding),
        "embedding.pth": _saved(embedding),
    }


def _saved(value, **options) -> bytes:
    file = io.BytesIO()
    torch.save(value, file, **options)
    return file.getvalue()


def mutated_tokens(content: bytes, rng: random.Random) -> bytes:
    """The file as a whole damaged, or one of its parts and the rest put together anew so that it is read."""
    if rng.random() < 0.4:
        return damaged(content, rng)
    if content.startswith(b"PK"):
        return _rezipped(content, rng)
    if content.startswith(b"\x80"):
        return damaged(content, rng)
    return _reheaded(content, rng)


def _reheaded(content: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    match rng.randrange(6):
        case 0:
            text = damaged(content[8 : 8 + length], rng)
        case 1:
            text = json.dumps(odd(header, rng)).encode()
        case 2:
            metadata = header.setdefault("__metadata__", {})
            key = rng.choice(("family", "blocks", "format", "format_version", "splice_position", "inputs", "any\nkey"))
            values = (*ODD_NUMBERS, "x" * 5000, "\x1b[2J\n\u202e", "down", "7", "mid,up,down", "[" * 5000)
            metadata[key] = rng.choice(values)
            text = json.dumps(header).encode()
        case 3:
            tensor = header[rng.choice([key for key in header if key != "__metadata__"])]
            tensor["dtype"] = rng.choice(TYPES)
            text = json.dumps(header).encode()
        case 4:
            tensor = header[rng.choice([key for key in header if key != "__metadata__"])]
            size = rng.choice((0, 1, 2, 8, 16, 768, 2**31, 2**63))
            tensor["shape"] = rng.choice(([size], [size] * 2, [size, *tensor["shape"]], [1] * 500, [], [size, 0]))
            text = json.dumps(header).encode()
        case _:
            names = list(header)
            header[rng.choice(("tokens", "time_table", "t_offsets.weight", "x" * 500, "negative_tokens"))] = header.pop(
                rng.choice(names)
            )
            text = json.dumps(header).encode()
            data = damaged(data, rng) if rng.random() < 0.5 else data
    if rng.random() < 0.1:
        data = data[: len(data) // 2]
    return struct.pack("<Q", len(text)) + text + data


def _rezipped(content: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(name, archive.read(name)) for name in archive.namelist()]
    target = rng.randrange(len(records)) if rng.random() < 0.3 else 0
    name, part = records[target]
    if rng.random() < 0.5:
        records[target] = (name, damaged(part, rng))
    else:
        data = bytearray(part)
        for _ in range(rng.choice((1, 1, 2, 5))):
            place = rng.randrange(len(data) + 1)
            numbers = (b"\x8a\x08" + rng.randbytes(8), b"K\x00", b"J\xff\xff\xff\x7f")
            more = rng.choice((b"", bytes([rng.choice(COMMANDS)]), *numbers))
            data[place : place + rng.choice((0, 0, 1, 2, 5))] = more * rng.choice((1, 1, 1, 1000))
        records[target] = (name, bytes(data))
    if rng.random() < 0.1:
        records.append(rng.choice(records))
    file = io.BytesIO()
    compression = zipfile.ZIP_DEFLATED if rng.random() < 0.1 else zipfile.ZIP_STORED
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, part in records:
            archive.writestr(name, part if rng.random() < 0.98 else bytes(2**24))
    return file.getvalue()


# Captions


def picture(index: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (64, 48), (80 * index, 120, 60)).save(file, "PNG")
    return file.getvalue()


def caption_files() -> dict[str, bytes]:
    """Whole ones of every layout, by the name that they need; `PICTURES` are what they speak of."""
    rows = [{"file_name": name, "text": f"a thing called {name}"} for name in PICTURES]
    inside = [{"image": {"bytes": picture(index)}, "text": [f"thing {index}", "a thing"]} for index in range(3)]
    names = {"images": [{"id": index, "file_name": name} for index, name in enumerate(PICTURES)]}
    notes = {"annotations": [{"image_id": index, "caption": f"thing {index}"} for index in range(3)]}
    files = {
        "2.txt": "one red ball\ntwo blue boxes\r\n- Mood: calm\n",
        "2.png.txt": "one red ball",
        "2.caption": "one red ball",
        "2.json": json.dumps({"caption": "one red ball", "tags": ["red", "ball"]}),
        "metadata.jsonl": "\n".join(map(json.dumps, rows)),
        "metadata.csv": "file_name,text\n" + "\n".join(f'{row["file_name"]},"{row["text"]}"' for row in rows),
        "captions.txt": "image,caption\n" + "\n".join(f"{row['file_name']},{row['text']}" for row in rows),
        "flickr.token.txt": "\n".join(f"{row['file_name']}#0\t{row['text']}" for row in rows),
        "captions_val.json": json.dumps(names | notes),
        "meta_cap.json": json.dumps({name: {"caption": f"thing {name}", "tags": "red, ball"} for name in PICTURES}),
        "captions.json": json.dumps(rows),
    }
    found = {name: text.encode() for name, text in files.items()}
    return found | {"shard.tar": _shard(), "metadata.parquet": _parquet(rows), "images.parquet": _parquet(inside)}


def _shard() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in (("a.png", picture(1)), ("a.txt", b"one red ball"), ("b.json", b'{"caption": "x"}')):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def _parquet(rows: list[dict]) -> bytes:
    from pyarrow import Table
    from pyarrow.parquet import write_table

    file = io.BytesIO()
    write_table(Table.from_pylist(rows), file)
    return file.getvalue()


def mutated_captions(name: str, content: bytes, rng: random.Random) -> bytes:
    if not name.endswith((".json", ".jsonl")) or rng.random() < 0.4:
        return damaged(content, rng)
    lines = content.decode().split("\n") if name.endswith(".jsonl") else [content.decode()]
    place = rng.randrange(len(lines))
    lines[place] = json.dumps(odd(json.loads(lines[place]), rng))
    return "\n".join(lines).encode()


def write_pictures(folder: Path) -> None:
    for index, name in enumerate(PICTURES):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(index))
        path.with_suffix(".caption").write_text(f"thing {index} of three", encoding="utf-8")
