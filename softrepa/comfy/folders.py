"""The model folder `softrepa`: registering it, listing it, and the paths inside it."""

import re
from contextlib import suppress
from pathlib import Path

import folder_paths

from ..checkpoint import PUBLISHED
from ..errors import SoftREPAError

FOLDER = "softrepa"
EXTENSIONS = {".safetensors", ".pth"}
SHOWN = 8
"""Names in an error."""
RUNS = "softrepa_training"
"""Folder of the runs' checkpoints and logs, in ComfyUI's output folder."""
CHECKPOINT = ".checkpoint.safetensors"
LONGEST = 100
"""Characters of a file name, before its number."""


def home() -> Path:
    """models/softrepa, where new files go whatever other folders are configured."""
    return Path(folder_paths.models_dir) / FOLDER


def register() -> None:
    """Adds models/softrepa beside what extra_model_paths.yaml names, and makes the folder."""
    home().mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(home()))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | EXTENSIONS)


def token_paths() -> dict[str, Path]:
    """The loader's choices, sorted: .safetensors files, and folders that hold published files.

    A published file that lies in a model folder itself is listed by its own name. Of two with one name, the first
    model folder's counts.
    """
    paths: dict[str, Path] = {}
    for file in folder_paths.get_filename_list(FOLDER):
        inside = Path(file)
        if inside.suffix != ".safetensors" and inside.name not in PUBLISHED:
            continue
        found = folder_paths.get_full_path(FOLDER, file)
        if found is None:  # a dangling link
            continue
        is_folder = inside.suffix == ".pth" and inside.parent != Path()
        name, path = (inside.parent, Path(found).parent) if is_folder else (inside, Path(found))
        paths.setdefault(str(name), path)
    return dict(sorted(paths.items()))


def token_path(name: str) -> Path:
    """The file or folder that the loader's choice `name` stands for. Raises SoftREPAError when it is gone."""
    paths = token_paths()
    if name in paths:
        return paths[name]
    shown = ", ".join([*list(paths)[:SHOWN], *(["..."] if len(paths) > SHOWN else [])])
    expected = f"one of {shown}" if paths else "a .safetensors file, or a folder with published .pth files"
    found = "not" if paths else "no token files are"
    raise SoftREPAError(f'Tokens "{name}": {found} in models/{FOLDER}, expected {expected} there.')


def listed_name(path: Path) -> str:
    """How the loader calls a token file."""
    return str(path.relative_to(home())) if home() in path.parents else path.name


def fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Name, mtime and size of the file, or of the published files in a folder."""
    files = sorted(path.glob("*.pth")) if path.is_dir() else [path]
    return [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]


def new_token_path(filename_prefix: str) -> Path:
    """A path under models/softrepa that does not exist yet: prefix_00001.safetensors and so on."""
    name = Path(filename_prefix).name
    fits = name and len(name) <= LONGEST and "\0" not in filename_prefix
    if not fits or home().resolve() not in (home() / filename_prefix).resolve().parents:
        raise SoftREPAError(
            f'filename_prefix is "{filename_prefix[:LONGEST]}", expected a name of at most {LONGEST} characters inside '
            f"models/{FOLDER}."
        )
    folder, stem, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, str(home()))
    while True:
        path = Path(folder) / f"{stem}_{counter:05}.safetensors"
        # a killed run may have left only its checkpoint, one that has just begun only its log folder
        if not any(one.exists() for one in (path, checkpoint_path(path), log_folder(path))):
            return path
        counter += 1


def reserved_token_path(filename_prefix: str) -> Path:
    """As `new_token_path`, for a run: nobody else gets it, also while nothing is written."""
    while True:
        path = new_token_path(filename_prefix)
        try:
            log_folder(path).mkdir(parents=True)
        except FileExistsError:
            continue
        return path


def release(tokens: Path) -> None:
    """What a run had reserved and left empty."""
    with suppress(OSError):
        log_folder(tokens).rmdir()


def checkpoint_path(tokens: Path) -> Path:
    """Where the run that writes the token file `tokens` keeps its checkpoint."""
    return _runs() / tokens.relative_to(home()).with_suffix(CHECKPOINT)


def log_folder(tokens: Path) -> Path:
    """Where the run that writes the token file `tokens` keeps its log and its previews."""
    return checkpoint_path(tokens).with_name(tokens.stem)


def tokens_of_checkpoint(checkpoint: Path) -> Path:
    """The inverse of `checkpoint_path`."""
    inside = checkpoint.relative_to(_runs())
    return home() / inside.with_name(inside.name.removesuffix(CHECKPOINT) + ".safetensors")


def checkpoints(filename_prefix: str) -> list[Path]:
    """Of the runs with this prefix, the one that was written last first."""
    first = checkpoint_path(new_token_path(filename_prefix))
    stem = first.name.removesuffix(CHECKPOINT).rpartition("_")[0]
    numbered = re.compile(re.escape(stem) + r"_\d+" + re.escape(CHECKPOINT))
    found = [path for path in first.parent.glob(f"*{CHECKPOINT}") if numbered.fullmatch(path.name)]
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _runs() -> Path:
    return Path(folder_paths.get_output_directory()) / RUNS
