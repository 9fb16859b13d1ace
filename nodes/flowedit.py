"""FlowEdit: change what a photograph shows by describing it before and after."""

import comfy.samplers
import latent_preview
from comfy_api.latest import io

from ..softrepa.comfy.editing.checks import check_counts
from ..softrepa.comfy.editing.flowedit import FlowEditGuider, FlowEditSampler, edit_latent, edit_sigmas
from ..softrepa.editing.methods import FLOW_EDIT, METHODS
from .schema import ADVANCED, schema

ALIASES = [
    *("FlowEdit", "flow edit", "edit photo", "edit image", "image editing", "img2img"),
    *("inversion free", "prompt to prompt", "instruct edit", "FlowAlign"),
]
ALIASES_OF_PARTS = ["flow edit in parts", "inversion free editing in parts"]
"""None that people look for the whole by."""


def conditioning_inputs() -> list[io.Input]:
    return [
        io.Conditioning.Input("source_positive", tooltip="The prompt for the image as it is: say what it shows."),
        io.Conditioning.Input(
            "source_negative",
            tooltip="What the image as it is does not show; usually an empty prompt. FlowAlign does not use it.",
        ),
        io.Conditioning.Input(
            "target_positive",
            tooltip="The prompt for the image as it should become: the source prompt with the words changed that "
            "should change.",
        ),
        io.Conditioning.Input(
            "target_negative",
            tooltip="What the edited image must not show; an empty prompt is a good start. FlowAlign does not use it.",
        ),
    ]


def guidance_inputs() -> list[io.Input]:
    return [
        io.Float.Input(
            "source_cfg",
            optional=True,
            default=3.5,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How firmly the source prompt is taken for what the image shows. It stays low: 3.5 for SD3, SD1.5 "
            "and SDXL; 1 for Flux (with FluxGuidance 1.5 on the source prompt). 1 skips the negative prompt. FlowAlign "
            "does not use it.",
        ),
        io.Float.Input(
            "target_cfg",
            optional=True,
            default=13.5,
            min=0.0,
            max=100.0,
            step=0.1,
            round=0.01,
            tooltip="How strongly the image is pulled to the target prompt. Higher changes more, too high burns the "
            "colours. 13.5 for SD3, 10 to 12 with soft tokens; 1 for Flux (with FluxGuidance 5.5 on the target). "
            "FlowAlign: from the source prompt to the target prompt, 7.5 to 13.5.",
        ),
    ]


def model_inputs() -> list[io.Input]:
    return [
        io.Model.Input(
            "model",
            tooltip="Any model of still images (SD1.5, SDXL, SD3, Flux, Qwen-Image, Z-Image, Krea 2, Anima ...), with "
            "everything that is on it. No inpainting and no video models.",
        ),
        *conditioning_inputs(),
    ]


def target_model_input() -> io.Input:
    return io.Model.Input(
        "target_model",
        optional=True,
        tooltip="A second model of the same family for the target prompt, for example one with soft tokens or a LoRA "
        "while the first has none. Without it one model does both.",
        **ADVANCED,
    )


def loop_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "n_min",
            optional=True,
            default=0,
            min=0,
            max=10000,
            tooltip="How many of the last steps draw the target prompt freely, without looking back at the source. "
            "0 stays closest to the photograph; a few steps bring new texture and lose fine detail. 0 for FlowAlign.",
            **ADVANCED,
        ),
        io.Int.Input(
            "n_avg",
            optional=True,
            default=1,
            min=1,
            max=100,
            tooltip="Noise draws averaged in every step. More make the edit steadier and less dependent on the seed, "
            "and take that many times as long.",
            **ADVANCED,
        ),
    ]


def method_input() -> io.Input:
    """Behind all other widgets, where graphs from before it have none."""
    return io.Combo.Input(
        "method",
        optional=True,
        options=list(METHODS),
        default=FLOW_EDIT.name,
        tooltip="FlowAlign guides from the source prompt to the target prompt and pulls back to the source in every "
        "step: set steps and n_max to 33, n_min to 0. It uses target_cfg, but neither source_cfg nor negative prompts.",
    )


class FlowEdit(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPAFlowEdit",
            display_name="FlowEdit Sampler",
            search_aliases=ALIASES,
            description="Edits an image by two prompts: what it shows and what it should show. What the prompts have "
            "in common stays. Encode the photograph with VAE Encode and decode the result; a noise mask on the latent "
            "limits the edit to a region. The defaults are the paper's for SD3.",
            inputs=[
                *model_inputs(),
                io.Latent.Input(
                    "latent_image",
                    tooltip="The image to edit, from VAE Encode. Where its noise mask is 0 it stays exactly as it is.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="The same seed gives the same edit. Another seed gives a slightly different one.",
                ),
                io.Int.Input(
                    "steps",
                    optional=True,
                    default=50,
                    min=1,
                    max=10000,
                    tooltip="Steps of the whole schedule, from pure noise; only the last n_max of them run. Flux: 28.",
                ),
                io.Combo.Input(
                    "scheduler",
                    optional=True,
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="normal",
                    tooltip="How noise falls along the steps. normal is the paper's schedule for SD3.",
                ),
                *guidance_inputs(),
                io.Int.Input(
                    "n_max",
                    optional=True,
                    default=33,
                    min=1,
                    max=10000,
                    tooltip="How many of the steps run: how deep the edit may reach. More change shapes and layout, "
                    "fewer only colours and surfaces. Of 50: 33 for SD3 (30 with soft tokens), 41 for SD1.5 and SDXL. "
                    "Of 28: 24 for Flux.",
                ),
                *loop_inputs(),
                target_model_input(),
                method_input(),
            ],
            outputs=[io.Latent.Output(display_name="latent", tooltip="The edited image, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        source_positive,
        source_negative,
        target_positive,
        target_negative,
        latent_image,
        seed,
        steps=50,
        scheduler="normal",
        source_cfg=3.5,
        target_cfg=13.5,
        n_max=33,
        n_min=0,
        n_avg=1,
        target_model=None,
        method=FLOW_EDIT.name,
    ) -> io.NodeOutput:
        check_counts(steps, n_max, n_min)
        sampler = FlowEditSampler(n_min, n_avg, METHODS[method])
        guider = FlowEditGuider(model, target_model)
        guider.set_conds(source_positive, source_negative, target_positive, target_negative)
        guider.set_cfg(source_cfg, target_cfg)
        sigmas = edit_sigmas(model, scheduler, steps, n_max)
        callback = latent_preview.prepare_callback(model, len(sigmas) - 1)
        return io.NodeOutput(edit_latent(guider, sampler, sigmas, latent_image, seed, callback))


class FlowEditGuiderNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPAFlowEditGuider",
            display_name="FlowEdit Guider (for SamplerCustomAdvanced)",
            search_aliases=ALIASES_OF_PARTS,
            description="The prompts of an edit, for SamplerCustomAdvanced. Goes together with the FlowEdit "
            "Sampler (SAMPLER); the FlowEdit Sampler node with an image input does all of it in one.",
            inputs=[*model_inputs(), *guidance_inputs(), target_model_input()],
            outputs=[io.Guider.Output(display_name="guider", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls,
        model,
        source_positive,
        source_negative,
        target_positive,
        target_negative,
        source_cfg=3.5,
        target_cfg=13.5,
        target_model=None,
    ) -> io.NodeOutput:
        guider = FlowEditGuider(model, target_model)
        guider.set_conds(source_positive, source_negative, target_positive, target_negative)
        guider.set_cfg(source_cfg, target_cfg)
        return io.NodeOutput(guider)


class FlowEditSamplerNode(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return schema(
            node_id="SoftREPAFlowEditSampler",
            display_name="FlowEdit Sampler (for SamplerCustomAdvanced)",
            search_aliases=ALIASES_OF_PARTS,
            description="The editing algorithm, for SamplerCustomAdvanced. Goes together with the FlowEdit Guider. "
            "The sigmas given are the ones that run: cut the beginning off with SplitSigmas.",
            inputs=[*loop_inputs(), method_input()],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, n_min=0, n_avg=1, method=FLOW_EDIT.name) -> io.NodeOutput:
        return io.NodeOutput(FlowEditSampler(n_min, n_avg, METHODS[method]))


NODES = [FlowEdit, FlowEditGuiderNode, FlowEditSamplerNode]
