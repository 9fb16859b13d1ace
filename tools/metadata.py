"""What the registry's metadata in pyproject.toml lack: the addresses that are known once the repository is public.

    python3 -m tools.metadata

Prints what is missing or wrong, a line each, and ends with 1 where there is anything. Standard library only.
"""

import argparse
import re
import sys
from pathlib import Path

import tomllib

ROOT = Path(__file__).absolute().parents[1]
PICTURES = {"Icon": "icon.png", "Banner": "banner.png"}
REPOSITORY = re.compile(r"https://github\.com/([\w.-]+/[\w.-]+)")


def missing(pyproject: dict) -> list[str]:
    """A sentence for each field that is not there or has a wrong address."""
    address = pyproject["project"]["urls"].get("Repository", "")
    repository = REPOSITORY.fullmatch(address)
    found = []
    if not repository:
        found.append(f'project.urls.Repository is "{address}", expected https://github.com/OWNER/NAME.')
    name = repository[1] if repository else "OWNER/NAME"
    for field, picture in PICTURES.items():
        given = pyproject["tool"]["comfy"].get(field, "")
        expected = f"https://raw.githubusercontent.com/{name}/main/{picture}"
        if given != expected:
            found.append(f'tool.comfy.{field} is "{given}", expected {expected}.')
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m tools.metadata", description=__doc__.splitlines()[0])
    parser.parse_args()
    found = missing(tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")))
    print("\n".join(found) or "Nothing is missing.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
