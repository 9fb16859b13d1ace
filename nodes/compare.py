"""Whether tokens help: the same prompts drawn without and with them, beside each other, and what judges say of it."""

from functools import partial
from pathlib import Path

import comfy.samplers
import folder_paths
import torch
from comfy_api.latest import io, ui

from ..softrepa import charts
from ..softrepa.comfy.comparing.alignment import AlignmentJudge
from ..softrepa.comfy.comparing.clip_score import CLIPJudge
from ..softrepa.comfy.comparing.questions import QuestionJudge
from ..softrepa.comfy.comparing.run import Comparison, Ways, compare, graph_of, prompt_files
from ..softrepa.comparing.inputs import CompareInputs, Prompt, parse_prompts, read_prompts
from ..softrepa.comparing.summary import Judged, as_csv, as_text, check_scores, summarize
from ..softrepa.errors import SoftREPAError, shown
from ..softrepa.statistics import Unit
from ..softrepa.training.timesteps import SCORED, parse_timesteps
from .schema import ADVANCED, ON_CANVAS, Dataset, Tokens, in_lines, schema, show_on_node, whole_graph
from .schema import widget as input_widget

Judge = io.Custom("SOFTREPA_JUDGE")
"""A tuple of judges."""
Compared = io.Custom("SOFTREPA_COMPARISON")

widget = partial(input_widget, CompareInputs)
ALIASES = ["compare", "grid", "xy plot", "does it help", "ab test", "evaluate tokens", "statistics"]
NO_FILE = "no file"
FED = ("model", "second_model", "clip", "vae")
"""Inputs whose graph decides how a picture looks."""


class CompareTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPACompare",
            display_name="Compare Tokens",
            search_aliases=ALIASES,
            description="Draws the same prompts and seeds without tokens and with them, puts them beside each other, "
            "and lets judges say whether it helps. What is drawn stays in ComfyUI's output folder: stopped, it goes on "
            "where it was.",
            inputs=[
                io.Model.Input("model", tooltip="The plain model, without soft tokens: strengths adds them."),
                Tokens.Input("tokens", tooltip="From Load SoftREPA Tokens (its TOKENS output) or from training."),
                io.Clip.Input("clip", tooltip="The text encoder of the model."),
                io.Vae.Input("vae", tooltip="The VAE of the model."),
                widget(
                    "prompts",
                    "A prompt a line. 8 show something, some hundred prove it: the table says how many it takes.",
                    multiline=True,
                ),
                widget("negative_prompt", "For every picture."),
                widget("seeds", "Of each prompt, such as 0, 1, 2 or 0-7. The same noise for every arm."),
                widget("strengths", "Each is an arm. The others are compared with 0, or else with the first."),
                widget("steps", "As in KSampler.", min=1, max=10000),
                widget("cfg", "As in KSampler.", min=0.0, max=100.0, step=0.1, round=0.01),
                widget("sampler_name", "As in KSampler.", options=comfy.samplers.SAMPLER_NAMES),
                widget("scheduler", "As in KSampler.", options=comfy.samplers.SCHEDULER_NAMES),
                widget("width", "Of each picture.", min=16, max=16384, step=8),
                widget("height", "Of each picture.", min=16, max=16384, step=8),
                widget(
                    "shown", "Pictures in the grid, the batch and the list, at most. All are files.", min=1, max=4096
                ),
                widget("filename_prefix", "The folder in output/softrepa_compare.", **ADVANCED),
                io.Combo.Input(
                    "prompts_from",
                    optional=True,
                    options=[NO_FILE, *prompt_files()],
                    default=NO_FILE,
                    tooltip="A .txt of a prompt a line in ComfyUI's input folder, or a .jsonl with prompts and facts "
                    "(GenEval 2's file is one).",
                    **ADVANCED,
                ),
                Dataset.Input(
                    "dataset",
                    optional=True,
                    tooltip="Its captions are the prompts: the first of each validation image, or of every image.",
                ),
                Judge.Input("judge", optional=True, tooltip="One judge, or several in a row."),
                io.Model.Input("second_model", optional=True, tooltip="Another arm, with whatever is on it."),
                Tokens.Input("second_tokens", optional=True, tooltip="More arms: other tokens at the same strengths."),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="Prompts down, arms across, seeds inside."),
                io.Image.Output(
                    display_name="images", tooltip="Those of the grid as a batch: by prompt, seed and arm."
                ),
                io.String.Output(display_name="table", tooltip="What the judges say, for reading."),
                io.Float.Output(
                    display_name="difference",
                    tooltip="The first judge's mean difference, of the last arm; NaN without a judge.",
                ),
                io.String.Output(display_name="csv", tooltip="The same for a spreadsheet, a line for each arm."),
                io.Image.Output(
                    display_name="image list",
                    is_output_list=True,
                    tooltip="The images one by one, for nodes that score an image.",
                ),
                io.String.Output(
                    display_name="prompt list", is_output_list=True, tooltip="The prompt of each image of the list."
                ),
                Compared.Output(display_name="comparison", tooltip="For Compare Scores: which image is which."),
            ],
            hidden=[*ON_CANVAS],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, prompts_from=NO_FILE):
        try:
            prompts_path(prompts_from)
        except SoftREPAError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, prompts_from=NO_FILE, **_):
        path = prompts_path(prompts_from)
        return path and path.stat().st_mtime_ns

    @classmethod
    def execute(
        cls,
        model,
        tokens,
        clip,
        vae,
        prompts_from=NO_FILE,
        dataset=None,
        judge=(),
        second_model=None,
        second_tokens=None,
        **inputs,
    ) -> io.NodeOutput:
        given = CompareInputs(**inputs)
        comparison = Comparison(
            Ways(model, tokens, second_model, second_tokens),
            clip,
            vae,
            prompts_of(given.prompts, prompts_from, dataset),
            given,
            judge,
            graph_of(whole_graph(cls), cls.hidden and cls.hidden.unique_id, FED),
        )
        found = compare(comparison, partial(show_on_node, cls))
        show_on_node(cls, found.text)
        images, grid = torch.from_numpy(found.images()), charts.as_image(found.grid)
        apart = [images[index : index + 1] for index in range(len(images))]
        texts = [one.text for one in found.shown]
        csv = as_csv(found.lines)
        return io.NodeOutput(
            grid, images, found.text, found.difference, csv, apart, texts, found, ui=ui.PreviewImage(grid, cls=cls)
        )


def prompts_path(name: str | None) -> Path | None:
    """Of a choice of `prompts_from`. Raises SoftREPAError where the file is gone."""
    if name in (None, NO_FILE):
        return None
    if name not in prompt_files():
        raise SoftREPAError(f'prompts_from is "{shown(name)}", expected a .txt or .jsonl in ComfyUI\'s input folder.')
    return Path(folder_paths.get_input_directory()) / name


def prompts_of(text: str, file: str, dataset) -> list[Prompt]:
    """From the one place that is given. Raises SoftREPAError for two."""
    path = prompts_path(file)
    if dataset is not None:
        if path or text.strip():
            raise SoftREPAError("Dataset gives prompts beside those of prompts or prompts_from, expected one of them.")
        captions = dict.fromkeys(example.captions[0] for example in dataset.validation or dataset.train)
        return [Prompt(caption) for caption in captions]
    if path:
        if text.strip():
            raise SoftREPAError("prompts_from gives prompts beside those of prompts, expected one of them.")
        return read_prompts(path)
    return parse_prompts(text)


class CompareScores(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPACompareScores",
            display_name="Compare Scores",
            search_aliases=[*ALIASES, "aesthetic score", "image reward", "pickscore"],
            description="Takes the scores that any node gave the image list of Compare Tokens, and says whether the "
            "arms differ.",
            is_input_list=True,
            inputs=[
                Compared.Input("comparison", tooltip="From Compare Tokens."),
                io.Float.Input("scores", force_input=True, tooltip="One for each image of the image list."),
                io.String.Input("title", optional=True, default="score", tooltip="What it is called in the table."),
                io.Boolean.Input(
                    "less_is_better", optional=True, default=False, tooltip="A distance, say. Only the table says so."
                ),
            ],
            outputs=[
                io.String.Output(display_name="table", tooltip="Means and differences with their intervals."),
                io.Float.Output(display_name="difference", tooltip="The mean difference of the last arm."),
                io.Float.Output(display_name="low", tooltip="Where its 95% interval begins."),
                io.Float.Output(display_name="high", tooltip="Where it ends."),
                io.String.Output(display_name="csv", tooltip="The same for a spreadsheet."),
            ],
            hidden=[*ON_CANVAS],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, comparison, scores, title=("score",), less_is_better=(False,)) -> io.NodeOutput:
        if len(comparison) != 1:
            raise SoftREPAError(
                f"Comparison has {len(comparison)} comparisons, expected one: Compare Tokens runs once for each entry "
                "of a list that is wired into it."
            )
        (found,) = comparison
        check_scores("scores", scores, len(found.shown))
        by_file = {one.file: float(score) for one, score in zip(found.shown, scores, strict=True)}
        note = (
            ""
            if len(found.shown) == len(found.records)
            else (f"of {len(found.shown):,} of {len(found.records):,} pictures: raise shown for more")
        )
        lines = summarize(found.shown, Judged(title[0], Unit(), by_file, note, less_is_better[0]))
        text, change = as_text(lines), lines[-1].difference
        if change is None:
            raise SoftREPAError("Comparison has 1 arm, expected 2 or more: give another strength or a second model.")
        show_on_node(cls, text)
        outputs = (text, change.mean, change.low, change.high, as_csv(lines))
        return io.NodeOutput(*outputs, ui=ui.PreviewText(in_lines(text)))


def chain_input() -> io.Input:
    return Judge.Input("judge", optional=True, tooltip="Another judge, which judges first.")


JUDGE_OUTPUT = "For Compare Tokens, or for another judge."


class AlignmentJudgeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPAAlignmentJudge",
            display_name="Judge: Alignment",
            search_aliases=[*ALIASES, "alignment score", "denoising error"],
            description="Lets the compared model itself judge, without tokens: how often a picture's denoising error "
            "is smaller under its own prompt than under another. Needs nothing else.",
            inputs=[
                io.Int.Input(
                    "others",
                    optional=True,
                    default=7,
                    min=1,
                    max=31,
                    tooltip="How many other prompts each picture is held against.",
                ),
                io.String.Input(
                    "timesteps",
                    optional=True,
                    default=SCORED,
                    tooltip="Where to measure, 0 to 999: high is much noise.",
                    **ADVANCED,
                ),
                chain_input(),
            ],
            outputs=[Judge.Output(display_name="judge", tooltip=JUDGE_OUTPUT)],
        )

    @classmethod
    def execute(cls, others=7, timesteps=SCORED, judge=()) -> io.NodeOutput:
        return io.NodeOutput((*judge, AlignmentJudge(others, parse_timesteps(timesteps))))


class QuestionJudgeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPAQuestionJudge",
            display_name="Judge: Questions",
            search_aliases=[*ALIASES, "vqascore", "geneval", "qwen3-vl", "vision language model", "tifa"],
            description="Asks a vision language model about each picture: how probable the right answer is. Takes text "
            "encoders that read images, such as Qwen3-VL.",
            inputs=[
                io.Clip.Input("clip", tooltip="Qwen3-VL from Load CLIP: a file in models/text_encoders."),
                io.String.Input(
                    "facts",
                    optional=True,
                    default="",
                    multiline=True,
                    tooltip="A line for each prompt: what must be seen, with semicolons between (three cats; a cat is "
                    "black). Empty: the facts of the prompts' file, or whether it shows the prompt.",
                ),
                chain_input(),
            ],
            outputs=[Judge.Output(display_name="judge", tooltip=JUDGE_OUTPUT)],
        )

    @classmethod
    def execute(cls, clip, facts="", judge=()) -> io.NodeOutput:
        return io.NodeOutput((*judge, QuestionJudge(clip, facts)))


class CLIPJudgeNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPACLIPJudge",
            display_name="Judge: CLIP Score",
            search_aliases=[*ALIASES, "clip score", "clip similarity"],
            description="The cosine between a picture and its prompt, as a CLIP sees them. Blind to counts and to who "
            "has which colour, but everybody's number.",
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP's text model from Load CLIP, such as clip_l.safetensors."),
                io.ClipVision.Input("clip_vision", tooltip="The vision model of the same CLIP, such as ViT-L/14."),
                chain_input(),
            ],
            outputs=[Judge.Output(display_name="judge", tooltip=JUDGE_OUTPUT)],
        )

    @classmethod
    def execute(cls, clip, clip_vision, judge=()) -> io.NodeOutput:
        return io.NodeOutput((*judge, CLIPJudge(clip, clip_vision)))


NODES = [CompareTokens, CompareScores, AlignmentJudgeNode, QuestionJudgeNode, CLIPJudgeNode]
