"""The folders a dataset can be: below ComfyUI's input folder, and the `softrepa_datasets` of extra_model_paths.yaml."""

import contextlib
import hashlib
from pathlib import Path, PurePath

import folder_paths

from ...data.captions import folders_in, may_hold_images
from ...data.sources import file_stamp
from ...data.tables import is_text
from ...errors import SoftREPAError, shown

FOLDER = "softrepa_datasets"
SHOWN, LONGEST = 8, 60
"""Names in an error, and characters of each."""


def dataset_names() -> list[str]:
    return sorted(dataset_paths())


def dataset_paths() -> dict[str, Path]:
    """Folders with an image, or with what images are packed in, in them or below them, by name.

    With captions or without: what is missing is said when the folder is read. A folder of the input folder is called
    by its path there, one of `softrepa_datasets` by its own name and the path below it; where that name is taken, with
    the whole path behind it.
    """
    found = {}
    source = Path(folder_paths.get_input_directory())
    for path in _with_images(source):
        if path != source:
            found[path.relative_to(source).as_posix()] = path
    for root in map(Path, folder_paths.folder_names_and_paths.get(FOLDER, ([],))[0]):
        for path in _with_images(root):
            name = (PurePath(root.name) / path.relative_to(root)).as_posix()
            found[f"{name} ({path})" if name in found else name] = path
    return {name: path for name, path in found.items() if is_text(name)}


def dataset_path(name: str) -> Path:
    paths = dataset_paths()
    if name not in paths:
        names = [shown(one, LONGEST) for one in sorted(paths)]
        more = ", ..." if len(names) > SHOWN else ""
        expected = f"one of {', '.join(names[:SHOWN])}{more}" if paths else "a folder of images with captions there"
        raise SoftREPAError(
            f'folder is "{shown(name)}", which holds no images below ComfyUI\'s input folder or {FOLDER}, '
            f"expected {expected}."
        )
    return paths[name]


def fingerprint(root: Path) -> str:
    """Changes with any file that is written, replaced, renamed or exchanged; none is read."""
    digest = hashlib.sha256()
    for path in sorted(folder / name for folder, names in folders_in(root) for name in names):
        with contextlib.suppress(OSError):  # gone, or not to be looked at
            digest.update(repr((str(path), file_stamp(path.stat()))).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


def _with_images(root: Path) -> list[Path]:
    """`root` and folders below it that may be datasets, by names alone: the files are not opened."""
    found: dict[Path, None] = {}
    for folder, names in folders_in(root):
        if any(map(may_hold_images, names)):
            for above in (folder, *folder.parents):
                found[above] = None
                if above == root:
                    break
    return list(found)
