"""Hundreds of prompts of all nodes on one real server over HTTP, many of them cancelled at a random moment.

    python3 -m benchmarks.soak [--prompts 300]

On the small world's model, on a CPU in about half an hour. Some prompts are wrong on purpose. Before, now and then,
and afterwards it looks at the model that all of them shared: its weights and what it draws must be the same, bit for
bit. It prints the server's memory and open files after each 50 prompts, and ends with 1 where they grow, where the
model has changed, where a prompt fails in another way than it should, or where a file is left half-written.
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tools import environment

PROBE = Path(__file__).with_name("soak_probe.py")
SETTLED = 100
"""Prompts after which the server has loaded and imported what it ever needs."""
MOST_GROWTH = 150_000_000
"""Bytes, from then on."""
MOST_HANDLES = 5
CANCELLED = 0.35
LONGEST = 5.0
"""Share of the prompts that are cancelled, and seconds after which at the latest; some have ended by then."""
PROMPTS = ("a red circle and a blue square", "three purple diamonds", "a green triangle left of an orange cross")
FOLDER = "pictures"
NODES = {
    "SoftREPAApplyTokens",
    "SoftREPADataset",
    "SoftREPADatasetFromLatents",
    "SoftREPAFlowEdit",
    "SoftREPAFlowEditGuider",
    "SoftREPAFlowEditSampler",
    "SoftREPALoadTokens",
    "SoftREPAPreviewTokens",
    "SoftREPASaveTokens",
    "SoftREPAScore",
    "SoftREPASmallWorld",
    "SoftREPATrain",
    "SoftREPATrainTokens",
    "SoftREPATrainingOptions",
}


FEW_SET = ("temperature", "temperature_mode", "objective", "hard_negatives", "checkpoint_every")
"""What SoftREPA Training Options has of the settings drawn here."""


@dataclass
class Graph:
    """A prompt while it is put together. The model's node is the same in all, so that the server keeps the model."""

    rng: random.Random
    nodes: dict[str, dict] = field(default_factory=dict)
    refusal: str = ""
    """What the server must say, where the prompt is wrong on purpose."""

    def __post_init__(self):
        self.add("SoftREPASmallWorld", name="world")
        self.model, self.clip, self.vae, self.tokens = (["world", place] for place in range(4))

    def add(self, kind: str, name: str = "", **inputs) -> str:
        name = name or f"{kind} {len(self.nodes)}"
        self.nodes[name] = {"class_type": kind, "inputs": inputs}
        return name

    def text(self, text: str | None = None) -> list:
        return [self.add("CLIPTextEncode", clip=self.clip, text=self.rng.choice(PROMPTS) if text is None else text), 0]

    def latent(self, may_be_empty: bool = True) -> list:
        if may_be_empty and self.rng.random() < 0.5:
            return [self.add("EmptySD3LatentImage", width=96, height=96, batch_size=self.rng.choice((1, 2))), 0]
        image = self.add("LoadImage", image="picture.png")
        return [self.add("VAEEncode", pixels=[image, 0], vae=self.vae), 0]

    def show(self, latent: list) -> None:
        image = self.add("VAEDecode", samples=latent, vae=self.vae)
        self.add("PreviewImage", images=[image, 0])

    def seed(self) -> int:
        return self.rng.randrange(2**31)

    def options(self) -> dict:
        """How tokens act."""
        start = self.rng.choice((0.0, 0.2))
        return {
            "strength": self.rng.choice((0.0, 0.5, 1.0, 2.0)),
            "start_percent": start,
            "end_percent": self.rng.choice((start, 0.7, 1.0)),
            "apply_to": self.rng.choice(("both", "positive", "negative")),
            "blocks": self.rng.choice(("auto", "1")),
        }

    def with_tokens(self, model: list) -> list:
        """Once or twice, from a file or from the graph."""
        for _ in range(self.rng.choice((1, 1, 2))):
            kind, source = self.rng.choice(
                (
                    ("SoftREPALoadTokens", {"tokens_name": "start.safetensors"}),
                    ("SoftREPAApplyTokens", {"tokens": self.tokens}),
                )
            )
            model = [self.add(kind, model=model, **source, **self.options()), 0]
        return model

    def dataset(self, must_have_text: bool = False) -> list:
        if not must_have_text and self.rng.random() < 0.3:
            loaded = self.add("LoadImageTextDataSetFromFolder", folder=FOLDER)
            texts = {"images": [loaded, 0], "texts": [loaded, 1]}
            made = self.add("MakeTrainingDataset", vae=self.vae, clip=self.clip, **texts)
            parts = {"latents": [made, 0], "conditioning": [made, 1], "empty_conditioning": self.text("")}
            return [self.add("SoftREPADatasetFromLatents", **parts), 0]
        options = {
            "resolution": self.rng.choice((64, 96)),
            "bucketing": self.rng.random() < 0.3,
            "validation_percent": self.rng.choice((0.0, 50.0)),
            "cache_gb": self.rng.choice((0.0, 1.0)),
        }
        return [self.add("SoftREPADataset", folder=FOLDER, clip=self.clip, vae=self.vae, **options), 0]


def draw(graph: Graph) -> None:
    model = graph.with_tokens(graph.model)
    sampled = graph.add(
        "KSampler",
        model=model,
        positive=graph.text(),
        negative=graph.text(""),
        latent_image=graph.latent(),
        seed=graph.seed(),
        steps=graph.rng.randint(2, 8),
        cfg=graph.rng.choice((1.0, 2.0)),
        sampler_name=graph.rng.choice(("euler", "dpmpp_2m")),
        scheduler="simple",
        denoise=1.0,
    )
    graph.show([sampled, 0])


def edit(graph: Graph) -> None:
    conds = {
        "source_positive": graph.text(),
        "source_negative": graph.text(""),
        "target_positive": graph.text(),
        "target_negative": graph.text(""),
    }
    guidance = {"source_cfg": 1.5, "target_cfg": graph.rng.choice((1.0, 4.0))}
    if graph.rng.random() < 0.5:
        guidance["target_model"] = graph.with_tokens(graph.model)
    if graph.rng.random() < 0.5:
        steps = {"steps": 10, "n_max": graph.rng.randint(2, 8), "n_min": graph.rng.choice((0, 1))}
        model = {"model": graph.model, "latent_image": graph.latent(may_be_empty=False), "seed": graph.seed()}
        edited = graph.add("SoftREPAFlowEdit", **model, **conds, **guidance, **steps)
    else:
        guider = graph.add("SoftREPAFlowEditGuider", model=graph.model, **conds, **guidance)
        sampler = graph.add("SoftREPAFlowEditSampler", n_min=0, n_avg=graph.rng.choice((1, 2)))
        sigmas = graph.add("BasicScheduler", model=graph.model, scheduler="normal", steps=6, denoise=0.7)
        noise = graph.add("RandomNoise", noise_seed=graph.seed())
        parts = {"noise": [noise, 0], "guider": [guider, 0], "sampler": [sampler, 0], "sigmas": [sigmas, 0]}
        edited = graph.add("SamplerCustomAdvanced", latent_image=graph.latent(may_be_empty=False), **parts)
    graph.show([edited, 0])


def learn(graph: Graph) -> None:
    options = {
        "steps": graph.rng.randint(1, 12),
        "batch_size": 2,
        "learning_rate": 0.01,
        "seed": graph.seed(),
        "temperature": 1.0,
        "checkpoint_every": graph.rng.choice((0, 1, 3)),
        "filename_prefix": graph.rng.choice(("soak", "sub/soak", "漢字")),
        "preview_every": 3,
    }
    chance = graph.rng.random()
    if chance < 0.3:  # of the same settings, so that there is something to go on with
        options |= {"seed": 7, "resume": True, "filename_prefix": "again", "steps": 10_000, "checkpoint_every": 1}
        graph.refusal = "never ends"
    elif chance < 0.5:
        options |= {"objective": "agsm", "temperature": 0.07}
    elif chance < 0.7:
        options |= {"hard_negatives": 1, "temperature_mode": "relative"}
    if graph.rng.random() < 0.3:
        options |= {"preview_positive": graph.text(), "preview_negative": graph.text(""), "vae": graph.vae}
    fixed = {"folder": FOLDER, "clip": graph.clip, "vae": graph.vae, "resolution": 64}
    data = [graph.add("SoftREPADataset", **fixed), 0] if "resume" in options else None
    data = data or graph.dataset(must_have_text="hard_negatives" in options)
    kind = graph.rng.choice(("SoftREPATrain", "SoftREPATrainTokens"))
    if kind == "SoftREPATrainTokens":
        rest = {name: options.pop(name) for name in FEW_SET if name in options}
        options["options"] = [graph.add("SoftREPATrainingOptions", **rest), 0]
    trained = graph.add(kind, model=graph.model, dataset=data, **options)
    model = graph.add("SoftREPAApplyTokens", model=graph.model, tokens=[trained, 0])
    graph.add("SoftREPAPreviewTokens", tokens=[trained, 0])
    graph.add("SoftREPAScore", model=[model, 0], dataset=data, batch_size=2, batches=1, timesteps="500")


def score(graph: Graph) -> None:
    model = graph.with_tokens(graph.model) if graph.rng.random() < 0.7 else graph.model
    options = {"batch_size": 2, "batches": 2, "timesteps": "200,800", "seed": graph.seed()}
    graph.add("SoftREPAScore", model=model, dataset=graph.dataset(), **options)


def keep(graph: Graph) -> None:
    loaded = graph.add("SoftREPALoadTokens", model=graph.model, tokens_name="start.safetensors", **graph.options())
    graph.add("SoftREPASaveTokens", tokens=[loaded, 1], filename_prefix=graph.rng.choice(("kept", "sub/kept")))
    graph.add("SoftREPAPreviewTokens", tokens=graph.tokens)


def mistake(graph: Graph) -> None:
    """A prompt that must be refused, in our words."""
    save = {"tokens": graph.tokens}
    apply = {"model": graph.model, "tokens": graph.tokens}
    kind, inputs, graph.refusal = graph.rng.choice(
        (
            ("SoftREPASaveTokens", save | {"filename_prefix": "caf\udce9"}, "filename_prefix is"),
            ("SoftREPASaveTokens", save | {"filename_prefix": "../outside"}, "filename_prefix is"),
            ("SoftREPAApplyTokens", apply | {"blocks": "\udcff"}, "blocks is"),
            ("SoftREPAApplyTokens", apply | {"blocks": "9" * 5000}, "blocks is"),
            ("SoftREPAApplyTokens", apply | {"strength": float("nan")}, "strength is"),
            ("SoftREPALoadTokens", {"model": graph.model, "tokens_name": "gone\udcff"}, "not in models/softrepa"),
        )
    )
    made = graph.add(kind, **inputs)
    if kind != "SoftREPASaveTokens":
        graph.add("SoakProbe", model=[made, 0], positive=graph.text())


KINDS: dict[Callable[[Graph], None], int] = {draw: 5, edit: 4, learn: 4, score: 2, keep: 2, mistake: 2}
"""What a prompt does, and how often."""


def looked_at(server) -> dict:
    """The model that all prompts share, as it is now, and what the server holds."""
    graph = Graph(random.Random(0))
    graph.add("SoakProbe", name="probe", model=graph.model, positive=graph.text(PROMPTS[0]))
    return json.loads(server.run(graph.nodes, timeout=600).outputs["probe"]["text"][0])


def run_one(server, number: int, used: set[str]) -> str:
    """How a prompt ended: "done", "cancelled", "refused" as it should be, or what went wrong."""
    from tools.server import PromptError, PromptInterrupted, ServerError

    rng = random.Random(number)
    graph = Graph(rng)
    rng.choices(list(KINDS), list(KINDS.values()))[0](graph)
    used |= {node["class_type"] for node in graph.nodes.values()}
    is_endless = graph.refusal == "never ends"
    canceller = threading.Timer(rng.uniform(0, LONGEST), server.interrupt)
    if is_endless or rng.random() < CANCELLED:
        canceller.start()
    try:
        server.run(graph.nodes, timeout=600)
        found = "done" if not graph.refusal else "not refused"
    except PromptInterrupted:
        found = "cancelled"
    except PromptError as error:
        is_right = graph.refusal and not is_endless and graph.refusal in error.message
        found = "refused" if is_right else f"{error}"
    except (ServerError, TimeoutError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        canceller.cancel()
        if canceller.ident:
            canceller.join()
    return found


def prepare(work: Path) -> None:
    """The input folder, a token file to load, and the probe."""
    from PIL import Image

    from softrepa.smallworld.checkpoint import TOKENS

    for number in range(6):
        path = work / "input" / FOLDER / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (96 + 16 * (number % 2), 96), (40 * number, 90, 200 - 30 * number)).save(path)
        path.with_suffix(".txt").write_text(f"{number} red circles left of a blue square", encoding="utf-8")
    Image.new("RGB", (96, 96), (200, 30, 30)).save(work / "input" / "picture.png")
    for source, folder, name in (
        (TOKENS, work / "models" / "softrepa", "start.safetensors"),
        (PROBE, work / "custom_nodes", PROBE.name),
    ):
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)


def left_over(work: Path) -> list[str]:
    """Files that are half-written, or locks that nobody holds."""
    from softrepa import token_files
    from softrepa.errors import SoftREPAError
    from softrepa.training import state as training_state

    wrong = [str(path.relative_to(work)) for path in work.rglob("*") if path.suffix == ".tmp" or path.name == "lock"]
    for folder, read in ((work / "models" / "softrepa", token_files.load), (work / "output", training_state.load)):
        for path in folder.rglob("*.safetensors"):
            try:
                read(path)
            except SoftREPAError as error:
                wrong.append(str(error))
    return wrong


def soak(server, prompts: int) -> list[str]:
    """What went wrong."""
    counts, wrong, used = Counter(), [], {"SoakProbe"}
    first = settled = now = looked_at(server)
    started = time.monotonic()
    for number in range(prompts):
        found = run_one(server, number, used)
        is_right = found in ("done", "cancelled", "refused")
        counts[found if is_right else "wrong"] += 1
        if not is_right:
            wrong.append(f"prompt {number}: {found}")
            print(wrong[-1], flush=True)
        if (number + 1) % 50 and number + 1 != prompts:
            continue
        now = looked_at(server)
        settled = now if number < SETTLED else settled
        for name in ("weights", "drawn"):
            if now[name] != first[name]:
                wrong.append(f"after prompt {number}: {name} of the shared model have changed")
        seconds, held = time.monotonic() - started, f"{now['memory'] / 1e6:,.0f} MB, {now['handles']} open files"
        print(f"{number + 1} prompts in {seconds:.0f} s: {dict(counts)}; {held}, {now['threads']} threads", flush=True)
    memory, handles = (now[name] - settled[name] for name in ("memory", "handles"))
    if memory > MOST_GROWTH:
        wrong.append(f"memory has grown by {memory / 1e6:,.0f} MB")
    if handles > MOST_HANDLES:
        wrong.append(f"{handles} more files are open")
    if prompts >= SETTLED and (never := NODES - used):
        wrong.append(f"never used: {', '.join(sorted(never))}")
    wrong += left_over(server.work)
    same = "the same" if all(now[name] == first[name] for name in ("weights", "drawn")) else "another"
    print(f"{prompts} prompts: {dict(counts)}; the model is {same}, bit for bit.")
    print(f"Since prompt {SETTLED}: {memory / 1e6:+,.0f} MB of memory, {handles:+d} open files.", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=300, help="how many (300)")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    environment.enter("benchmarks.soak", arguments.comfyui, arguments.python)

    from tools.server import ComfyServer

    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        prepare(Path(folder))
        with ComfyServer(folder) as server:
            wrong = soak(server, arguments.prompts)
    for line in wrong:
        print(f"wrong: {line}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
