"""FlowEdit on drawn scenes: one fact of the caption changes; does that fact change, and do the others stay?"""

from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw

from softrepa.smallworld.world import COLOURS, SHAPES, Group, Scene, Spec, Thing, draw, plain_caption, random_scene

from . import checker
from .checker import Found
from .measure import wilson

STEPS = 20
SOURCE_CFG = 1.5
N_MAX = (4, 8, 12, 16)
TARGET_CFG = (2.0, 4.0, 8.0)
PLACE = 14  # pixels: a thing further away than that from where it was is another thing


@dataclass(frozen=True)
class Edit:
    """A scene whose first thing gets another `attribute`, "colour" or "shape"."""

    scene: Scene
    source: Spec
    target: Spec
    attribute: str

    @property
    def prompts(self) -> tuple[str, str]:
        """Source and target caption."""
        return plain_caption(self.source), plain_caption(self.target)


def random_edit(rng: np.random.Generator, things: int, attribute: str) -> Edit:
    """One or two things of different shapes and colours, all named."""
    shapes, colours = rng.permutation(list(SHAPES)), rng.permutation(list(COLOURS))
    groups = tuple(Group(str(shapes[i]), colour=str(colours[i])) for i in range(things))
    new = str(shapes[things] if attribute == "shape" else colours[things])
    source = Spec(groups)
    target = Spec((replace(groups[0], **{attribute: new}), *groups[1:]))
    return Edit(random_scene(rng, source), source, target, attribute)


def edits(count: int, seed: int = 21) -> list[Edit]:
    """`count` edits: of one and of two things, of colours and of shapes, in turn."""
    rng = np.random.default_rng(seed)
    return [random_edit(rng, 1 + number % 2, ("colour", "shape")[number // 2 % 2]) for number in range(count)]


def verdict(picture: np.ndarray, edit: Edit) -> tuple[bool, bool]:
    """Whether the fact changed, and whether everything else stayed: the other attribute, places, other things."""
    found = checker.find(picture)
    seen = [_at(found, thing) for thing in edit.scene.things]
    if seen[0] is None:
        return False, False
    other = "shape" if edit.attribute == "colour" else "colour"
    changed = getattr(seen[0], edit.attribute) == getattr(edit.target.groups[0], edit.attribute)
    stayed = getattr(seen[0], other) == getattr(edit.scene.things[0], other)
    for thing, now in zip(edit.scene.things[1:], seen[1:], strict=True):
        stayed = stayed and now is not None and (now.shape, now.colour) == (thing.shape, thing.colour)
    return changed, stayed and len(found) == len(edit.scene.things)


def _at(found: list[Found], thing: Thing) -> Found | None:
    near = [one for one in found if max(abs(one.x - thing.x), abs(one.y - thing.y)) <= PLACE]
    return near[0] if near else None


class Editor:
    """All edits at once through the pack's own guider and sampler, on the stock loader's model."""

    def __init__(self, stock, wanted: list[Edit]):
        self.stock, self.edits = stock, wanted
        self.pictures = np.stack([draw(edit.scene) for edit in wanted])
        with torch.inference_mode():
            self.latent = {"samples": stock.vae.encode(torch.from_numpy(self.pictures))}
        source, target = (self._conds([edit.prompts[side] for edit in wanted]) for side in (0, 1))
        empty = self._conds([""] * len(wanted))
        self.conds = (source, empty, target, empty)

    def _conds(self, texts: list[str]) -> list:
        encoded = {text: self.stock.encode(text)[0] for text in dict.fromkeys(texts)}
        cross, pooled = zip(*((encoded[text][0], encoded[text][1]["pooled_output"]) for text in texts), strict=True)
        return [[torch.cat(cross), {"pooled_output": torch.cat(pooled)}]]

    @torch.inference_mode()
    def run(self, model, n_max: int, target_cfg: float, source_cfg: float = SOURCE_CFG, seed: int = 0) -> np.ndarray:
        """The edited pictures, float32 BHWC."""
        from softrepa.comfy.editing.flowedit import FlowEditGuider, FlowEditSampler, edit_latent, edit_sigmas

        guider = FlowEditGuider(model)
        guider.set_conds(*self.conds)
        guider.set_cfg(source_cfg, target_cfg)
        sigmas = edit_sigmas(model, "normal", STEPS, n_max)
        out = edit_latent(guider, FlowEditSampler(), sigmas, self.latent, seed)
        return self.stock.vae.decode(out["samples"]).float().clamp(0, 1).cpu().numpy()

    def verdicts(self, pictures: np.ndarray) -> tuple[list[bool], list[bool]]:
        """Of every edit: changed, kept."""
        both = [verdict(picture, edit) for picture, edit in zip(pictures, self.edits, strict=True)]
        return [changed for changed, _ in both], [kept for _, kept in both]


def sweep(editor: Editor, models: dict[str, object], say=print) -> dict:
    """{(model's name, n_max, target_cfg): (pictures, changed, kept)} for every setting."""
    cells = {}
    for name, model in models.items():
        for n_max in N_MAX:
            for cfg in TARGET_CFG:
                pictures = editor.run(model, n_max, cfg)
                cells[name, n_max, cfg] = (pictures, *editor.verdicts(pictures))
                changed, kept = (np.mean(verdicts) for verdicts in cells[name, n_max, cfg][1:])
                say(f"{name}, n_max {n_max}, target_cfg {cfg:g}: changed {changed:.0%}, rest kept {kept:.0%}")
    return cells


def table(cells: dict, count: int) -> str:
    """Shares of changed facts, kept rests, and both, with 95% intervals for both, in Markdown."""
    lines = [
        "# FlowEdit on the small world",
        "",
        f"{count} scenes of one or two things; the caption changes one colour or one shape. Read by the checker. "
        f"{STEPS} steps, source_cfg {SOURCE_CFG:g}. Intervals at 95%.",
        "",
        "| model | n_max | target_cfg | fact changed | rest kept | both |",
        "|---|---|---|---|---|---|",
    ]
    for (name, n_max, cfg), (_, changed, kept) in cells.items():
        both = [a and b for a, b in zip(changed, kept, strict=True)]
        low, high = wilson(sum(both), count)
        shares = (f"{np.mean(changed):.0%}", f"{np.mean(kept):.0%}", f"{np.mean(both):.0%} ({low:.0%} to {high:.0%})")
        lines.append(f"| {name} | {n_max} | {cfg:g} | {' | '.join(shares)} |")
    return "\n".join([*lines, ""])


def picture(editor: Editor, cells: dict, examples: tuple[int, ...]) -> Image.Image:
    """For each example its source, then a grid: n_max across, target_cfg down, a block for each model."""
    names = list(dict.fromkeys(name for name, *_ in cells))
    side, head, gap = 72, 34, 8
    block = len(N_MAX) * side
    width = side + gap + len(names) * (block + gap)
    height = head + len(TARGET_CFG) * side + gap
    sheet = Image.new("RGB", (width, height * len(examples)), "white")
    pen = ImageDraw.Draw(sheet)

    def paste(array: np.ndarray, x: int, y: int) -> None:
        small = Image.fromarray((array * 255).round().astype(np.uint8)).resize((side, side), Image.Resampling.LANCZOS)
        sheet.paste(small, (x, y))

    for row, example in enumerate(examples):
        top = row * height
        source, target = editor.edits[example].prompts
        pen.text((2, top + 2), f"{source}  ->  {target}", "black", font_size=11)
        paste(editor.pictures[example], 0, top + head)
        for column, name in enumerate(names):
            left = side + gap + column * (block + gap)
            across, down = (", ".join(f"{value:g}" for value in values) for values in (N_MAX, TARGET_CFG))
            pen.text((left, top + 18), f"{name}: n_max {across} across, target_cfg {down} down", "black", font_size=10)
            for x, n_max in enumerate(N_MAX):
                for y, cfg in enumerate(TARGET_CFG):
                    paste(cells[name, n_max, cfg][0][example], left + x * side, top + head + y * side)
    return sheet
