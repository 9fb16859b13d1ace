"""The model folder `softrepa`: registering it, listing it, the paths inside it, and the folder of the runs."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import folder_paths

from ..errors import SoftREPAError, is_plain, said, shown, unwritable
from ..files import is_file, is_folder
from ..locks import HeldError, NoLocksError, held
from ..token_files import PUBLISHED

FOLDER = "softrepa"
EXTENSIONS = {".safetensors", ".pth"}
SHOWN = 8
"""Names in an error."""
RUNS = "softrepa_training"
"""Folder of the runs' states and logs, in ComfyUI's output folder."""
STATE = ".checkpoint.safetensors"
LOCK = "lock"
"""In a run's log folder, while somebody writes the run."""
LONGEST, MOST_BYTES = 100, 200
"""Characters of a file name before its number, and bytes: file systems allow 255, and some suffixes follow."""


def home() -> Path:
    """models/softrepa, where new files go whatever other folders are configured."""
    return Path(folder_paths.models_dir) / FOLDER


def register() -> None:
    """Adds models/softrepa beside what extra_model_paths.yaml names, and makes the folder where that is possible.

    Raises nothing: without the folder the pack's other nodes work, and whoever uses it is told what is wrong.
    """
    try:
        home().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        logging.warning("SoftREPA: %s", unwritable(home(), error))
    folder_paths.add_model_folder_path(FOLDER, str(home()))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | EXTENSIONS)


def token_paths() -> dict[str, Path]:
    """The loader's choices, sorted: .safetensors files, and folders that hold published files.

    A published file that lies in a model folder itself is listed by its own name. Of two with one name, the first
    model folder's counts. What cannot be read is not listed.
    """
    paths: dict[str, Path] = {}
    for root in map(Path, folder_paths.get_folder_paths(FOLDER)):
        for path in _files_below(root):
            is_published = path.name in PUBLISHED
            if path.suffix != ".safetensors" and not is_published:
                continue
            listed = path.parent if is_published and path.parent != root else path
            paths.setdefault(str(listed.relative_to(root)), listed)
    return dict(sorted(paths.items()))


def _files_below(root: Path) -> Iterator[Path]:
    """Regular files; each folder once, whatever links lead to it."""
    seen = set()
    for folder, inside, names in os.walk(root, followlinks=True):
        if (real := os.path.realpath(folder)) in seen:
            inside.clear()
            continue
        seen.add(real)
        inside[:] = sorted(set(inside) - {".git"})
        yield from (path for name in sorted(names) if is_file(path := Path(folder, name)))


def token_path(name: str) -> Path:
    """The file or folder that the loader's choice `name` stands for. Raises SoftREPAError when it is gone."""
    paths = token_paths()
    if name in paths:
        return paths[name]
    named = ", ".join([*map(shown, list(paths)[:SHOWN]), *(["..."] if len(paths) > SHOWN else [])])
    expected = f"one of {named}" if paths else "a .safetensors file, or a folder with published .pth files"
    found = "not" if paths else "no token files are"
    raise SoftREPAError(f'Tokens "{shown(name)}": {found} in models/{FOLDER}{_trouble()}, expected {expected} there.')


def _trouble() -> str:
    """What keeps the model folder from being read, in brackets."""
    try:
        list(home().iterdir())
    except OSError as error:
        return f" ({shown(home())}: {said(error)})"
    return ""


def listed_name(path: Path) -> str:
    """How the loader calls a token file."""
    return str(path.relative_to(home())) if home() in path.parents else path.name


def fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Name, mtime and size of the file and of the table beside it, or of the published files in a folder."""
    if path.is_dir():
        files = sorted(path.glob("*.pth"))
    else:
        table = path.with_name(PUBLISHED.get(path.name, path.name))
        files = [path, table] if table != path and table.exists() else [path]
    return [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]


def new_token_path(filename_prefix: str) -> Path:
    """A path under models/softrepa that does not exist yet: prefix_00001.safetensors and so on."""
    parts = Path(filename_prefix).parts
    fits = parts and all(map(is_file_name, parts))
    if not fits or not is_inside(home() / filename_prefix, home()):
        raise SoftREPAError(
            f'filename_prefix is "{shown(filename_prefix)}", expected a name of at most {LONGEST} characters inside '
            f"models/{FOLDER} (and {MOST_BYTES} bytes, which are fewer letters of some languages)."
        )
    try:
        folder, stem, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, str(home()))
    except OSError as error:
        raise unwritable(home() / filename_prefix, error) from None
    while True:
        path = Path(folder) / f"{stem}_{counter:05}.safetensors"
        # a killed run may have left only its state, one that has just begun only its log folder
        if not any(os.path.lexists(one) for one in (path, state_path(path), log_folder(path))):
            return path
        counter += 1


def is_file_name(part: str) -> bool:
    """Whether every system can write a file whose name begins so, and everybody can read the name."""
    try:
        size = len(part.encode())
    except UnicodeEncodeError:
        return False
    return len(part) <= LONGEST and size <= MOST_BYTES and all(map(is_plain, part))


def is_inside(path: Path, folder: Path) -> bool:
    """Also where links lead."""
    return Path(os.path.realpath(folder)) in Path(os.path.realpath(path)).parents


def reserved_token_path(filename_prefix: str) -> Path:
    """As `new_token_path`, for a run: nobody else gets it, also while nothing is written."""
    while True:
        path = new_token_path(filename_prefix)
        check_runs(path)
        try:
            log_folder(path).mkdir(parents=True)
        except FileExistsError as error:
            if not log_folder(path).parent.is_dir():  # a file is there: no other number would help
                raise unwritable(log_folder(path), error) from None
            continue
        except OSError as error:
            raise unwritable(log_folder(path), error) from None
        return path


def check_runs(tokens: Path) -> None:
    """Raises SoftREPAError where the run that writes `tokens` would follow a link out of the output folder."""
    output, logs = Path(folder_paths.get_output_directory()), log_folder(tokens)
    for path in (state_path(tokens), logs, *(logs.iterdir() if is_folder(logs) else ())):
        if not is_inside(path, output):
            raise SoftREPAError(
                f"{shown(path)} leads to {shown(os.path.realpath(path))}, expected a place in ComfyUI's output folder; "
                "--output-directory moves that as a whole."
            )


@contextmanager
def claimed(tokens: Path) -> Iterator[str]:
    """Keeps the run that writes `tokens` from being written by anybody else; gives a line where that is not possible.

    Raises SoftREPAError where somebody does so already.
    """
    check_runs(tokens)
    lock, notice = log_folder(tokens) / LOCK, ""
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(lock))
        except HeldError:
            raise SoftREPAError(
                f"resume: {shown(state_path(tokens).name)} is being written by another run at this moment, "
                "expected that to be finished, another filename_prefix, or resume off."
            ) from None
        except NoLocksError as error:
            notice = f"{shown(lock.parent)} knows no locks ({error}): start no second run that resumes this one."
            logging.warning("SoftREPA: %s", notice)
        except OSError as error:
            raise unwritable(lock, error) from None
        yield notice


def release(tokens: Path) -> None:
    """What a run had reserved and left empty."""
    with suppress(OSError):
        log_folder(tokens).rmdir()


def state_path(tokens: Path) -> Path:
    """Where the run that writes the token file `tokens` keeps its state, what it is gone on with by."""
    return _runs() / tokens.relative_to(home()).with_suffix(STATE)


def log_folder(tokens: Path) -> Path:
    """Where the run that writes the token file `tokens` keeps its log and its previews."""
    return state_path(tokens).with_name(tokens.stem)


def tokens_of_state(state: Path) -> Path:
    """The inverse of `state_path`."""
    inside = state.relative_to(_runs())
    return home() / inside.with_name(inside.name.removesuffix(STATE) + ".safetensors")


def states(filename_prefix: str) -> list[Path]:
    """Of the runs with this prefix, the one that was written last first."""
    first = state_path(new_token_path(filename_prefix))
    stem = first.name.removesuffix(STATE).rpartition("_")[0]
    numbered = re.compile(re.escape(stem) + r"_\d+" + re.escape(STATE))
    found = [path for path in first.parent.glob(f"*{STATE}") if numbered.fullmatch(path.name)]
    for path in found:
        check_runs(tokens_of_state(path))
    return sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _runs() -> Path:
    return Path(folder_paths.get_output_directory()) / RUNS
