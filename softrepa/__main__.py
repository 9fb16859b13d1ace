"""Command line: `python -m softrepa convert`, `inspect`, `train`, `score` and `evaluate`."""

import argparse
import io
import json
import os
import sys
from contextlib import nullcontext
from dataclasses import fields
from pathlib import Path

from .errors import SoftREPAError, printable, shown, unwritable
from .families import FAMILIES

if __name__ == "__main__" and sys.argv[1:2] in (["train"], ["score"]) and os.environ.get("RANK", "0") == "0":
    print("starting PyTorch and ComfyUI", file=sys.stderr, flush=True)  # which take seconds

PACK = Path(__file__).absolute().parents[1]
PYTHONS = (
    "../../../python_embeded/python.exe",
    *(f"../../{folder}/{python}" for folder in (".venv", "venv") for python in ("Scripts/python.exe", "bin/python")),
)
"""Of installations that hold the pack in ComfyUI's custom_nodes: portable, and with a virtual environment."""


def comfyuis_python() -> str:
    """The one that is there, in the words of an error, or where it usually is."""
    paths = [Path(os.path.normpath(PACK / name)) for name in PYTHONS]
    found = next((path for path in paths if path.is_file() and str(path) != sys.executable), None)
    return (
        printable(str(found))
        if found
        else ("in a portable installation python_embeded\\python.exe, otherwise the one of its virtual environment")
    )


try:
    from . import configuration, token_files
    from .comfy import startup
    from .progress_line import ProgressLine
    from .training.inputs import ScoreInputs
    from .training.ranks import joined
except ModuleNotFoundError as missing:
    if missing.name not in ("torch", "safetensors"):
        raise
    python = printable(sys.executable)
    sys.exit(f"error: {python} has no {missing.name}, expected the Python that runs ComfyUI: {comfyuis_python()}.")

EPILOG = "What stands behind -- goes to ComfyUI as its own options, for example: -- --lowvram"


def convert(args) -> None:
    source = published_source(args.inputs)
    out = Path(args.output)
    if out.suffix != ".safetensors":
        raise SoftREPAError(f'OUT is "{shown(out)}", expected a name that ends in .safetensors.')
    if os.path.lexists(out) and not args.force:
        raise SoftREPAError(f'OUT "{shown(out)}" exists, expected a new name (or --force).')
    tokens = token_files.load(source, family=args.family, blocks=args.blocks)
    if tokens.time_table is None:
        print("note: no time table was found; these are static tokens", file=sys.stderr)
    try:
        token_files.save(tokens, out)
    except OSError as error:
        raise unwritable(out, error) from None
    print(printable(str(out)))


def published_source(inputs: list[str]) -> Path:
    """The one file or folder to load: a folder, a file, or a token file with its time table in either order."""
    paths = [Path(name) for name in inputs]
    if len(paths) == 1:
        return paths[0]
    for tokens, table in token_files.PUBLISHED.items():
        pair = {path.name: path for path in paths}
        if len(paths) == 2 and set(pair) == {tokens, table} and paths[0].parent == paths[1].parent:
            return pair[tokens]
    found = shown(", ".join(inputs))
    pairs = " or ".join(f"{tokens} with {table}" for tokens, table in token_files.PUBLISHED.items())
    raise SoftREPAError(f"IN is {found}, expected one file, one folder, or {pairs} from one folder.")


def inspect(args) -> None:
    print("\n".join(token_files.summary(token_files.load(args.file))))


def train(args) -> None:
    config = with_options(configuration.read_config(Path(args.config)), args)
    comfyui = startup.comfyui_folder(args.comfyui)
    configuration.check_to_train(config)  # before minutes of loading
    startup.start(comfyui, args.comfyui_options)
    from .comfy import headless  # it can be imported now

    path = headless.train(config, args.ranks)
    if args.ranks.is_first:
        print(printable(str(path)))


def score(args) -> None:
    config = with_options(configuration.read_config(Path(args.config)) if args.config else {}, args)
    comfyui = startup.comfyui_folder(args.comfyui)
    configuration.check_to_score(config)  # before minutes of loading
    startup.start(comfyui, args.comfyui_options)
    from .comfy import headless  # it can be imported now

    asked = ScoreInputs(**{field.name: getattr(args, field.name) for field in fields(ScoreInputs)})
    found = headless.score(config, args.tokens, asked, args.ranks)
    if args.ranks.is_first:
        print(json.dumps(found, indent=1))


def evaluate(args) -> None:
    from .evaluation.inputs import inputs_of  # with PIL, which other commands do without

    path = Path(args.config)
    config = with_options(configuration.read_config(path), args)
    comfyui = startup.comfyui_folder(args.comfyui)
    inputs = inputs_of(config, args.edits)  # before minutes of loading
    print(f"starting ComfyUI in {printable(str(comfyui))}", file=sys.stderr)
    startup.start(comfyui, args.comfyui_options)
    from .comfy.evaluation import run  # it can be imported now

    with ProgressLine() as line:
        print(printable(str(run.evaluate(inputs, path.stem, args.download, line))))


def with_options(config: dict, args) -> dict:
    given = {"checkpoint": args.checkpoint, "folder": getattr(args, "folder", None)}
    if getattr(args, "resume", False):
        given["resume"] = True
    return config | {name: value for name, value in given.items() if value is not None}


def add_place(command, folder: bool = True) -> None:
    """Where ComfyUI is, and what of it is used."""
    command.add_argument("--checkpoint", help="its name in ComfyUI's checkpoints, or a path")
    if folder:
        command.add_argument("--folder", help="the images and captions, named as the dataset node lists them")
    command.add_argument("--comfyui", help="ComfyUI's folder; else COMFYUI_PATH, or the one that holds this pack")


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="python -m softrepa", description="Soft token files, and training without ComfyUI's server.", epilog=EPILOG
    )
    top.set_defaults(together=nullcontext)  # processes that evaluate never wait for each other
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
    command = commands.add_parser("train", help="train as the node does, in a ComfyUI without its server")
    command.add_argument("config", metavar="CONFIG", help="a .json of the nodes' inputs, or a trained .safetensors")
    command.add_argument("--resume", action="store_true", help="go on from the newest checkpoint of the same name")
    add_place(command)
    command.set_defaults(run=train, together=joined)
    command = commands.add_parser("score", help="retrieval, contrastive loss and information, as JSON")
    command.add_argument("config", metavar="CONFIG", nargs="?", help="as for train; only its dataset is used")
    command.add_argument("--tokens", help="a token file, or its name in ComfyUI; without, the plain model")
    for field in fields(ScoreInputs):
        command.add_argument(f"--{field.name.replace('_', '-')}", type=type(field.default), default=field.default)
    add_place(command)
    command.set_defaults(run=score, together=joined)
    command = commands.add_parser("evaluate", help="the paper's measures of what a model draws or edits, as a table")
    command.add_argument("config", metavar="CONFIG", help="a .json: what is drawn, in which arms, what judges it")
    command.add_argument("--edits", action="store_true", help="edits of photographs instead of pictures of captions")
    command.add_argument("--download", action="store_true", help="fetch weights of judges that are not there")
    add_place(command, folder=False)
    command.set_defaults(run=evaluate)
    return top


def main() -> int:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # not every terminal has every letter
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser().parse_args(words[:end])
    args.comfyui_options = words[end + 1 :]
    try:
        with args.together() as args.ranks:
            args.run(args)
    except SoftREPAError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
