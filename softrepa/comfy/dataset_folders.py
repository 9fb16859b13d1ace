"""The folders a dataset can be: below ComfyUI's input folder, and the `softrepa_datasets` of extra_model_paths.yaml."""

import os
from pathlib import Path, PurePath

import folder_paths

from ..captions import IMAGE_SUFFIXES, SIDECAR_SUFFIXES, is_table, sorted_files
from ..errors import SoftREPAError

FOLDER = "softrepa_datasets"


def dataset_names() -> list[str]:
    return sorted(dataset_paths())


def dataset_paths() -> dict[str, Path]:
    """Folders with a captioned image, or with images and a caption table, in them or below them, by name.

    A folder of the input folder is called by its path there, one of `softrepa_datasets` by its own name and the path
    below it; where that name is taken, with the whole path behind it.
    """
    found = {}
    source = Path(folder_paths.get_input_directory())
    for path in _captioned(source):
        if path != source:
            found[path.relative_to(source).as_posix()] = path
    for root in map(Path, folder_paths.folder_names_and_paths.get(FOLDER, ([],))[0]):
        for path in _captioned(root):
            name = (PurePath(root.name) / path.relative_to(root)).as_posix()
            found[f"{name} ({path})" if name in found else name] = path
    return found


def dataset_path(name: str) -> Path:
    paths = dataset_paths()
    if name not in paths:
        expected = f"one of {', '.join(sorted(paths))}" if paths else "a folder of images with captions there"
        raise SoftREPAError(
            f'folder is "{name}", which holds no captioned images below ComfyUI\'s input folder or {FOLDER}, '
            f"expected {expected}."
        )
    return paths[name]


def fingerprint(root: Path) -> list[tuple[str, int, int]]:
    """Name, date and length of every file: changes with any image or caption."""
    facts = [(path, path.stat()) for path in sorted_files(root) if path.exists()]
    return [(str(path), stat.st_mtime_ns, stat.st_size) for path, stat in facts]


def _captioned(root: Path) -> list[Path]:
    """`root` and folders below it that may be datasets, by names alone: the files are not opened."""
    holds = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        if os.path.realpath(folder) in holds:  # a link back
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        holds[os.path.realpath(folder)] = Path(folder), _kinds(files)
    total: dict[Path, set[str]] = {}
    for path, kinds in holds.values():
        for above in (path, *path.parents):
            total.setdefault(above, set()).update(kinds)
            if above == root:
                break
    return [path for path, kinds in total.items() if "captioned" in kinds or {"image", "table"} <= kinds]


def _kinds(files: list[str]) -> set[str]:
    paths = [PurePath(name) for name in files if not name.startswith(".")]
    images = {path.stem for path in paths if path.suffix.lower() in IMAGE_SUFFIXES}
    kinds = {"image"} if images else set()
    if any(path.stem in images and path.suffix.lower() in SIDECAR_SUFFIXES for path in paths):
        kinds.add("captioned")
    if any(is_table(path) for path in paths):
        kinds.add("table")
    return kinds
