"""What nodes make of a MODEL is gone when they are done, without waiting until Python looks for circles.

A clone that is found later, together with the clone it was made of, leaves ComfyUI with a loaded model that it calls a
memory leak; from then on it collects garbage before every sampling.
"""

import gc
import shutil
import weakref

import comfy.model_management as memory
import pytest
from comfy.model_patcher import ModelPatcher
from comfyui_softrepa.nodes.compare import CompareTokens
from comfyui_softrepa.nodes.flowedit import FlowEdit
from comfyui_softrepa.nodes.score import AlignmentScore
from comfyui_softrepa.softrepa.comfy.comparing import run as running
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.errors import SoftREPAError
from softrepa_tests.comparing import PROMPTS, SMALL, small_world
from softrepa_tests.editing import conds, source_latent
from softrepa_tests.learning import dataset, train
from softrepa_tests.sampling import sample
from softrepa_tests.token_sets import tokens_for


def train_and_stop(model, family):
    with pytest.raises(SoftREPAError, match="loss"):
        train({family: model}, family, steps=5, learning_rate=1e30, optimizer="SGD", temperature=2.0)


def flow_edit(model, family):
    FlowEdit.execute(model, latent_image={"samples": source_latent(family)}, seed=3, steps=4, n_max=3, **conds(family))


USES = {
    "tokens": lambda model, family: sample(apply_tokens(model, tokens_for(family)), family, steps=2),
    "training": lambda model, family: train({family: model}, family, temperature=2.0),
    "AGSM": lambda model, family: train({family: model}, family, preset="AGSM"),
    "training that fails": train_and_stop,
    "score": lambda model, family: AlignmentScore.execute(model, dataset(family), 3, 2, "900, 100"),
    "FlowEdit": flow_edit,
}


@pytest.fixture
def clones(monkeypatch):
    """Of every model from here on; nobody looks for circles."""
    made, clone = [], ModelPatcher.clone

    def counted(self, *args, **kwargs):
        found = clone(self, *args, **kwargs)
        made.append(weakref.ref(found))
        return found

    gc.collect()
    monkeypatch.setattr(ModelPatcher, "clone", counted)
    gc.disable()
    yield made
    gc.enable()


@pytest.mark.parametrize("family", ["sd15", "sd3", "flux"])
@pytest.mark.parametrize("use", USES)
def test_no_clone_stays(models, token_folder, clones, use, family):
    USES[use](models[family].clone(), family)
    assert clones
    assert not any(clone() for clone in clones)
    assert not any(loaded.is_dead() for loaded in memory.current_loaded_models)


def test_compare_tokens_keeps_no_clone(clones, comfy_folders):
    model, clip, vae, tokens = small_world()
    made = model.clone()
    clones.clear()
    CompareTokens.execute(model=made, clip=clip, vae=vae, tokens=tokens, prompts=PROMPTS, **SMALL)
    assert clones
    assert not any(clone() for clone in clones)
    shutil.rmtree(comfy_folders / "output" / running.FOLDER)
