"""`softrepa evaluate` on the small world: pictures are the samplers' own, a stopped run ends in the same table."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import comfy.samplers
import numpy as np
import pytest
import torch
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.charts import ROW
from comfyui_softrepa.softrepa.comfy import headless
from comfyui_softrepa.softrepa.comfy.evaluation import run
from comfyui_softrepa.softrepa.comfy.evaluation.drawing import AHEAD, KEPT, Encoder, zeroed
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.evaluation.inputs import inputs_of
from comfyui_softrepa.softrepa.evaluation.presets import EDITING, SAMPLING
from comfyui_softrepa.softrepa.smallworld.checkpoint import TOKENS, cached_checkpoint
from PIL import Image
from softrepa_tests.conftest import ROOT
from softrepa_tests.judges import clip_folder, vit_folder

import nodes
from tools import environment

PAGE = (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")
EXAMPLES = [json.loads(body) for body in re.findall(r"^```json\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)]
PROMPTS = ("two red circles", "a blue square")
EDITS = [{"image": "a.png", "source": PROMPTS[0], "targets": ["two green circles", "two red squares"]}]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the page's examples name: model, tokens, prompts, a photograph, judges."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "smallworld.safetensors").symlink_to(cached_checkpoint(environment.cache_folder()))
    shutil.copy(TOKENS, folder / "tokens.safetensors")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "many.txt").write_text("\n".join(map(str, range(51))))
    (folder / "photographs").mkdir()
    photograph = np.full((96, 96, 3), 235, np.uint8)
    photograph[30:50, 20:40] = (200, 30, 30)
    Image.fromarray(photograph).save(folder / "photographs" / "a.png")
    (folder / "photographs" / "edits.json").write_text(json.dumps(EDITS))
    clip_folder(folder / "weights" / "clip-vit-large-patch14")
    return folder


@pytest.fixture(autouse=True)
def in_place(place, monkeypatch, no_network):
    monkeypatch.chdir(place)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def parts(place):
    with torch.inference_mode():
        return headless.load_checkpoint(str(place / "smallworld.safetensors"))


@pytest.fixture
def evaluate(parts, monkeypatch, tmp_path):
    """Runs a CONFIG in this process; what it tells. The model is loaded once for all tests."""
    monkeypatch.setattr(headless, "load_checkpoint", lambda name: parts)

    def evaluated(output, edits=False, stop_at="", **changed):
        config = EXAMPLES[2 if edits else 0] | {"steps": 4, "n_max": "3"} | changed
        config = {name: value for name, value in config.items() if edits or name != "n_max"}
        told = []

        def tell(text):
            told.append(text)
            if stop_at and stop_at in text:
                raise KeyboardInterrupt

        inputs = inputs_of(config | {"output": str(tmp_path / output)}, edits)
        assert run.evaluate(inputs, "config", False, tell).parent == (tmp_path / output).parent / output or told
        return told

    evaluated.folder = tmp_path
    return evaluated


def results(folder):
    """Without the name of the folder."""
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    del found["settings"]["output"]
    return found


def pictures(folder):
    return {path.relative_to(folder): np.asarray(Image.open(path)) for path in sorted(folder.glob("*/*.png"))}


@pytest.mark.parametrize("number", [0, 1])
def test_the_command_on_the_page(place, number):
    """As it is printed, with the configuration that is printed."""
    command = [line.split() for line in PAGE.splitlines() if line.startswith("    python -m softrepa evaluate")][number]
    assert command[0] == "python"
    example = EXAMPLES[2 * number]
    (place / command[-1]).write_text(json.dumps(example))
    variables = environment.steady_threads() | {"PYTHONPATH": str(ROOT)}
    run = [sys.executable, *command[1:], "--", *([] if torch.cuda.is_available() else ["--cpu"])]
    done = subprocess.run(run, cwd=place, env=variables, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    table = Path(done.stdout.strip())
    assert table == Path(example["output"], "results.md")
    found = json.loads((place / table.with_suffix(".json")).read_text(encoding="utf-8"))
    arms = [["plain", "tokens"], [f"{name}, n_max 12, cfg {cfg}" for name in ("plain", "tokens") for cfg in (2, 4)]]
    assert found["arms"] == arms[number]
    assert found["pictures"] == 2 * len(found["arms"]) == len(pictures(place / example["output"]))
    for arm in found["arms"][1:]:
        difference = found["metrics"]["clip"]["arms"][arm]
        assert difference["low"] < difference["difference"] < difference["high"]
        assert arm in (place / table).read_text(encoding="utf-8")
    first, second, *_ = done.stderr.splitlines()
    assert first.startswith("starting ComfyUI in ")
    assert second.endswith("of smallworld.safetensors")
    assert re.search(r"^1 of \d+ pictures drawn, 0:\d\d:\d\d left$", done.stderr, re.MULTILINE)


def test_pictures_are_the_samplers_own(evaluate, parts):
    evaluate("one", seeds="5")
    model, clip, vae = parts
    size = {"samples": torch.zeros(1, 16, 12, 12)}
    drawn = pictures(evaluate.folder / "one")
    for arm, used in (("plain", model), ("tokens", apply_tokens(model, token_files.load(TOKENS)))):
        for number, text in enumerate(PROMPTS):
            seed = 5 + 10_000 * number
            positive, negative = (nodes.CLIPTextEncode().encode(clip, one)[0] for one in (text, ""))
            out = nodes.KSampler().sample(used, seed, 4, 2.0, "euler", "simple", positive, negative, size)[0]
            expected = (255 * vae.decode(out["samples"])[0].float().clamp(0, 1)).round().byte().numpy()
            (path,) = (path for path in drawn if path.match(f"{arm}-*/{text.replace(' ', '_')}*_{seed}.png"))
            assert np.array_equal(drawn[path], expected)
    plain, tokens = (
        [drawn[path] for path in sorted(drawn) if path.parts[0].startswith(arm)] for arm in ("plain", "tokens")
    )
    assert not np.array_equal(plain, tokens)


def test_brackets_of_a_caption_are_no_weights(parts):
    text, clip = "a (blue:1.5) square", parts[1]
    plain = clip.encode_from_tokens_scheduled(clip.tokenize(text, disable_weights=True))
    found = Encoder(clip, [text])(text)
    assert torch.equal(found[0][0], plain[0][0])
    assert not torch.equal(found[0][0], nodes.CLIPTextEncode().encode(clip, text)[0][0][0])


def test_prompts_are_encoded_ahead_and_few_are_held(parts, monkeypatch):
    encoded = []
    monkeypatch.setattr(Encoder, "encode", lambda self, text: encoded.append(text) or [text])
    texts = [str(number) for number in range(2 * AHEAD + 1)]
    encoder = Encoder(parts[1], [text for text in texts for _ in range(2)])
    for number, text in enumerate(texts):
        assert encoder(text) == encoder(text) == [text]
        assert len(encoded) == min(len(texts), (number // AHEAD + 1) * AHEAD)
        assert encoder.group.cache_info().currsize <= KEPT


def test_edits_of_one_source_do_not_encode_it_again(parts, monkeypatch):
    """Its targets are more than are encoded at once."""
    encoded = []
    monkeypatch.setattr(Encoder, "encode", lambda self, text: encoded.append(text) or [text])
    targets = [str(number) for number in range(3 * AHEAD)]
    encoder = Encoder(parts[1], [text for target in targets for text in ("source", target)])
    for target in targets:
        for _arm in range(2):
            assert (encoder("source"), encoder(target)) == (["source"], [target])
    assert len(encoded) == len(set(encoded)) == len(targets) + 1


@pytest.mark.parametrize("stop_at", ["2 of 4 pictures drawn", "CLIP: loading", "CLIP: 2 of 4"])
def test_a_stopped_run_goes_on_to_the_same_table(evaluate, monkeypatch, stop_at):
    monkeypatch.setattr("comfyui_softrepa.softrepa.evaluation.pictures.Judge.batch", 2)
    monkeypatch.setattr("comfyui_softrepa.softrepa.evaluation.measuring.SAVED", 2)
    evaluate("whole")
    with pytest.raises(KeyboardInterrupt):
        evaluate("stopped", stop_at=stop_at)
    assert not (evaluate.folder / "stopped" / "results.md").exists()
    before = {path: path.stat().st_mtime_ns for path in (evaluate.folder / "stopped").glob("*/*.png")}
    told = evaluate("stopped")
    assert f"{len(before)} of 4 pictures are there, {4 - len(before)} to draw" in told
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert ("CLIP: 2 of 2 judged, 0:00:00 left" in told) == (stop_at == "CLIP: 2 of 4")
    assert results(evaluate.folder / "stopped") == results(evaluate.folder / "whole")
    tables = [(evaluate.folder / name / "results.md").read_bytes() for name in ("stopped", "whole")]
    assert tables[0] == tables[1]
    assert not any("judged" in text or "loading" in text for text in evaluate("stopped"))


def test_another_setting_draws_anew_beside_what_is_there(evaluate):
    evaluate("one", strengths="0", metrics={})
    told = evaluate("one", strengths="0", steps=5, metrics={})
    assert "0 of 2 pictures are there, 2 to draw" in told
    assert "2 of 8 pictures are there, 6 to draw" in evaluate(
        "one", strengths="0, 0.5", seeds="0-1", steps=5, metrics={}
    )


def test_ranks_share_the_captions_and_the_first_one_judges(evaluate, monkeypatch):
    evaluate("alone")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        told = evaluate("shared")
        assert "2 of 2 pictures drawn, 0:00:00 left" in told
        assert any("judged" in text for text in told) == (rank == 0)
    assert results(evaluate.folder / "shared") == results(evaluate.folder / "alone")


@pytest.fixture
def one_thread():
    """Sums come in one order: on more threads a value in ten thousand may be rounded to the next byte."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_edits_are_the_nodes_own(evaluate, parts, pack, place):
    vit = vit_folder(evaluate.folder / "vit")
    evaluate("edited", edits=True, target_cfg="3", tokens_n_max="2", metrics={"structure": str(vit)})
    model, clip, vae = parts
    drawn = pictures(evaluate.folder / "edited")
    assert len(drawn) == 4
    pixels = torch.from_numpy(np.asarray(Image.open("photographs/a.png"), dtype=np.float32) / 255)[None]
    latent = {"samples": vae.encode(pixels)}
    texts = [nodes.CLIPTextEncode().encode(clip, text)[0] for text in (PROMPTS[0], "", EDITS[0]["targets"][1], "")]
    arms = (("plain", model, 3), ("tokens", apply_tokens(model, token_files.load(TOKENS)), 2))
    records = (evaluate.folder / "edited" / "pictures.csv").read_text(encoding="utf-8")
    for name, used, n_max in arms:
        settings = {"steps": 4, "source_cfg": 1.5, "target_cfg": 3.0, "n_max": n_max}
        seed = 10_000  # of the second edit
        out = pack["SoftREPAFlowEdit"].execute(used, *texts, latent, seed, **settings).args[0]
        expected = (255 * vae.decode(out["samples"])[0].float().clamp(0, 1)).round().byte().numpy()
        (file,) = re.findall(rf'"{name}, n_max {n_max}, cfg 3",1,{seed},two red squares,(.*)', records)
        apart = abs(drawn[Path(file.strip())].astype(int) - expected)
        assert apart.max() <= 1  # captions are encoded several at once, which rounds otherwise on some processors
        assert apart.mean() < 1e-3


def test_another_photograph_under_the_same_name_is_edited_anew(evaluate, place, monkeypatch, tmp_path):
    shutil.copytree(place / "photographs", tmp_path / "own" / "photographs")
    shutil.copy(TOKENS, tmp_path / "own")
    (tmp_path / "own" / "smallworld.safetensors").symlink_to(place / "smallworld.safetensors")
    monkeypatch.chdir(tmp_path / "own")
    evaluate("edited", edits=True, metrics={})
    there = pictures(tmp_path / "edited")
    assert f"{len(there)} of {len(there)} pictures are there" in "".join(evaluate("edited", edits=True, metrics={}))
    with Image.open("photographs/a.png") as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("photographs/a.png")
    assert f"0 of {len(there)} pictures are there" in "".join(evaluate("edited", edits=True, metrics={}))
    assert len(pictures(tmp_path / "edited")) == 2 * len(there)


def test_the_curve_is_drawn(evaluate, place):
    import torchvision

    weights = evaluate.folder / "squeeze.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), weights)
    metrics = {"clip": "weights/clip-vit-large-patch14", "lpips": str(weights)}
    evaluate("edited", edits=True, metrics=metrics, lpips_net="squeeze", count=1)
    assert Image.open(evaluate.folder / "edited" / "curve.png").size == (540, 414 + ROW)  # two names
    found = results(evaluate.folder / "edited")
    assert found["prompts"] == 1
    assert found["metrics"]["lpips"]["arms"]["plain, n_max 3, cfg 2"]["value"] > 0


def test_zeros_for_the_negative_prompt_are_cores(parts):
    encoded = nodes.CLIPTextEncode().encode(parts[1], "a red circle")[0]
    (ours,), (cores,) = zeroed(encoded), nodes.ConditioningZeroOut().zero_out(encoded)[0]
    assert torch.equal(ours[0], cores[0])
    assert torch.equal(ours[1]["pooled_output"], cores[1]["pooled_output"])


def test_presets_name_what_comfyui_has():
    for settings in (*SAMPLING.values(), EDITING):
        assert settings.get("sampler_name", "euler") in comfy.samplers.SAMPLER_NAMES
        assert settings["scheduler"] in comfy.samplers.SCHEDULER_NAMES


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sampler_name": "oiler"}, 'sampler_name is "oiler", expected one of euler'),
        ({"tokens": "nowhere.safetensors"}, "nowhere.safetensors"),
        ({"seeds": "0-9999", "captions": "many.txt"}, "51 prompts with 10,000 seeds in 2 arms are 1,020,000 pictures"),
        ({"width": 8192}, "A picture is 8192 x 96 pixels, expected at most"),
        ({"metrics": {"clip": "nowhere"}}, 'metrics clip is "nowhere", expected the folder of the weights openai'),
        ({"metrics": {"fid": "nowhere"}}, r"images holds 0 of 2 photographs \(first missing two red circles\)"),
    ],
)
def test_what_cannot_be_meant_is_refused_before_anything_is_drawn(evaluate, changed, message):
    with pytest.raises(SoftREPAError, match=message):
        evaluate("refused", **changed)
    assert not list(evaluate.folder.glob("refused/*/*.png"))
