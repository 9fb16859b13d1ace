"""The files of this repository, as git tracks them."""

import subprocess
from pathlib import Path

from softrepa_tests.conftest import ROOT


def tracked(*patterns: str, options: tuple[str, ...] = ()) -> list[Path]:
    """Tracked files relative to the root, those that `patterns` of git match; all without patterns."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", *options, "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def shipped() -> list[Path]:
    """What the archive in ComfyUI's registry holds: the tracked files that .comfyignore leaves."""
    kept_out = set(tracked(options=("--cached", "--ignored", "--exclude-from=.comfyignore")))
    return [path for path in tracked() if path not in kept_out]
