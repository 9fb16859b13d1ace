"""Command line: `python -m softrepa convert IN... OUT` and `python -m softrepa inspect FILE`."""

import argparse
import sys
from pathlib import Path

from . import checkpoint
from .errors import SoftREPAError
from .families import FAMILIES


def convert(args) -> None:
    source = published_source(args.inputs)
    out = Path(args.output)
    if out.suffix != ".safetensors":
        raise SoftREPAError(f'OUT is "{out}", expected a name that ends in .safetensors.')
    if out.exists() and not args.force:
        raise SoftREPAError(f'OUT "{out}" exists, expected a new name (or --force).')
    tokens = checkpoint.load(source, family=args.family, blocks=args.blocks)
    if tokens.time_table is None:
        print("note: no time table was found; these are static tokens", file=sys.stderr)
    checkpoint.save(tokens, out)
    print(out)


def published_source(inputs: list[str]) -> Path:
    """The one file or folder to load: a folder, a file, or a token file with its time table in either order."""
    paths = [Path(name) for name in inputs]
    if len(paths) == 1:
        return paths[0]
    for tokens, table in checkpoint.PUBLISHED.items():
        pair = {path.name: path for path in paths}
        if len(paths) == 2 and set(pair) == {tokens, table} and paths[0].parent == paths[1].parent:
            return pair[tokens]
    found = ", ".join(inputs)
    pairs = " or ".join(f"{tokens} with {table}" for tokens, table in checkpoint.PUBLISHED.items())
    raise SoftREPAError(f"IN is {found}, expected one file, one folder, or {pairs} from one folder.")


def inspect(args) -> None:
    print("\n".join(checkpoint.summary(checkpoint.load(args.file))))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="python -m softrepa", description="Soft token files.")
    commands = top.add_subparsers(required=True)
    command = commands.add_parser("convert", help="published .pth files, or a folder of them, to .safetensors")
    command.add_argument("inputs", nargs="+", metavar="IN")
    command.add_argument("output", metavar="OUT")
    command.add_argument("--family", choices=FAMILIES, help="instead of what the shapes say")
    command.add_argument("--blocks", help="instead of what is usual: a list of down,mid,up, or a count (SD3)")
    command.add_argument("--force", action="store_true", help="overwrite OUT")
    command.set_defaults(run=convert)
    command = commands.add_parser("inspect", help="shapes, family, blocks, norms and metadata of a file")
    command.add_argument("file", metavar="FILE")
    command.set_defaults(run=inspect)
    return top


def main() -> int:
    args = parser().parse_args()
    try:
        args.run(args)
    except SoftREPAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
