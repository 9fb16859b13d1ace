"""The shipped workflows: graphs, layout and notes. `make_workflows.py` turns them into files."""

from dataclasses import replace

from .blueprints import editing_blueprint, sampling_blueprint, training_blueprint
from .layout import Workflow
from .models import FLUX, MODELS, QWEN_IMAGE, SD3, SDXL, Z_IMAGE
from .small_world import small_world, small_world_edit, small_world_training
from .templates import comparing, converting, flowedit, scoring, text_to_image, training

NEWER = (FLUX, Z_IMAGE, QWEN_IMAGE)


def in_order(*workflows: Workflow) -> tuple[Workflow, ...]:
    """Numbered, for templates are listed by the names of their files."""
    return tuple(
        replace(workflow, title=f"{number:02} {workflow.title}") for number, workflow in enumerate(workflows, start=1)
    )


WORKFLOWS = in_order(
    small_world(),
    small_world_training(),
    small_world_edit(),
    *(text_to_image(model) for model in MODELS),
    *(flowedit(model) for model in (SDXL, SD3)),
    flowedit(SD3, is_masked=True),
    *(flowedit(model) for model in NEWER),
    *(training(model) for model in (SD3, *NEWER)),
    scoring(SD3),
    comparing(SD3),
    converting(),
)
BLUEPRINTS = (sampling_blueprint(), editing_blueprint(), training_blueprint())
