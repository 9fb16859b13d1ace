"""The files of this repository: what git tracks, and new ones that it does not ignore."""

import subprocess
from pathlib import Path

from softrepa_tests.conftest import ROOT


def files(*patterns: str, options: tuple[str, ...] = ("--exclude-standard",)) -> list[Path]:
    """Paths relative to the root that `patterns` of git match; all without patterns."""
    command = ["git", "ls-files", "-z", "--cached", "--others", *options, "--", *patterns]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return sorted(Path(name) for name in listed.split("\0") if name and (ROOT / name).is_file())


def shipped() -> list[Path]:
    """What the archive in ComfyUI's registry holds: the files that .comfyignore leaves."""
    kept_out = set(files(options=("--ignored", "--exclude-from=.comfyignore")))
    return [path for path in files() if path not in kept_out]
