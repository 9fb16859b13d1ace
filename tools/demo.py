"""The shipped text-to-image workflows in a real, headless ComfyUI: one seed without and with soft tokens.

    python3 -m tools.demo

needs nothing but Python: it prepares a ComfyUI (see environment.py) and draws the first twelve of a fixed list of
prompts with the small world's model and its tokens, and reads what is drawn (see benchmarks/smallworld/README.md). With
checkpoints of your own:

    python3 -m tools.demo --sd15 CHECKPOINT --sd15-tokens FILE --prompt "a red cube on a blue ball"

--stand-ins instead runs every family that fits, on made-up checkpoints whose pictures are patterns. Leaves a labelled
picture for each model in ./demo_output and prints how much the tokens changed.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from . import environment

ROOT = Path(__file__).absolute().parents[1]
TITLES = {"sd15": "SD1.5", "sdxl": "SDXL", "sd3": "SD3"}
COLUMNS = 4
STAND_INS = ("sd15", "sd3")  # the smallest SDXL checkpoint that ComfyUI recognises is too large to make up


@dataclass(frozen=True)
class Job:
    """One model and its tokens: a person's own, or one of ours. None leaves a setting to the workflow."""

    family: str
    title: str
    checkpoint: Path
    tokens: Path
    prompts: tuple[str | None, ...] = (None,)
    steps: int | None = None
    size: int | None = None
    cfg: float | None = None
    is_read: bool = False
    """Whether the checker can read the pictures: they are of a fixed list of prompts."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m tools.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for family, title in TITLES.items():
        parser.add_argument(f"--{family}", type=path_of_user, metavar="CHECKPOINT", help=f"{title} checkpoint")
        parser.add_argument(
            f"--{family}-tokens",
            type=path_of_user,
            metavar="FILE",
            help=("its token file, or a folder with the published .pth files"),
        )
    parser.add_argument("--stand-ins", action="store_true", help="checkpoints with random weights, of SD1.5 and SD3")
    parser.add_argument("--prompt", help="instead of the workflow's own")
    parser.add_argument("--steps", type=int, help="sampling steps")
    parser.add_argument("--size", type=int, help="width and height in pixels")
    parser.add_argument("--seed", type=int, help="of both images")
    parser.add_argument("--out", type=path_of_user, default=Path("demo_output").absolute(), metavar="DIR")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    for family in TITLES:
        checkpoint, tokens = getattr(arguments, family), getattr(arguments, f"{family}_tokens")
        if (checkpoint is None) != (tokens is None):
            parser.error(f"--{family} and --{family}-tokens go together: give both or neither")
    return arguments


def path_of_user(text: str) -> Path:
    return Path(text).expanduser().absolute()


def jobs(arguments: argparse.Namespace) -> list[Job]:
    """The person's own models; where none is named, the small world's or the stand-ins."""
    own = [
        Job(family, title, getattr(arguments, family), getattr(arguments, f"{family}_tokens"))
        for family, title in TITLES.items()
        if getattr(arguments, family)
    ]
    for job in own:
        for path in (job.checkpoint, job.tokens):
            if not path.exists():
                sys.exit(f"{path} does not exist.")
        for other in own:
            if (
                other.checkpoint.parent != job.checkpoint.parent
                and (other.checkpoint.parent / job.checkpoint.name).exists()
            ):
                sys.exit(f"Both {job.checkpoint.parent} and {other.checkpoint.parent} hold a {job.checkpoint.name}.")
    if own:
        return own
    return stand_ins() if arguments.stand_ins else [small_world()]


def small_world() -> Job:
    """The small world's model as a checkpoint, written once into the cache folder."""
    from benchmarks.smallworld.shown import CFG, first, prompts
    from softrepa.smallworld.checkpoint import TOKENS, cached_checkpoint

    checkpoint = cached_checkpoint(environment.cache_folder())
    texts = tuple(first(prompts()))
    return Job("sd3", "Small world", checkpoint, TOKENS, texts, steps=20, size=96, cfg=CFG, is_read=True)


def stand_ins() -> list[Job]:
    from .standins import stand_in

    say("Stand-in checkpoints: random weights, so the pictures are patterns, not art.")
    files = {family: stand_in(family) for family in STAND_INS}
    return [
        Job(family, f"{TITLES[family]} stand-in", file.checkpoint, file.tokens, steps=8, size=256)
        for family, file in files.items()
    ]


def add_tokens(job: Job, folder: Path) -> str:
    """Copy the token file under ComfyUI's softrepa folder; returns its name there."""
    target = folder / job.family
    target.mkdir(parents=True)
    if job.tokens.suffix == ".safetensors":
        shutil.copy(job.tokens, target)
        return str(Path(job.family) / job.tokens.name)
    published = job.tokens if job.tokens.is_dir() else job.tokens.parent
    for file in published.glob("*.pth"):
        shutil.copy(file, target)
    return job.family  # a folder with published files is listed by its own name


def filled_in(job: Job, tokens_name: str, prompt: str | None, arguments: argparse.Namespace) -> dict:
    """The shipped workflow with this job's files and the options of the command line."""
    path = ROOT / "workflows" / "api" / f"text_to_image_{job.family}.json"
    graph = json.loads(path.read_text(encoding="utf-8"))
    steps, size = arguments.steps or job.steps, arguments.size or job.size
    wanted = {
        ("CheckpointLoaderSimple", "ckpt_name"): job.checkpoint.name,
        ("SoftREPALoadTokens", "tokens_name"): tokens_name,
        ("PrimitiveInt", "value"): arguments.seed,
        ("KSampler", "steps"): steps,
        ("KSampler", "cfg"): job.cfg,
        ("EmptyLatentImage", "width"): size,
        ("EmptyLatentImage", "height"): size,
        ("EmptySD3LatentImage", "width"): size,
        ("EmptySD3LatentImage", "height"): size,
    }
    for node in graph.values():
        for (class_type, name), value in wanted.items():
            if node["class_type"] == class_type and value is not None:
                node["inputs"][name] = value
        if node["_meta"]["title"] == "Positive prompt" and prompt:
            node["inputs"]["text"] = prompt
    return graph


def run(job: Job, arguments: argparse.Namespace, server) -> str:
    """Run the workflow for each prompt, leave the picture, and say what the tokens changed."""
    from PIL import Image, ImageChops, ImageStat

    from .pairs import Pair, sheet

    tokens_name = add_tokens(job, server.work / "models" / "softrepa")
    started, pairs, differences = time.monotonic(), [], []
    for prompt in (arguments.prompt,) if arguments.prompt else job.prompts:
        graph = filled_in(job, tokens_name, prompt, arguments)
        with Progress(job.title, graph) as progress:
            result = server.run(graph, progress)
        (saved,) = (path for paths in result.images.values() for path in paths)
        with Image.open(saved) as file:
            both = file.convert("RGB")
        middle = both.width // 2
        halves = both.crop((0, 0, middle, both.height)), both.crop((middle, 0, both.width, both.height))
        differences.append(sum(ImageStat.Stat(ImageChops.difference(*halves)).mean) / 3)
        pairs.append(Pair(prompt or "", halves))
    seconds = time.monotonic() - started
    found = ""
    if job.is_read and not arguments.prompt:
        from benchmarks.smallworld.shown import counts

        pairs = read(pairs)
        without, with_tokens = (counts(list(ones)) for ones in zip(*(pair.verdicts for pair in pairs), strict=True))
        found = (
            f"all that is asked is there in {without[0]} and {with_tokens[0]}, and nothing else in {without[1]} and "
            f"{with_tokens[1]}; "
        )
    picture = arguments.out / f"{job.title.lower().replace(' ', '_')}.png"
    sheet(pairs, COLUMNS).save(picture)
    return (
        f"{job.title}: {len(pairs)} prompts, same seed, without | with {job.tokens.name}: {found}mean pixel change "
        f"{sum(differences) / len(pairs):.1f} of 255, {seconds:.1f} s, {picture}"
    )


def read(pairs: list) -> list:
    """The same pairs with the checker's verdicts: they are the first of the small world's fixed list."""
    import numpy as np

    from benchmarks.smallworld.shown import first, prompts, verdict

    specs = prompts()
    asked = {caption: specs[place] for caption, place in first(specs).items()}

    def verdicts(pair) -> tuple[str, ...]:
        return tuple(verdict(np.asarray(one) / np.float32(255), asked[pair.prompt]) for one in pair.pictures)

    return [replace(pair, verdicts=verdicts(pair)) for pair in pairs]


class Progress:
    """Live progress on one line of a terminal; one line for each node elsewhere."""

    def __init__(self, model: str, graph: dict):
        self.titles = {key: node["_meta"]["title"] for key, node in graph.items()}
        self.model = model

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        if sys.stderr.isatty():
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)

    def __call__(self, node_id: str, value: float, maximum: float) -> None:
        steps = f" {value:.0f}/{maximum:.0f}" if maximum else ""
        text = f"{self.model}: {self.titles[node_id]}{steps}"
        if sys.stderr.isatty():
            print(f"\r\x1b[2K{text}", end="", file=sys.stderr, flush=True)
        elif not maximum or value == maximum:
            say(text)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    arguments = parse_arguments()
    environment.enter("tools.demo", arguments.comfyui, arguments.python)

    from .server import ComfyServer, PromptError, ServerError

    todo = jobs(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    checkpoints = {"checkpoints": list({job.checkpoint.parent for job in todo})}  # read where they lie
    say("Starting ComfyUI")
    try:
        with tempfile.TemporaryDirectory() as work, ComfyServer(work, extra_models=checkpoints) as server:
            for job in todo:
                print(run(job, arguments, server), flush=True)
    except (PromptError, ServerError) as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
