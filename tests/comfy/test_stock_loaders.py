"""Stand-ins of the newer families, as small as ComfyUI's own detection of diffusion models allows."""

import comfy.model_detection
import comfy.supported_models
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_softrepa.softrepa.comfy.families import model_shape
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.families import FAMILIES
from comfyui_softrepa.softrepa.tokens import SoftTokens
from safetensors.torch import save_file
from softrepa_tests import tiny_models
from softrepa_tests.oracle import blocks_of, injected
from softrepa_tests.sampling import prompt, relative_error, sample
from softrepa_tests.tiny_models import CPU, seeded

import nodes

ONE_HEAD = {"hidden_size": 128, "num_heads": 1, "axes_dim": [16, 56, 56]}
SMALL = {
    "flux": ONE_HEAD,
    "flux2": ONE_HEAD | {"axes_dim": [32, 32, 32, 32]},
    "krea2": {
        "heads": 1,
        "kvheads": 1,
        "tdim": 256,
        "txtlayers": 12,
        "txtdim": 60,
        "txtheads": 20,
        "txtkvheads": 20,
        "multiplier": 4,
    },
    "hunyuanimage": {"hidden_size": 128, "num_heads": 1, "axes_dim": [64, 64]},
}
"""Of the tiny models' configurations, what detection reads otherwise."""
TEXT = {"krea2": 12 * 60}
"""Width of the text where it is not the real one."""

FIXED = {
    "lumina2": {
        "dim": 2304,
        "n_heads": 24,
        "n_kv_heads": 8,
        "axes_dims": [32, 32, 32],
        "ffn_dim_multiplier": 4.0,
        "n_layers": 1,
    },
    "zimage": {
        "dim": 3840,
        "n_heads": 30,
        "n_kv_heads": 30,
        "axes_dims": [32, 48, 48],
        "ffn_dim_multiplier": 8 / 3,
        "n_layers": 1,
    },
    "chroma": ONE_HEAD
    | {
        "hidden_size": 3072,
        "num_heads": 24,
        "depth": 1,
        "depth_single_blocks": 1,
        "out_dim": 3072,
        "hidden_dim": 5120,
        "n_layers": 5,
    },
    "qwenimage": {
        "num_layers": 1,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "axes_dims_rope": [16, 56, 56],
    },
    "anima": {
        "model_channels": 256,
        "adaln_lora_dim": 256,
        "num_blocks": 10,
        "num_heads": 16,
    },
}
"""Families of which the smallest model is large: sizes that detection has from no tensor."""


def test_every_transformer_is_in_one_of_the_lists():
    assert sorted([*SMALL, *FIXED]) == sorted(
        family.name for family in FAMILIES.values() if family.stream == "sequence"
    )


def config_of(family: str) -> tuple[str, dict]:
    kind, config = tiny_models.TRANSFORMERS[family]
    return kind, config | (SMALL | FIXED)[family]


@pytest.mark.parametrize("family", SMALL)
def test_a_small_file_by_the_stock_loader(family, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(tmp_path)], {".safetensors"}))
    network = tiny_models.with_network(*config_of(family)).model.diffusion_model
    save_file(network.state_dict(), tmp_path / f"{family}.safetensors")
    (model,) = nodes.UNETLoader().load_unet(f"{family}.safetensors", "default")
    shape = model_shape(model)
    assert (shape.family.name, shape.width, shape.layers) == (family, 128, len(blocks_of(network)))
    tokens = SoftTokens.of(seeded((shape.layers, 4, shape.width), "rows", 0.5), family, shape.layers)
    width = TEXT.get(family, tiny_models.WIDTH[family])
    options = {"steps": 2, "cfg": 1.0, "positive": prompt(family, "positive")}
    options["positive"][0][0] = options["positive"][0][0][..., :width]
    with injected(model, tokens):
        expected = sample(model, family, **options)
    assert relative_error(sample(apply_tokens(model, tokens), family, **options), expected) <= 1e-5
    assert relative_error(sample(model, family, **options), expected) > 1e-3


@pytest.mark.parametrize("family", FIXED)
def test_large_ones_are_recognised_by_names_and_shapes(family):
    """Without a number of theirs: a file would be of hundreds of megabytes."""
    kind, config = config_of(family)
    made = getattr(comfy.supported_models, kind)(dict(config))
    made.unet_config.update(config)
    weights = made.get_model({}, device=torch.device("meta")).diffusion_model.state_dict()
    model = comfy.model_detection.model_config_from_unet(weights, "").get_model(weights, device=torch.device("meta"))
    found = model.diffusion_model.state_dict()
    assert {name: one.shape for name, one in found.items()} == {name: one.shape for name, one in weights.items()}
    shape = model_shape(ModelPatcher(model, CPU, CPU))
    assert (shape.family.name, shape.layers) == (family, len(blocks_of(model.diffusion_model)))
