"""The model folder `softrepa`: registering it, listing it, and the paths inside it."""

from pathlib import Path

import folder_paths

from ..checkpoint import PUBLISHED
from ..errors import SoftREPAError

FOLDER = "softrepa"
EXTENSIONS = {".safetensors", ".pth"}


def register() -> None:
    """Adds models/softrepa beside what extra_model_paths.yaml names, and makes the folder."""
    home = Path(folder_paths.models_dir) / FOLDER
    home.mkdir(parents=True, exist_ok=True)
    folder_paths.add_model_folder_path(FOLDER, str(home))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    folder_paths.folder_names_and_paths[FOLDER] = (paths, set(extensions) | EXTENSIONS)


def token_names() -> list[str]:
    """Choices of the loader: .safetensors files, and folders that hold published files.

    A published file that lies in the model folder itself is listed by its own name.
    """
    names = set()
    for file in folder_paths.get_filename_list(FOLDER):
        path = Path(file)
        if path.suffix == ".safetensors":
            names.add(file)
        elif path.name in PUBLISHED:
            names.add(file if path.parent == Path() else str(path.parent))
    return sorted(names)


def token_path(name: str) -> Path:
    """The file or folder that the loader's choice `name` stands for. Raises SoftREPAError when it is gone."""
    if name in token_names():
        for root in folder_paths.get_folder_paths(FOLDER):
            path = Path(root) / name
            if path.exists():
                return path
    names = token_names()
    expected = f"one of {', '.join(names)}" if names else "a .safetensors file, or a folder with published .pth files"
    found = "not" if names else "no token files are"
    raise SoftREPAError(f'Tokens "{name}": {found} in models/{FOLDER}, expected {expected} there.')


def fingerprint(path: Path) -> list[tuple[str, int, int]]:
    """Name, mtime and size of the file, or of the published files in a folder."""
    files = sorted(path.glob("*.pth")) if path.is_dir() else [path]
    return [(file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files]


def new_token_path(filename_prefix: str) -> Path:
    """A path under models/softrepa that does not exist yet: prefix_00001.safetensors and so on."""
    home = folder_paths.get_folder_paths(FOLDER)[0]
    target = (Path(home) / filename_prefix).resolve()
    if not Path(filename_prefix).name or Path(home).resolve() not in target.parents:
        raise SoftREPAError(f'filename_prefix is "{filename_prefix}", expected a name inside models/{FOLDER}.')
    folder, stem, counter, _, _ = folder_paths.get_save_image_path(filename_prefix, home)
    while (path := Path(folder) / f"{stem}_{counter:05}.safetensors").exists():
        counter += 1
    return path
