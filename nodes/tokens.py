"""Load, apply, save and look at soft tokens."""

import logging

from comfy_api.latest import io, ui
from comfy_execution.graph import ExecutionBlocker

from ..softrepa import token_files
from ..softrepa.comfy import folders
from ..softrepa.comfy.tokens.patching import APPLY_TO, BANKS, apply_tokens
from ..softrepa.errors import SoftREPAError, printable, shown, unwritable
from ..softrepa.families import where
from ..softrepa.tokens import SoftTokens
from . import token_plot
from .schema import ADVANCED, ON_CANVAS, Curve, Tokens, schema, show_on_node, tell_of_new_tokens, users_theme

NO_MODEL = "Load SoftREPA Tokens has no model connected, so it has none to hand on."
ALIASES = ["soft tokens", "soft prompt", "repa", "prompt adherence", "text alignment", "dc_tokens"]


def application_inputs() -> list[io.Input]:
    """How tokens act: the optional inputs that Load and Apply share."""
    return [
        io.Float.Input(
            "strength",
            optional=True,
            default=1.0,
            min=0.0,
            max=10.0,
            step=0.05,
            round=0.001,
            tooltip="1 is the trained effect, 0 the plain model; between, the tokens get less of the attention.",
        ),
        io.Float.Input(
            "start_percent",
            optional=True,
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            round=0.001,
            tooltip="Share of the sampling after which the tokens begin to act. 0 is from the first step.",
            **ADVANCED,
        ),
        io.Float.Input(
            "end_percent",
            optional=True,
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            round=0.001,
            tooltip="Share of the sampling after which the tokens stop acting. 1 is to the last step.",
            **ADVANCED,
        ),
        io.Combo.Input(
            "apply_to",
            optional=True,
            options=list(APPLY_TO),
            default="both",
            tooltip="Which prompts see the tokens. The paper adds them to the positive and the negative prompt (both).",
            **ADVANCED,
        ),
        io.String.Input(
            "blocks",
            optional=True,
            default="auto",
            tooltip="Where the tokens act. auto: as the file says. SD1.5, SDXL: a list of down, mid, up. "
            "Other models: how many of the first blocks.",
            **ADVANCED,
        ),
        io.Combo.Input(
            "uncond_bank",
            optional=True,
            options=list(BANKS),
            default="positive",
            tooltip="For files with two banks (AGSM): which one the negative prompt sees.",
            **ADVANCED,
        ),
        Curve.Input(
            "strength_curve",
            optional=True,
            tooltip="From ComfyUI's Curve Editor: what strength is multiplied by over the sampling. Left is the first "
            "step, right the last.",
            extra_dict={"forceInput": True, "default": {"points": [[0, 1], [1, 1]], "interpolation": "linear"}},
        ),
    ]


def description_line(tokens: SoftTokens) -> str:
    """What was loaded, in a line for the node."""
    time = "with time table" if tokens.time_table is not None else "no time table: static tokens"
    padding = f", in place of padding ({tokens.splice})" if tokens.splice is not None else ""
    return f"{tokens.family.title}, {tokens.count} tokens, {where(tokens.blocks)}, {time}{padding}"


class LoadTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPALoadTokens",
            display_name="Load SoftREPA Tokens",
            search_aliases=ALIASES,
            description="Loads soft text tokens and adds them to the model, so that images follow the prompt better. "
            "Goes between the checkpoint loader and the sampler. Files live in models/softrepa.",
            inputs=[
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="SD1.5, SDXL, SD3, Flux, Chroma, Qwen-Image, Z-Image, Lumina 2, Krea 2, HunyuanImage or "
                    "Anima. It is not changed; a copy goes out. Without one the file is only loaded.",
                ),
                io.Combo.Input(
                    "tokens_name",
                    options=list(folders.token_paths()),
                    tooltip="A .safetensors file in models/softrepa, or a folder there with published .pth files.",
                ),
                *application_inputs(),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with the tokens in it, for the sampler."),
                Tokens.Output(display_name="tokens", tooltip="The tokens themselves, to save, look at or apply again."),
            ],
            hidden=[*ON_CANVAS],
        )

    @classmethod
    def validate_inputs(cls, tokens_name):
        try:
            if tokens_name is not None:  # None while it comes from another node
                folders.token_path(tokens_name)
        except SoftREPAError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, tokens_name, **_):
        return tokens_name and folders.fingerprint(folders.token_path(tokens_name))

    @classmethod
    def execute(cls, model=None, tokens_name="", **options) -> io.NodeOutput:
        tokens = token_files.load(folders.token_path(tokens_name), name=tokens_name)
        patched = ExecutionBlocker(NO_MODEL) if model is None else apply_tokens(model, tokens, **options)
        show_on_node(cls, description_line(tokens) + (", loaded only: no model is connected" if model is None else ""))
        if tokens.time_table is None:
            logging.info(
                "SoftREPA: %s has no time table; its tokens are the same at every timestep.", shown(tokens_name)
            )
        return io.NodeOutput(patched, tokens)


class ApplyTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPAApplyTokens",
            display_name="Apply SoftREPA Tokens",
            search_aliases=ALIASES,
            description="Adds tokens that are already in the graph (loaded or just trained) to a model. "
            "Several in a row act together.",
            inputs=[
                io.Model.Input("model", tooltip="A model of the tokens' family. It is not changed; a copy goes out."),
                Tokens.Input("tokens", tooltip="From Load SoftREPA Tokens or Train SoftREPA Tokens."),
                *application_inputs(),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the tokens in it.")],
        )

    @classmethod
    def execute(cls, model, tokens, **options) -> io.NodeOutput:
        return io.NodeOutput(apply_tokens(model, tokens, **options))


class SaveTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPASaveTokens",
            display_name="Save SoftREPA Tokens",
            search_aliases=["export tokens", "convert tokens", "dc_tokens"],
            description="Writes tokens to models/softrepa as .safetensors, where the loader lists them at once. "
            "Load followed by Save converts published .pth files.",
            inputs=[
                Tokens.Input("tokens", tooltip="The tokens to write."),
                io.String.Input(
                    "filename_prefix",
                    default="softrepa",
                    tooltip="Name of the file, numbered; folders may be given as in sd3/mine.",
                ),
            ],
            hidden=[*ON_CANVAS],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, tokens, filename_prefix) -> io.NodeOutput:
        path = folders.new_token_path(filename_prefix)
        try:
            token_files.save(tokens, path)
        except OSError as error:
            raise unwritable(path, error) from error
        show_on_node(cls, f"Saved {path.name}")
        tell_of_new_tokens()
        return io.NodeOutput(ui=ui.PreviewText(printable(str(path))))


class PreviewTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPAPreviewTokens",
            display_name="Preview SoftREPA Tokens",
            search_aliases=["inspect tokens", "token norms", "plot tokens"],
            description="Draws the size of the tokens by layer and timestep, and how alike they are to one another.",
            inputs=[Tokens.Input("tokens", tooltip="The tokens to look at.")],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Norm by layer and timestep; cosine similarity of rows."),
                io.String.Output(display_name="summary", tooltip="Family, shapes, blocks, norms and metadata."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, tokens) -> io.NodeOutput:
        plot = token_plot.draw(tokens, users_theme())
        return io.NodeOutput(plot, "\n".join(token_files.summary(tokens)), ui=ui.PreviewImage(plot, cls=cls))


NODES = [LoadTokens, ApplyTokens, SaveTokens, PreviewTokens]
