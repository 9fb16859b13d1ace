"""The nodes as ComfyUI loads them: what they do, and the sentence for each wrong input."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import folder_paths
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from comfyui_softrepa.nodes import merging
from comfyui_softrepa.softrepa import token_files
from safetensors.torch import save_file
from softrepa_tests import published, tiny_models
from softrepa_tests.conftest import ROOT
from softrepa_tests.oracle import injected
from softrepa_tests.sampling import relative_error, sample
from softrepa_tests.token_sets import tokens_for


@pytest.fixture
def saved(token_folder):
    """Files for the tiny models in models/softrepa; their names by family."""
    for family in ("sd15", "sdxl", "sd3"):
        token_files.save(tokens_for(family), token_folder / f"{family}.safetensors")
    return {family: f"{family}.safetensors" for family in ("sd15", "sdxl", "sd3")}


def choices(node) -> list[str]:
    return node.INPUT_TYPES()["required"]["tokens_name"][1]["options"]


def test_every_node_is_documented(pack):
    assert {"SoftREPALoadTokens", "SoftREPAApplyTokens", "SoftREPASaveTokens", "SoftREPAPreviewTokens"} <= set(pack)
    for name, node in pack.items():
        schema = node.GET_SCHEMA()
        assert schema.category == "SoftREPA"
        assert schema.description
        assert getattr(schema, "search_aliases", True)  # not in ComfyUI 0.3.75
        for entry in (*schema.inputs, *(schema.outputs or ())):
            assert entry.tooltip, (name, entry.id)
        page = ROOT / "nodes" / "web" / "docs" / f"{name}.md"
        text = page.read_text(encoding="utf-8")
        for entry in schema.inputs:
            assert f"`{entry.id}`" in text, (page, entry.id)


def test_without_a_model_the_file_is_only_loaded(pack, saved):
    blocked, tokens = pack["SoftREPALoadTokens"].execute(None, saved["sd15"]).args
    assert isinstance(blocked, ExecutionBlocker)
    assert "has no model connected" in blocked.message
    assert torch.equal(tokens.tokens, tokens_for("sd15").tokens)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_load_and_apply_are_the_reference(pack, models, saved, family):
    patched, tokens = pack["SoftREPALoadTokens"].execute(models[family], saved[family]).args
    (applied,) = pack["SoftREPAApplyTokens"].execute(models[family], tokens).args
    with injected(models[family], tokens_for(family)):
        expected = sample(models[family], family)
    assert relative_error(sample(patched, family), expected) <= 1e-5
    assert torch.equal(sample(applied, family), sample(patched, family))


def test_published_folders_are_listed_and_load(pack, token_folder):
    load = pack["SoftREPALoadTokens"]
    published.write(token_folder / "papers" / "sd1.5", "sd15")
    published.write(token_folder, "sdxl")
    (token_folder / "readme.txt").write_text("not a token file")
    assert choices(load) == ["dc_tokens.pth", str(Path("papers/sd1.5"))]
    for family, name in (("sd15", str(Path("papers/sd1.5"))), ("sdxl", "dc_tokens.pth")):
        model = tiny_models.build(family)
        patched, tokens = load.execute(model, name).args
        assert (tokens.time_table is None) == (family == "sdxl")
        assert torch.isfinite(sample(patched, family, steps=1)).all()


def test_published_sd3_width_runs(pack, token_folder):
    published.write(token_folder / "sd3", "sd3")
    model = tiny_models.mmdit_of(1536, 6)
    patched, tokens = pack["SoftREPALoadTokens"].execute(model, "sd3").args
    with injected(model, tokens):
        expected = sample(model, "sd3", steps=1)
    assert relative_error(sample(patched, "sd3", steps=1), expected) <= 1e-5


OFFICIAL = os.environ.get("SOFTREPA_OFFICIAL_TOKENS")
if OFFICIAL:

    @pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
    def test_official_files_run(models, family):
        from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens

        model = tiny_models.mmdit_of(1536, 6) if family == "sd3" else models[family]
        tokens = token_files.load(Path(OFFICIAL) / family.replace("sd15", "sd1.5"))
        with injected(model, tokens):
            expected = sample(model, family, steps=2)
        assert relative_error(sample(apply_tokens(model, tokens), family, steps=2), expected) <= 1e-5


def test_saved_files_are_listed_at_once(pack, models, token_folder):
    published.write(token_folder / "original", "sd15")
    load, save = pack["SoftREPALoadTokens"], pack["SoftREPASaveTokens"]
    _, tokens = load.execute(models["sd15"], "original").args
    for expected in ("mine/converted_00001.safetensors", "mine/converted_00002.safetensors"):
        save.execute(tokens, "mine/converted")
        assert os.path.normpath(expected) in choices(load)
    _, again = load.execute(models["sd15"], os.path.normpath(expected)).args
    assert torch.equal(again.tokens, tokens.tokens)
    assert torch.equal(again.time_table, tokens.time_table)


@pytest.mark.parametrize("prefix", ["../outside", "/tmp/outside", "", "a/../../outside", "a\0b", "x" * 300])
def test_saving_stays_in_the_model_folder(pack, models, saved, prefix):
    _, tokens = pack["SoftREPALoadTokens"].execute(models["sd15"], saved["sd15"]).args
    with pytest.raises(ValueError, match="filename_prefix is .* at most 100 characters inside models/softrepa"):
        pack["SoftREPASaveTokens"].execute(tokens, prefix)


def test_several_model_folders(pack, models, token_folder, tmp_path, monkeypatch):
    """A folder that only holds saved files does not hide published ones of its name; new files go home."""
    first, second = tmp_path / "first", tmp_path / "second"
    token_files.save(tokens_for("sd15"), first / "mine" / "one.safetensors")
    published.write(second / "mine", "sd15")
    paths = [str(first), str(second), str(token_folder)]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "softrepa", (paths, {".safetensors", ".pth"}))
    load = pack["SoftREPALoadTokens"]
    assert choices(load) == ["mine", str(Path("mine/one.safetensors"))]
    _, tokens = load.execute(models["sd15"], "mine").args
    assert tokens.time_table is not None
    assert load.fingerprint_inputs(tokens_name="mine") != []
    pack["SoftREPASaveTokens"].execute(tokens, "new")
    assert [path.name for path in token_folder.glob("*.safetensors")] == ["new_00001.safetensors"]


def test_a_linked_name_can_be_fingerprinted(pack):
    load = pack["SoftREPALoadTokens"]
    assert load.fingerprint_inputs(tokens_name=None) is None
    assert load.validate_inputs(tokens_name=None) is True
    assert pack["SoftREPASmallWorldPictures"].fingerprint_inputs(count=16, seed=None) is None


def test_what_is_no_node_does_not_keep_a_merge_from_being_told(monkeypatch):
    told = []
    sends = SimpleNamespace(send_progress_text=lambda text, node, client: told.append((node, text)))
    monkeypatch.setattr(merging, "PromptServer", SimpleNamespace(instance=sends))
    graph = {
        "1": {"class_type": "SoftREPALoadTokens", "inputs": {}},
        "2": {"class_type": "ModelMergeSimple", "inputs": {"model2": ["1", 0]}},
    }
    broken = {"3": None, "4": {"class_type": "KSampler", "inputs": []}, "5": {"inputs": {"model2": ["1", 0]}}}
    for asked in (graph, graph | broken):
        request = {"prompt": asked}
        assert merging.tell(request) is request
    assert [node for node, _ in told] == ["1", "1"]
    assert merging.tell({"prompt": [graph]}) == {"prompt": [graph]}


def test_dangling_links_are_not_listed(pack, token_folder):
    (token_folder / "gone.safetensors").symlink_to(token_folder / "nowhere")
    assert choices(pack["SoftREPALoadTokens"]) == []


def test_a_time_table_that_comes_later_is_loaded(pack, models, token_folder, tmp_path):
    """Beside a published file that lies in the model folder itself."""
    published.write(tmp_path / "published", "sd15")
    table = tmp_path / "published" / "dc_t_tokens.pth"
    shutil.move(tmp_path / "published" / "dc_tokens.pth", token_folder)
    load, marks = pack["SoftREPALoadTokens"], []
    for is_there in (False, True):
        if is_there:
            shutil.move(table, token_folder)
        marks.append(load.fingerprint_inputs(tokens_name="dc_tokens.pth"))
        tokens = load.execute(models["sd15"], "dc_tokens.pth").args[1]
        assert (tokens.time_table is not None) == is_there
    assert marks[0] != marks[1]


def test_a_changed_file_is_loaded_again(pack, saved, token_folder):
    load = pack["SoftREPALoadTokens"]
    os.utime(token_folder / saved["sd15"], (1, 1))  # some systems' file times move in large steps
    before = load.fingerprint_inputs(tokens_name=saved["sd15"])
    assert load.fingerprint_inputs(tokens_name=saved["sd15"]) == before
    token_files.save(tokens_for("sd15", "b"), token_folder / saved["sd15"])
    assert load.fingerprint_inputs(tokens_name=saved["sd15"]) != before


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3"])
def test_preview(pack, models, saved, family):
    _, tokens = pack["SoftREPALoadTokens"].execute(models[family], saved[family]).args
    output = pack["SoftREPAPreviewTokens"].execute(tokens)
    image, text = output.args
    assert image.shape[0] == 1
    assert image.shape[3] == 3
    assert 0 <= image.min() < image.max() <= 1
    assert family in text
    assert output.ui.as_dict()["images"]


def refusal(pack, model, name, **options) -> str:
    with pytest.raises(ValueError, match=".") as caught:
        pack["SoftREPALoadTokens"].execute(model, name, **options)
    assert caught.value.__cause__ is None
    return str(caught.value)


def test_wrong_family_and_width(pack, models, saved, token_folder):
    message = refusal(pack, models["sdxl"], saved["sd3"])
    expected = 'Tokens "sd3.safetensors" are for sd3 (5 layers x 128), but this model is SDXL (context width 2048).'
    assert message == expected
    assert "are for sd15 (context width 768), but this model is SD3 (6 joint blocks x 128)" in refusal(
        pack, models["sd3"], saved["sd15"]
    )
    published.write(token_folder / "wide", "sd3")
    assert '"wide" are for sd3 (5 layers x 1536), but this model is SD3 (6 joint blocks x 128)' in refusal(
        pack, models["sd3"], "wide"
    )
    save_file({"tokens": torch.ones(9, 4, 128)}, token_folder / "deep.safetensors")
    assert "(9 layers x 128), but this model is SD3 (6 joint blocks" in refusal(pack, models["sd3"], "deep.safetensors")


def test_wrong_files(pack, models, saved, token_folder):
    (token_folder / "cut.safetensors").write_bytes((token_folder / "sd15.safetensors").read_bytes()[:-50])
    assert "expected a whole file" in refusal(pack, models["sd15"], "cut.safetensors")
    save_file({"lora.up.weight": torch.ones(4, 4)}, token_folder / "lora.safetensors")
    assert "expected `tokens`" in refusal(pack, models["sd15"], "lora.safetensors")
    save_file({"tokens": torch.full((4, 768), torch.nan)}, token_folder / "nan.safetensors")
    assert "NaN or infinite" in refusal(pack, models["sd15"], "nan.safetensors")
    save_file({"time_table": torch.ones(100, 768)}, token_folder / "table.safetensors")
    assert "without tokens" in refusal(pack, models["sd15"], "table.safetensors")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": -1.0}, "strength is -1.0, expected 0 or more"),
        ({"strength": float("nan")}, "strength is nan"),
        ({"start_percent": 0.8, "end_percent": 0.2}, "start_percent is 0.8, expected at most end_percent, 0.2"),
        ({"end_percent": 1.5}, "end_percent is 1.5, expected 0 to 1"),
        ({"blocks": "down,sideways"}, 'blocks is "down,sideways", expected a comma list of down, mid, up'),
        ({"blocks": ""}, 'blocks is ""'),
        ({"apply_to": "none"}, 'apply_to is "none", expected one of both, positive, negative'),
        ({"uncond_bank": "negative"}, 'uncond_bank is "negative", but the file has one bank'),
    ],
)
def test_wrong_options(pack, models, saved, options, message):
    assert message in refusal(pack, models["sd15"], saved["sd15"], **options)
    if "blocks" not in options:  # at strength 0 too
        assert message in refusal(pack, models["sd15"], saved["sd15"], **({"strength": 0.0} | options))


def test_too_many_blocks(pack, models, saved):
    assert "blocks is 6, expected at most the file's 5 layers" in refusal(pack, models["sd3"], saved["sd3"], blocks="6")
    assert 'blocks is "down", expected the number of joint blocks' in refusal(
        pack, models["sd3"], saved["sd3"], blocks="down"
    )


def test_models_of_another_family(pack, models, saved):
    import comfy.ldm.flux.model
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models

    config = {
        "image_model": "flux",
        "in_channels": 16,
        "patch_size": 2,
        "out_channels": 16,
        "vec_in_dim": 64,
        "context_in_dim": 64,
        "hidden_size": 128,
        "mlp_ratio": 4.0,
        "num_heads": 1,
        "depth": 1,
        "depth_single_blocks": 1,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "qkv_bias": True,
        "guidance_embed": True,
    }
    if "txt_ids_dims" in comfy.ldm.flux.model.FluxParams.__dataclass_fields__:  # not in ComfyUI 0.3.75
        config["txt_ids_dims"] = []
    flux = comfy.model_base.Flux(comfy.supported_models.Flux(config), device="cpu")
    patcher = comfy.model_patcher.ModelPatcher(flux, torch.device("cpu"), torch.device("cpu"))
    expected = 'Tokens "sd3.safetensors" are for sd3 (5 layers x 128), but this model is Flux 1 (2 blocks x 128).'
    assert refusal(pack, patcher, saved["sd3"]) == expected


def test_names_that_are_not_there(pack, token_folder, saved):
    load = pack["SoftREPALoadTokens"]
    assert load.validate_inputs(tokens_name="sd15.safetensors") is True
    message = load.validate_inputs(tokens_name="gone.safetensors")
    assert message == (
        'Tokens "gone.safetensors": not in models/softrepa, '
        "expected one of sd15.safetensors, sd3.safetensors, sdxl.safetensors there."
    )
    assert "not in models/softrepa" in load.validate_inputs(tokens_name="../../secret.safetensors")
    for file in token_folder.iterdir():
        file.unlink()
    assert choices(load) == []
    assert "no token files are in models/softrepa" in load.validate_inputs(tokens_name="gone.safetensors")
