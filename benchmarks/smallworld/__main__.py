"""Commands of the small world; each prepares a ComfyUI where there is none.

python3 -m benchmarks.smallworld train              make the shipped file again (resumes when stopped)
python3 -m benchmarks.smallworld measure            results.json, results.md, contact_sheet.png
python3 -m benchmarks.smallworld checkpoint PATH    the full checkpoint for ComfyUI's loader
python3 -m benchmarks.smallworld tokens             train soft tokens in ComfyUI, five seeds, and measure them
python3 -m benchmarks.smallworld show               200 prompts without and with the shipped tokens
python3 -m benchmarks.smallworld edit               FlowEdit with and without them: tables and pictures

`--network flux` behind train, measure, checkpoint and tokens: the same of the second network, which is not shipped.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tools import environment

FOLDER = Path(__file__).absolute().parent
SHIPPED = FOLDER.parents[1] / "softrepa" / "smallworld"
SEEDS = 5
NETWORKS = ("model", "flux")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.smallworld", description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="PyTorch's threads (2)")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train everything and write the shipped file; resumes")
    train.add_argument("--state", type=Path, default=environment.cache_folder() / "smallworld", help="where it resumes")
    train.add_argument("--into", type=Path, help="folder of the finished file")
    train.add_argument("--device", default="cpu", help="of PyTorch, where the network is trained (cpu)")
    train.add_argument("--workers", type=int, default=0, help="processes that draw its pictures ahead (0)")
    measure = commands.add_parser("measure", help="draw, check and count")
    measure.add_argument("--images", type=int, default=1000, help="pictures to draw (1000)")
    measure.add_argument("--into", type=Path, default=FOLDER / "results", help="folder of the report")
    checkpoint = commands.add_parser("checkpoint", help="write the full checkpoint")
    checkpoint.add_argument("path", type=Path)
    tokens = commands.add_parser("tokens", help="train soft tokens in ComfyUI and measure them")
    tokens.add_argument("--steps", type=int, default=150, help="updates of each run (150)")
    tokens.add_argument("--pictures", type=int, default=240, help="pictures in the training folder (240)")
    tokens.add_argument("--seeds", type=int, default=SEEDS, help=f"runs at each temperature ({SEEDS})")
    tokens.add_argument("--temperatures", type=float, nargs="+", default=(0.07, 2.0), help="of the loss (0.07 2.0)")
    tokens.add_argument("--into", type=Path, help="folder of the tokens' file")
    for command in (train, measure, checkpoint, tokens):
        command.add_argument("--network", choices=NETWORKS, default="model", help="which one (model)")
    show = commands.add_parser(
        "show", help="draw and count a fixed list of prompts, without and with the shipped tokens"
    )
    show.add_argument("--prompts", type=int, default=200, help="the first of the list (200)")
    show.add_argument("--into", type=Path, help="folder of the counts and the picture (their places here)")
    edit = commands.add_parser("edit", help="FlowEdit over n_max and target_cfg, without and with tokens")
    edit.add_argument("--edits", type=int, default=48, help="edits a setting (48)")
    edit.add_argument("--into", type=Path, default=FOLDER / "results", help="folder of the report")
    return parser.parse_args()


def use_comfyui() -> None:
    """ComfyUI importable in this process, ahead of this project's own `nodes` folder; on the CPU without a GPU."""
    import torch

    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    import comfy.cli_args

    comfy.cli_args.args.cpu = not torch.cuda.is_available()


def train(network: str, state: Path, into: Path | None, device: str, workers: int) -> None:
    from softrepa.smallworld import checkpoint

    from . import autoencoder, flux, train

    text, settings = fast_encoder(), train.settings(network)
    if network == "flux":
        weights = train.train_model(network, checkpoint.read_shipped()["encoder"], text, state, device, workers)
        shutil.copyfile(state / "flux.log.jsonl", FOLDER / "flux.log.jsonl")
        target = (into or FOLDER) / flux.FILE.name
        flux.write(target, weights, {"training": json.dumps(settings)})
    else:
        encoder = autoencoder.fit_encoder()
        decoder = autoencoder.train_decoder(encoder, state)
        weights = train.train_model(network, encoder, text, state, device, workers)
        for name in ("decoder", "decoder-2", "decoder-3", "model"):
            shutil.copyfile(state / f"{name}.log.jsonl", FOLDER / f"{name}.log.jsonl")
        target = (into or SHIPPED) / checkpoint.SHIPPED.name
        settings["decoder_steps"] = autoencoder.DECODER_STEPS
        checkpoint.write_shipped(target, weights, decoder, encoder, {"training": json.dumps(settings)})
    print(f"wrote {target}")


def fast_encoder():
    import comfy.sd1_clip

    from softrepa.smallworld.text import FastEncoder

    return FastEncoder(comfy.sd1_clip.SDTokenizer())


def measure(network: str, images: int, into: Path) -> None:
    import comfy.utils

    from . import measure as m

    comfy.utils.PROGRESS_BAR_ENABLED = False
    report = {"sampling": m.SAMPLING, "checker": m.measure_checker()}
    report["retrieval beside captions wrong by one fact"] = m.measure_retrieval(fast_encoder(), network=network)
    with tempfile.TemporaryDirectory() as folder:
        pictures, sheet = m.measure_pictures(m.StockModel(Path(folder), network), images)
    print(m.write_report(into, report | pictures, sheet, network))


def tokens(
    network: str, steps: int, pictures: int, seeds: int, temperatures: Sequence[float], into: Path | None
) -> None:
    import comfy.utils

    from . import tokens as t
    from .measure import replace_text

    comfy.utils.PROGRESS_BAR_ENABLED = False
    with tempfile.TemporaryDirectory() as work:
        changes, file = t.study(Path(work), pictures, steps, seeds, network, temperatures)
        if into is not None:
            shutil.copyfile(file, into / "tokens.safetensors")
    text = t.report(changes, pictures, steps, seeds, network)
    replace_text(FOLDER / "results" / ("tokens.md" if network == "model" else f"tokens-{network}.md"), text)
    print(text)


def show(count: int, into: Path | None) -> None:
    import comfy.utils

    from . import padding, shown
    from .measure import StockModel

    padding.give_once()
    comfy.utils.PROGRESS_BAR_ENABLED = False
    with tempfile.TemporaryDirectory() as folder:
        picture = shown.PICTURE if into is None else into / shown.PICTURE.name
        print(shown.show(StockModel(Path(folder)), into or shown.FOLDER, count, picture))


def edit(count: int, into: Path) -> None:
    import comfy.utils

    from softrepa.comfy.tokens.patching import apply_tokens
    from softrepa.token_files import load

    from . import editing
    from .measure import StockModel, replace_picture, replace_text

    comfy.utils.PROGRESS_BAR_ENABLED = False
    with tempfile.TemporaryDirectory() as folder:
        stock = StockModel(Path(folder))
        editor = editing.Editor(stock, editing.edits(count))
        with_tokens = apply_tokens(stock.model, load(SHIPPED / "tokens.safetensors"))
        cells = editing.sweep(editor, {"without tokens": stock.model, "with tokens": with_tokens})
    replace_text(into / "editing.md", editing.table(cells, count))
    replace_picture(into / "editing.png", editing.picture(editor, cells, (0, 1, 2, 3)))


def main() -> None:
    chosen = arguments()
    environment.enter("benchmarks.smallworld")
    import torch

    torch.set_num_threads(chosen.threads)
    use_comfyui()
    if chosen.command == "train":
        train(chosen.network, chosen.state, chosen.into, chosen.device, chosen.workers)
    elif chosen.command == "measure":
        measure(chosen.network, chosen.images, chosen.into)
    elif chosen.command == "tokens":
        tokens(chosen.network, chosen.steps, chosen.pictures, chosen.seeds, chosen.temperatures, chosen.into)
    elif chosen.command == "show":
        show(chosen.prompts, chosen.into)
    elif chosen.command == "edit":
        edit(chosen.edits, chosen.into)
    else:
        from softrepa.smallworld.checkpoint import write_checkpoint

        from . import flux

        write = flux.write_checkpoint if chosen.network == "flux" else write_checkpoint
        print(f"wrote {write(chosen.path)}")


if __name__ == "__main__":
    main()
