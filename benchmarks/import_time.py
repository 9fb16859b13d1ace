"""What the pack adds to ComfyUI's start: the time to load it, and the modules that were not loaded before.

    python3 -m benchmarks.import_time

Each figure is the median over fresh processes in which ComfyUI has loaded its own nodes and an empty pack.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tools import environment

ROOT = Path(__file__).absolute().parents[1]

LOAD = """
import asyncio, json, os, sys, time
sys.path.insert(0, os.environ["COMFYUI_PATH"])
from comfy.cli_args import args
args.cpu = True
import utils.extra_config
import execution, nodes, server

def load(pack):
    before, start = set(sys.modules), time.perf_counter()
    if not asyncio.run(nodes.load_custom_node(pack)):
        sys.exit(f"{pack} could not be loaded")
    seconds = time.perf_counter() - start
    loaded = {name: getattr(sys.modules[name], "__file__", None) for name in set(sys.modules) - before}
    return {"seconds": seconds, "modules": loaded}

asyncio.run(nodes.init_builtin_extra_nodes())
known = set(nodes.NODE_CLASS_MAPPINGS)
answer = {"empty": load(sys.argv[1]), "pack": load(sys.argv[2])}
print(json.dumps(answer | {"nodes": sorted(set(nodes.NODE_CLASS_MAPPINGS) - known)}))
"""
EMPTY_PACK = {"__init__.py": "NODE_CLASS_MAPPINGS = {}\n", "pyproject.toml": '[project]\nname = "empty"\n'}


@dataclass(frozen=True)
class Load:
    seconds: float
    seconds_empty: float  # of a pack without nodes
    modules: dict[str, str | None]  # newly loaded, with their files
    nodes: list[str]


def load_in_fresh_process(pack: Path) -> Load:
    """Loads the folder `pack` with ComfyUI's own loader. COMFYUI_PATH must be set."""
    with tempfile.TemporaryDirectory() as folder:
        for name, text in EMPTY_PACK.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        command = [sys.executable, "-P", "-c", LOAD, folder, str(pack)]
        run = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"ComfyUI could not load {pack}:\n{run.stderr[-4000:]}")
    answer = json.loads(run.stdout.splitlines()[-1])
    return Load(answer["pack"]["seconds"], answer["empty"]["seconds"], answer["pack"]["modules"], answer["nodes"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.import_time", description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="fresh processes")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    environment.enter("benchmarks.import_time", arguments.comfyui, arguments.python)
    load_in_fresh_process(ROOT)  # writes the byte code
    loads = [load_in_fresh_process(ROOT) for _ in range(arguments.rounds)]
    for title, seconds in (
        ("pack", [load.seconds for load in loads]),
        ("empty", [load.seconds_empty for load in loads]),
    ):
        print(f"{title:6}{1000 * statistics.median(seconds):7.1f} ms   (fastest {1000 * min(seconds):.1f})")
    own = [name for name, file in loads[0].modules.items() if file and file.startswith(f"{ROOT}{os.sep}")]
    foreign = sorted(loads[0].modules.keys() - set(own))
    print(f"{len(own)} modules of its own, and {', '.join(foreign) or 'none'} beside them")


if __name__ == "__main__":
    main()
