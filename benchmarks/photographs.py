"""Edits photographs in a real ComfyUI over HTTP: load, VAE encode, FlowEdit, decode, save; and watches the memory.

    python3 -m benchmarks.photographs FOLDER [--family sd3] [--size 128] [--steps 2] [--count 75] [--into FOLDER]

FOLDER holds NAME.jpg and NAME.txt, what NAME.jpg shows. The models are the stand-ins with random weights: this shows
that the graph runs for every picture and that memory stays flat, not how good an edit looks.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tools import environment

CHANGE = "a painting of "


def graph(family: str, image: str, text: str, size: int, steps: int) -> dict:
    """The API-format graph of one edit, at `size` pixels, all of the `steps`."""
    prompts = {"3": text, "4": "", "5": CHANGE + text}
    encoded = {
        key: {"class_type": "CLIPTextEncode", "inputs": {"clip": ["1", 1], "text": t}} for key, t in prompts.items()
    }
    edit = {"model": ["1", 0], "latent_image": ["7", 0], "seed": 1, "steps": steps, "n_max": steps}
    conds = {"source_positive": "3", "source_negative": "4", "target_positive": "5", "target_negative": "4"}
    square = {"upscale_method": "lanczos", "width": size, "height": size, "crop": "center"}
    return {
        "1": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": f"standin_{family}.safetensors"}},
        "2": {"class_type": "LoadImage", "inputs": {"image": image}},
        **encoded,
        "6": {"class_type": "ImageScale", "inputs": {"image": ["2", 0], **square}},
        "7": {"class_type": "VAEEncode", "inputs": {"pixels": ["6", 0], "vae": ["1", 2]}},
        "8": {"class_type": "SoftREPAFlowEdit", "inputs": edit | {name: [key, 0] for name, key in conds.items()}},
        "9": {"class_type": "VAEDecode", "inputs": {"samples": ["8", 0], "vae": ["1", 2]}},
        "10": {"class_type": "SaveImage", "inputs": {"images": ["9", 0], "filename_prefix": "edited"}},
    }


def resident_megabytes(process: int) -> float:
    """Memory that a process holds, by Linux's account."""
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {process} has no VmRSS")


def run(photographs: list[Path], family: str, size: int, steps: int, into: Path | None) -> None:
    import numpy as np
    from PIL import Image

    from tools.server import ComfyServer
    from tools.standins import stand_in

    models = {"checkpoints": [stand_in(family).checkpoint.parent]}
    memory, seconds, changes = [], [], []
    with tempfile.TemporaryDirectory() as work, ComfyServer(work, extra_models=models) as server:
        for photograph in photographs:
            name = photograph.name
            (server.work / "input" / name).write_bytes(photograph.read_bytes())
            text = photograph.with_suffix(".txt").read_text(encoding="utf-8").strip()
            start = time.perf_counter()
            (saved,) = server.run(graph(family, name, text, size, steps), timeout=600).images["10"]
            seconds.append(time.perf_counter() - start)
            memory.append(resident_megabytes(server.process.pid))
            picture = np.asarray(Image.open(saved).convert("RGB"), dtype=float)
            if picture.shape != (size, size, 3):
                raise RuntimeError(f"{name}: the edit is {picture.shape}, expected {(size, size, 3)}")
            changes.append(picture.std())
            if into is not None:
                into.mkdir(parents=True, exist_ok=True)
                (into / f"{photograph.stem}.png").write_bytes(saved.read_bytes())
    settled = memory[len(memory) // 3 :]
    print(
        f"{family}: {len(photographs)} photographs at {size} px, {steps} steps, no failure; "
        f"{statistics.median(seconds):.2f} s each; memory {settled[0]:.0f} MB after a third of them, "
        f"{max(settled):.0f} MB at most, {settled[-1]:.0f} MB at the end; "
        f"contrast of the results {min(changes):.1f} to {max(changes):.1f} of 255"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.photographs", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", choices=("sd15", "sd3"), default="sd3")
    parser.add_argument("--size", type=int, default=128, help="pixels a side (128)")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--count", type=int, help="only the first so many")
    parser.add_argument("--into", type=Path, help="where to keep the edited pictures")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    environment.enter("benchmarks.photographs", arguments.comfyui, arguments.python)
    photographs = sorted(arguments.folder.glob("*.jpg"))[: arguments.count]
    if not photographs:
        sys.exit(f"{arguments.folder} holds no .jpg files.")
    run(photographs, arguments.family, arguments.size, arguments.steps, arguments.into)


if __name__ == "__main__":
    main()
