"""A folder of captioned images as examples: what each file holds, its training size, and what a person should know."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path

from .batches import Example
from .buckets import Size, bucket_sizes, join_small, nearest
from .captions import Rejected, list_folder
from .dataset import divide, named_examples
from .errors import SoftREPAError
from .files import write_atomically
from .images import UNREADABLE, prepared, upright_size

Tick = Callable[[int, int], None]
"""Called with how many files are done, of how many; may raise to stop."""


@dataclass(frozen=True)
class ImageFile:
    """What reading a file once told: the digest of its bytes, its size as seen, or why it cannot be used."""

    digest: str
    size: Size
    problem: str = ""


@dataclass
class ImageFolder:
    """The examples of a folder, where their files are, and lines for the person."""

    name: str
    paths: dict[str, Path]
    train: list[Example]
    validation: list[Example]
    notes: list[str]

    def pixels(self, example: Example):
        """(height, width, 3) float32 in 0..1 at the training size. Raises SoftREPAError when the file has changed."""
        try:
            data = self.paths[example.name].read_bytes()
            if _digest(data) == example.image:
                return prepared(data, example.size)
            reason = "its content has changed"
        except UNREADABLE as error:
            reason = _reason(error)
        raise SoftREPAError(
            f'Dataset "{self.name}": {example.name} cannot be used any more ({reason}), '
            "expected the image that was there when the dataset was read; run again to read the folder anew."
        )


def read_folder(
    root: Path,
    name: str,
    resolution: int,
    bucketing: bool,
    validation_percent: float,
    index: Path,
    tick: Tick = lambda done, total: None,
) -> ImageFolder:
    """Reads every captioned image below `root`; `index` remembers files whose date and length are as before."""
    listing = list_folder(root)
    files = _inspected(listing.paths, index, tick)
    rejected = list(listing.rejected)
    examples = []
    sizes = bucket_sizes(resolution) if bucketing else [(resolution, resolution)]
    for image, file in files.items():
        if file.problem:
            rejected.append(Rejected(image, file.problem))
        else:
            examples.append(Example(image, file.digest, tuple(listing.captions[image]), nearest(file.size, sizes)))
    if not examples:
        raise SoftREPAError(
            f'folder "{name}" has no captioned image{_rejections(rejected)}, expected images with a .txt, .caption, '
            ".jsonl, captions.json or .parquet file beside them."
        )
    train, validation = divide(examples, validation_percent)
    if bucketing:
        train, validation = (join_small(part) for part in (train, validation))
    notes = _notes(train + validation, files)
    if rejected:
        notes.append(f"left out {len(rejected)}{_rejections(rejected)}")
    return ImageFolder(name, listing.paths, train, validation, notes)


def _inspected(paths: dict[str, Path], index: Path, tick: Tick) -> dict[str, ImageFile]:
    known = _read_index(index)
    files, entries = {}, {}
    try:
        for done, (name, path) in enumerate(paths.items()):
            tick(done, len(paths))
            try:
                facts = path.stat()
                stamp = [facts.st_size, facts.st_mtime_ns]
                old = known.get(name)
                if old is not None and old[:2] == stamp:
                    files[name] = ImageFile(old[2], tuple(old[3]), old[4])
                else:
                    files[name] = _inspect(path.read_bytes())
                entries[name] = [*stamp, *astuple(files[name])]
            except OSError as error:
                files[name] = ImageFile("", (0, 0), _reason(error))
    finally:  # when stopped halfway too
        write_atomically(index, lambda temporary: temporary.write_text(json.dumps(entries), encoding="utf-8"))
    return files


def _read_index(index: Path) -> dict[str, list]:
    try:
        return json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _inspect(data: bytes) -> ImageFile:
    try:
        return ImageFile(_digest(data), upright_size(data))
    except UNREADABLE as error:
        return ImageFile(_digest(data), (0, 0), _reason(error))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _reason(error: BaseException) -> str:
    """In the words of whoever raised it; PIL names the memory it read from when it knows no such format."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    return "no image that can be opened" if "cannot identify image file" in text else text or type(error).__name__


def _notes(examples: list[Example], files: dict[str, ImageFile]) -> list[str]:
    originals = [files[one.name].size for one in examples]
    least, most = (pick(originals, key=lambda size: size[0] * size[1]) for pick in (min, max))
    notes = [f"originals from {least[0]}x{least[1]} to {most[0]}x{most[1]}"]
    pairs = zip(examples, originals, strict=True)
    enlarged = [one.name for one, size in pairs if size[0] < one.size[0] or size[1] < one.size[1]]
    if enlarged:
        notes.append(f"{len(enlarged)} are enlarged: {named_examples(enlarged)}")
    return notes


def _rejections(rejected: list[Rejected]) -> str:
    """ " (reason: name, name; ...)", the most frequent reasons first."""
    reasons: dict[str, list[str]] = {}
    for one in rejected:
        reasons.setdefault(one.reason, []).append(one.name)
    told = [f"{reason}: {named_examples(names)}" for reason, names in sorted(reasons.items(), key=lambda r: -len(r[1]))]
    return f" ({'; '.join(told)})" if told else ""
