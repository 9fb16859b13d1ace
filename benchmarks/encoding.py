"""Encoding while training, on a folder of COCO's size made of tiny files.

    python3 -m benchmarks.encoding [--images N] [--steps N] [--folder PATH]

prints how long reading the folder takes, beside a plain loop that reads the same bytes, until when the first batch is
there, what 500 batches do to memory and disk, whether a second start draws the same, and how fast captions and images
go through ComfyUI's own encoders, several to a call and one by one. The encoders are tiny ones of the real kinds.
"""

import argparse
import json
import os
import random
import resource
import statistics
import struct
import tempfile
import time
import zlib
from pathlib import Path

from tools import environment

from . import cases

SIDE = 64
WORDS = [
    "a",
    "red",
    "blue",
    "cat",
    "dog",
    "house",
    "tree",
    "boat",
    "near",
    "under",
    "holding",
    "eating",
    "old",
    "small",
]
CAPTIONS = 5
TINY_CLIP = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_hidden_layers": 3}
TINY_T5 = {"d_ff": 128, "d_kv": 16, "d_model": 64, "num_heads": 4, "num_layers": 3}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.encoding", description=__doc__)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--cache-mb", type=float, default=20.0, help="too little for all that is drawn")
    parser.add_argument("--folder", type=Path, help="where the pictures lie or are written; a temporary one otherwise")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    cases.enter("benchmarks.encoding", arguments)
    with tempfile.TemporaryDirectory() as temporary:
        report(measure(Path(temporary), arguments.folder, arguments.images, arguments.steps, arguments.cache_mb))


def report(found: dict[str, object]) -> None:
    for name, value in found.items():
        print(f"{name}: {value:.2f}" if isinstance(value, float) else f"{name}: {value}", flush=True)


def png(number: int) -> bytes:
    """A picture of 2 x 2 pixels in a colour of its own."""
    rows = b"".join(b"\0" + number.to_bytes(3, "big") * 2 for _ in range(2))
    parts = ((b"IHDR", struct.pack(">IIBBBBB", 2, 2, 8, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def make_folder(root: Path, images: int) -> None:
    """COCO's layout: pictures in train, captions in annotations."""
    rng, notes, names = random.Random(0), [], []
    (root / "train").mkdir(parents=True)
    (root / "annotations").mkdir()
    for number in range(images):
        name = f"{number:012}.png"
        (root / "train" / name).write_bytes(png(number))
        names.append({"id": number, "file_name": name})
        notes += [
            {"image_id": number, "caption": f"{' '.join(rng.choices(WORDS, k=9))} {number} {j}"}
            for j in range(CAPTIONS)
        ]
    (root / "annotations" / "captions_train.json").write_text(json.dumps({"images": names, "annotations": notes}))


def read_plainly(root: Path) -> int:
    return sum(len((Path(folder) / name).read_bytes()) for folder, _, names in os.walk(root) for name in names)


def tiny_clip(kind: str):
    """A CLIP of tiny layers and random weights: SD1.5's CLIP-L, or SD3's T5 alone."""
    import comfy.sd
    import torch
    from comfy import sd1_clip
    from comfy.text_encoders import sd3_clip

    class Target:
        clip = sd1_clip.SD1ClipModel if kind == "CLIP-L" else sd3_clip.sd3_clip(clip_l=False, clip_g=False, t5=True)
        tokenizer = sd1_clip.SD1Tokenizer if kind == "CLIP-L" else sd3_clip.SD3Tokenizer
        params: dict = {}

    options = {"clip_l_model_config": TINY_CLIP, "t5xxl_model_config": TINY_T5, "dtype": torch.float32}
    clip = comfy.sd.CLIP(Target, model_options=options)
    torch.manual_seed(0)
    for parameter in clip.cond_stage_model.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    return clip


def small_vae():
    """That of a stand-in checkpoint."""
    import comfy.sd

    from tools.standins import stand_in

    path = str(stand_in("sd15").checkpoint)
    return comfy.sd.load_checkpoint_guess_config(path, output_vae=True, output_clip=False, output_model=False)[2]


def memory_mb() -> float:
    """Of this process now."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmRSS:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(
    temporary: Path, folder: Path | None, images: int, steps: int, cache_mb: float, rounds: int = 5
) -> dict[str, object]:
    import folder_paths
    import torch

    from softrepa.comfy.data.assembly import dataset_of_folder
    from softrepa.data.inputs import DatasetInputs

    folder_paths.set_user_directory(str(temporary / "user"))
    root = folder or temporary / "coco"
    if not (root / "annotations").exists():
        make_folder(root, images)
    found: dict[str, object] = {"images": images, "captions": CAPTIONS * images}
    with torch.inference_mode():
        clip, vae = tiny_clip("CLIP-L"), small_vae()
        start = time.monotonic()
        found["MB in the files"] = read_plainly(root) / 1e6
        found["plain loop over the files, s"] = time.monotonic() - start

        def dataset():
            return dataset_of_folder(root, "coco", clip, vae, DatasetInputs(resolution=SIDE, cache_gb=cache_mb / 1000))

        for title in ("first start", "second start"):
            start, work = time.monotonic(), time.process_time()
            data = dataset()
            read = time.monotonic() - start
            data = data.started(0)
            first = data.batch(4, left=steps)
            found[f"{title}: dataset read, s"] = read
            found[f"{title}: first batch there, s"] = time.monotonic() - start
            found[f"{title}: of that computing, s"] = time.process_time() - work
            if title == "first start":
                found["told"] = data.notes[-1]
                before, peaks, start = first, [], time.monotonic()
                for step in range(1, steps):
                    batch = data.batch(4, left=steps - step)
                    peaks.append(memory_mb())
                    if step == steps // 2:
                        middle, position = batch, data.state()
                found["batches a second"] = (steps - 1) / (time.monotonic() - start)
                found["memory after a tenth, half, all batches, MB"] = [
                    round(peaks[int(k * (len(peaks) - 1))]) for k in (0.1, 0.5, 1)
                ]
                files = [path for path in (temporary / "user").rglob("shard-*")]
                found["cache, MB"] = sum(path.stat().st_size for path in files) / 1e6
                found["cache, files"] = len(files)
        found["the same first batch"] = same(first, before)
        data.restore(position | {"index": position["index"] - 1})
        found["the same batch where it goes on"] = same(data.batch(4), middle)
        if rounds:
            found |= speeds({"CLIP-L": clip, "T5": tiny_clip("T5")}, vae, rounds)
    return found


def same(one, other) -> bool:
    import torch

    conds = zip(one.conds, other.conds, strict=True)
    return torch.equal(one.latents, other.latents) and all(
        torch.equal(a["cross_attn"], b["cross_attn"]) for a, b in conds
    )


def speeds(clips: dict, vae, rounds: int, count: int = 64) -> dict[str, object]:
    """Ours over a plain loop of ComfyUI's encoders, medians of interleaved rounds."""
    import torch

    from softrepa.comfy.data.encoding import encode_captions, encode_images, images_at_once

    rng = random.Random(1)
    captions = [" ".join(rng.choices(WORDS, k=12)) + f" {number}" for number in range(count)]
    pixels = list(torch.rand(count, SIDE, SIDE, 3))
    at_once = images_at_once(vae, (SIDE, SIDE))

    def plain_captions(clip):
        for caption in captions:
            clip.encode_from_tokens_scheduled(clip.tokenize(caption))

    def plain_images(vae):
        for one in pixels:
            vae.encode(one[None])

    def our_images(vae):
        for first in range(0, count, at_once):
            some = pixels[first : first + at_once]
            encode_images(vae, some, [""] * len(some))

    kinds = [(name, clip, plain_captions, lambda clip: encode_captions(clip, captions)) for name, clip in clips.items()]
    kinds.append(("VAE", vae, plain_images, our_images))
    ratios: dict[str, list[float]] = {name: [] for name, *_ in kinds}
    for _ in range(rounds):
        for name, encoder, plain, ours in kinds:
            ratios[name].append(timed(plain, encoder) / timed(ours, encoder))
    return {f"{name}, speed over a plain loop": statistics.median(values) for name, values in ratios.items()}


def timed(call, *arguments) -> float:
    start = time.process_time()
    call(*arguments)
    return time.process_time() - start


if __name__ == "__main__":
    main()
