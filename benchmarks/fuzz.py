"""Mutated token files and caption tables, read one by one: each is used or refused in a sentence, and nothing else.

    python3 -m benchmarks.fuzz [--tokens 50000] [--captions 20000]

Reads in child processes of --each files, a quarter of an hour of one core in all. Prints how many were used and
refused, every exception that is no SoftREPAError with the number of its file, and the most memory that a child had.
Ends with 1 where there was such an exception, a child that died or took longer than --seconds, or one that had more
than 1 GB. The number decides the file: `--tokens 1 --captions 0 --start 1234` reads that one again.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from tools import environment

MOST_BYTES = 10**9
MOST_SAID = 4000
"""Characters of a refusal, and of what a folder's reader has to say."""
KINDS = ("tokens", "captions")


def read_tokens(number: int, folder: Path) -> str:
    """Which file it was. Whatever is read is also looked at, drawn from and written again."""
    import torch

    from softrepa import token_files
    from softrepa.errors import printable

    from .mutations import mutated_tokens, whole_token_files

    rng = random.Random(f"tokens {number}")
    whole = _once("tokens", whole_token_files)
    name = rng.choice(list(whole))
    path = folder / name
    path.write_bytes(mutated_tokens(whole[name], rng))
    if name == "dc_t_tokens.pth":  # the tokens beside it are whole
        (folder / "dc_tokens.pth").write_bytes(whole["dc_tokens.pth"])
        path = folder
    tokens = token_files.load(path)
    said = "\n".join(token_files.summary(tokens))
    if said != printable(said):
        raise AssertionError("the summary has what a terminal acts on")
    tokens.at(torch.tensor([500.0]))
    token_files.load(token_files.save(tokens, folder / "again.safetensors"))
    return name


def read_captions(number: int, folder: Path) -> str:
    from softrepa.data.folder import read_folder
    from softrepa.data.swaps import swaps

    from .mutations import caption_files, mutated_captions, write_pictures

    rng = random.Random(f"captions {number}")
    whole = _once("captions", caption_files)
    name = rng.choice(list(whole))
    write_pictures(folder)
    (folder / name).write_bytes(mutated_captions(name, whole[name], rng))
    found = read_folder(folder, "data", 64, rng.random() < 0.5, 0.0, folder.parent / "index.json")
    for example in found.train:
        for caption in example.captions:
            caption.encode("utf-8")
            swaps(caption)
    for note in found.notes:
        note.encode("utf-8")
        if len(note) > MOST_SAID:
            raise AssertionError(f"a note of {len(note)} characters")
    return name


_WHOLE: dict[str, dict[str, bytes]] = {}


def _once(kind: str, make) -> dict[str, bytes]:
    if kind not in _WHOLE:
        _WHOLE[kind] = make()
    return _WHOLE[kind]


def outcome(kind: str, number: int) -> str:
    """ "used", "refused", or what went wrong."""
    from softrepa.errors import SoftREPAError

    read = {"tokens": read_tokens, "captions": read_captions}[kind]
    with tempfile.TemporaryDirectory(prefix="fuzz-") as work:
        folder = Path(work) / "folder"
        folder.mkdir()
        try:
            read(number, folder)
            return "used"
        except SoftREPAError as error:
            text = str(error)
            text.encode("utf-8")
            is_short = len(text) <= MOST_SAID and text.count("\n") < 3
            return "refused" if is_short else f"a refusal of {len(text)} characters"
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            return f"{type(error).__name__}: {ascii(str(error))[:200]} ({Path(place.filename).name}:{place.lineno})"


def child(kind: str, start: int, count: int) -> None:
    """Prints the number of each file before it is read, and at last what became of them."""
    counts: Counter[str] = Counter()
    wrong = {}
    for number in range(start, start + count):
        print(number, flush=True)
        found = outcome(kind, number)
        counts[found if found in ("used", "refused") else "wrong"] += 1
        if found not in ("used", "refused"):
            wrong[number] = found
    print(json.dumps({"counts": counts, "wrong": wrong, "peak": peak_memory()}))


def peak_memory() -> int:
    """Bytes that this process has had at most."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(kind: str, start: int, count: int, seconds: float) -> tuple[Counter, dict[int, str], int]:
    """A child's counts, what went wrong by file, and its peak memory."""
    command = [sys.executable, "-m", "benchmarks.fuzz", "--child", kind, "--start", str(start), "--each", str(count)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
        lines, reason = done.stdout.splitlines(), f"the child ended with {done.returncode}: {done.stderr[-300:]}"
        if done.returncode == 0:
            answer = json.loads(lines[-1])
            return Counter(answer["counts"]), {int(key): text for key, text in answer["wrong"].items()}, answer["peak"]
    except subprocess.TimeoutExpired as error:
        lines, reason = (error.stdout or b"").decode().splitlines(), f"not done after {seconds:.0f} seconds"
    return Counter(wrong=1), {int(lines[-1]) if lines else start: reason}, 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.fuzz", description=__doc__.splitlines()[0])
    for kind, count in zip(KINDS, (50_000, 20_000), strict=True):
        parser.add_argument(f"--{kind}", type=int, default=count, help=f"how many files of {kind} ({count})")
    parser.add_argument("--start", type=int, default=0, help="number of the first file of each kind (0)")
    parser.add_argument("--each", type=int, default=2500, help="files that a child process reads (2500)")
    parser.add_argument("--seconds", type=float, default=3600, help="that a child may take (3600)")
    parser.add_argument("--child", choices=KINDS, help=argparse.SUPPRESS)
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    environment.enter("benchmarks.fuzz", arguments.comfyui, arguments.python)
    if arguments.child:
        child(arguments.child, arguments.start, arguments.each)
        return 0
    is_good = True
    for kind in KINDS:
        counts, peak, count = Counter(), 0, getattr(arguments, kind)
        for start in range(arguments.start, arguments.start + count, arguments.each):
            number = min(arguments.each, arguments.start + count - start)
            found, wrong, memory = run(kind, start, number, arguments.seconds)
            counts, peak = counts + found, max(peak, memory)
            for file, text in wrong.items():
                print(f"{kind} {file}: {text}", flush=True)
        print(
            f"{kind}: {counts['used']:,} used, {counts['refused']:,} refused in a sentence, {counts['wrong']:,} wrong; "
            f"at most {peak / 1e6:,.0f} MB in a child",
            flush=True,
        )
        is_good = is_good and not counts["wrong"] and peak <= MOST_BYTES
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
