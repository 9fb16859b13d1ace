"""Compare Tokens on the real sampler: what it draws, that it goes on where it was, and what the table says."""

import csv
import io
import math
import weakref
from types import SimpleNamespace

import comfy.model_management
import numpy as np
import pytest
import torch
from comfy_execution.graph import DynamicPrompt
from comfyui_softrepa.nodes.compare import CompareScores, CompareTokens
from comfyui_softrepa.nodes.schema import show_on_node, whole_graph
from comfyui_softrepa.softrepa.comfy.comparing import drawing
from comfyui_softrepa.softrepa.comfy.comparing import run as running
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.comparing import judging, records
from comfyui_softrepa.softrepa.errors import SoftREPAError
from server import PromptServer
from softrepa_tests.comparing import PROMPTS, SMALL, Brightness, Checker, small_world

import nodes
from benchmarks.smallworld import study
from benchmarks.smallworld.measure import StockModel
from softrepa.smallworld.world import plain_caption

OUTPUTS = ("grid", "images", "table", "difference", "csv", "list", "texts", "comparison")


@pytest.fixture(scope="module")
def world(comfy_folders):
    return dict(zip(("model", "clip", "vae", "tokens"), small_world(), strict=True))


@pytest.fixture
def compared(world, comfy_folders):
    """Runs the node in a folder of its own."""
    import shutil

    def run(**inputs):
        given = world | {"prompts": PROMPTS} | SMALL | inputs
        return dict(zip(OUTPUTS, CompareTokens.execute(**given).args, strict=True))

    yield run
    shutil.rmtree(comfy_folders / "output" / running.FOLDER, ignore_errors=True)


@pytest.fixture
def drawn(monkeypatch):
    """Which arm and seed were drawn, in order."""
    found, draw = [], drawing.Painter.draw

    def counted(self, arm, positive, negative, seed, callback):
        found.append((arm, seed))
        return draw(self, arm, positive, negative, seed, callback)

    monkeypatch.setattr(drawing.Painter, "draw", counted)
    return found


def by_ksampler(world, model, prompt, seed):
    """What a person wires by hand."""
    latent = nodes.EmptyLatentImage().generate(96, 96)[0]
    encode = nodes.CLIPTextEncode().encode
    positive, negative = (encode(world["clip"], text)[0] for text in (prompt, ""))
    out = nodes.KSampler().sample(model, seed, 2, 2.0, "euler", "simple", positive, negative, latent)[0]
    return nodes.VAEDecode().decode(world["vae"], out)[0]


def test_pictures_are_ksamplers(world, compared):
    images = compared()["images"]
    assert images.shape == (8, 96, 96, 3)
    models = [world["model"], apply_tokens(world["model"], world["tokens"])]
    expected = [
        by_ksampler(world, model, prompt, seed)
        for prompt in PROMPTS.splitlines()
        for seed in (0, 1)
        for model in models
    ]
    assert (images - torch.cat(expected).clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-5


def test_what_it_gives(compared, comfy_folders):
    found = compared(judge=(Brightness(),))
    assert [tuple(one.shape) for one in found["list"]] == [(1, 96, 96, 3)] * 8
    assert torch.equal(torch.cat(found["list"]), found["images"])
    assert found["texts"] == [text for text in PROMPTS.splitlines() for _ in range(4)]
    brightness = found["images"].mean((1, 2, 3)).double()
    expected = (brightness[1::2] - brightness[::2]).mean().item()
    assert found["difference"] == pytest.approx(expected, abs=1e-6)
    assert found["table"].startswith("brightness (mean of all pixels)\nstrength 0: ")
    (plain, other) = csv.DictReader(io.StringIO(found["csv"]))
    assert (plain["arm"], other["arm"], plain["difference"]) == ("strength 0", "strength 1", "")
    assert float(other["difference"]) == pytest.approx(expected, abs=1e-6)
    folder = comfy_folders / "output" / running.FOLDER / "compare"
    assert f"8 pictures in {folder}" in found["table"]
    rows = list(csv.DictReader((folder / "scores.csv").open(encoding="utf-8")))
    assert [float(row["brightness"]) for row in rows] == pytest.approx(brightness.tolist(), abs=1e-6)
    assert all((folder / row["file"]).is_file() for row in rows)
    assert (folder / "summary.txt").read_text(encoding="utf-8") in found["table"] + "\n"
    assert found["grid"].shape[0] == 1
    assert {path.name for path in folder.glob("*.*")} >= {"grid.png", "pictures.csv", "scores.csv", "summary.csv"}


def test_the_checkers_numbers_are_the_studys(world, compared, monkeypatch, tmp_path):
    """The study draws prompt i with seed i: those pictures of a comparison get the same verdicts, in both arms."""
    monkeypatch.setattr(study, "BATCH", 1)
    monkeypatch.setitem(study.SAMPLING, "steps", 8)
    test = study.Test(StockModel(tmp_path), {"two_objects": 1, "colours": 1, "counting": 1}, seed=3)
    specs = {plain_caption(spec): spec for _, spec in test.prompts}
    texts, number = list(specs), len(test.prompts)
    assert len(texts) == number
    judge = Checker(specs)
    sampling = {key: study.SAMPLING[key] for key in ("sampler_name", "scheduler", "cfg", "steps")}
    found = compared(prompts="\n".join(texts), seeds=f"0-{number - 1}", judge=(judge,), shown=1000, **sampling)
    scores = {(one.arm, one.prompt, one.seed): score for one, score in zip(*scored(found, judge), strict=True)}
    arms = {"strength 0": world["model"], "strength 1": apply_tokens(world["model"], world["tokens"])}
    verdicts = []
    for arm, model in arms.items():
        right = [value for category in test.measure(model, 0.07, sampling["cfg"]).right.values() for value in category]
        assert [scores[arm, index, index] for index in range(number)] == right
        verdicts += right
    assert 0 < sum(verdicts) < len(verdicts)


def scored(found, judge):
    """Records and a judge's scores of what was shown."""
    shown = found["comparison"].shown
    return shown, [judge.score(one, picture) for one, picture in zip(shown, found["list"], strict=True)]


def test_without_a_judge_nothing_is_said(compared):
    found = compared()
    assert "No judge is connected" in found["table"]
    assert math.isnan(found["difference"])


def test_what_is_drawn_is_not_drawn_again(compared, drawn):
    first = compared()
    assert len(drawn) == 8
    again = compared()
    assert len(drawn) == 8
    assert torch.equal(first["images"], again["images"])
    compared(seeds="0, 1, 2")
    assert drawn[8:] == [("strength 0", 2), ("strength 1", 2)] * 2
    compared(prompts=f"a green cross\n{PROMPTS}")
    assert len(drawn) == 12 + 4
    compared(strengths="0, 0.5, 1")
    assert drawn[16:] == [("strength 0.5", seed) for seed in (0, 1)] * 2


@pytest.mark.parametrize(
    "other",
    [
        {"steps": 3},
        {"cfg": 3.0},
        {"sampler_name": "euler_ancestral"},
        {"scheduler": "normal"},
        {"width": 64},
        {"negative_prompt": "a red circle"},
    ],
    ids=str,
)
def test_other_settings_are_other_pictures(compared, drawn, other):
    compared(prompts="a red circle", seeds="0")
    compared(prompts="a red circle", seeds="0", **other)
    assert len(drawn) == 4


def test_another_model_is_another_picture(world, compared, drawn):
    compared(prompts="a red circle", seeds="0")
    lora = world["model"].clone()
    name = next(key for key in lora.model_state_dict() if key.endswith("joint_blocks.0.x_block.attn.qkv.weight"))
    lora.add_patches({name: (torch.full(tuple(lora.model_state_dict()[name].shape), 0.01),)})
    compared(prompts="a red circle", seeds="0", model=lora)
    assert len(drawn) == 4


def test_stopped_and_gone_on_with_it_gives_the_same(compared, drawn, monkeypatch, comfy_folders):
    whole = compared(judge=(Brightness(),))
    draw = drawing.Painter.draw

    def interrupted(*args):
        if len(drawn) == 8 + 3:
            raise comfy.model_management.InterruptProcessingException
        return draw(*args)

    monkeypatch.setattr(drawing.Painter, "draw", interrupted)
    other = {"filename_prefix": "again"}
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        compared(judge=(Brightness(),), **other)
    folder = comfy_folders / "output" / running.FOLDER / "again"
    assert len(list(folder.glob("*/*.png"))) == 3
    monkeypatch.setattr(drawing.Painter, "draw", draw)
    judge = Brightness(stop_after=5)
    with pytest.raises(KeyboardInterrupt):
        compared(judge=(judge,), **other)
    assert len(drawn) == 16
    rest = Brightness()
    found = compared(judge=(rest,), **other)
    assert len(drawn) == 16
    assert (len(judge.asked), len(rest.asked)) == (5, 3)
    assert found["csv"] == whole["csv"]
    assert torch.equal(found["images"], whole["images"])
    assert torch.equal(found["grid"], whole["grid"])


def test_the_time_left_is_told(compared, monkeypatch):
    told = []
    monkeypatch.setattr("comfyui_softrepa.nodes.compare.show_on_node", lambda node, text: told.append(text))
    compared(judge=(Brightness(),), seeds="0")
    assert told[0].startswith("1 of 4 pictures drawn, 0:")
    assert told[3] == "4 of 4 pictures drawn, 0:00:00 left"
    assert told[4:-1] == [f"brightness: {done} of 4 pictures judged" for done in range(4)]
    assert told[-1].startswith("brightness (mean of all pixels)")


def test_a_second_model_and_second_tokens_are_arms(world, compared):
    second = apply_tokens(world["model"], world["tokens"], 0.5)
    found = compared(
        second_model=second, second_tokens=world["tokens"], judge=(Brightness(),), seeds="0", prompts="a red circle"
    )
    lines = [row["arm"] for row in csv.DictReader(io.StringIO(found["csv"]))]
    assert lines == ["strength 0", "strength 1", "second tokens, strength 1", "second model"]
    assert torch.equal(found["images"][1], found["images"][2])
    assert not torch.equal(found["images"][3], found["images"][1])
    halved = compared(strengths="0, 0.5", prompts="a red circle", seeds="0")["images"]
    assert torch.equal(found["images"][3], halved[1])


def test_networks_take_turns_once(world, compared, drawn):
    """A second model with weights of its own comes into memory once for many prompts."""
    other = small_world()[0]
    compared(second_model=other)
    arms = [arm for arm, _ in drawn]
    assert arms == ["strength 0", "strength 1"] * 4 + ["second model"] * 4


def test_shown_bounds_what_is_held(compared):
    found = compared(shown=5, judge=(Brightness(),))
    assert len(found["images"]) == len(found["list"]) == 4  # two of each arm: never a part of a pair
    assert "8 pictures in" in found["table"]
    assert len(compared(shown=1)["images"]) == 2


def test_memory_does_not_grow_with_pictures(compared, monkeypatch):
    """Of all that are drawn and judged no more are alive at a time than one and those being shown."""
    alive, most, read = [0], [], records.read_picture

    class Pixels(np.ndarray):
        """An array that can be watched."""

    def gone():
        alive[0] -= 1

    def tracked(pixels):
        pixels = np.array(pixels).view(Pixels)
        weakref.finalize(pixels, gone)
        alive[0] += 1
        most.append(alive[0])
        return pixels

    blank = np.zeros((96, 96, 3), dtype=np.float32)
    monkeypatch.setattr(drawing.Painter, "draw", lambda *args: tracked(blank))
    for module in (running, judging):
        monkeypatch.setattr(module, "read_picture", lambda *args: tracked(read(*args)))
    compared(seeds="0-19", shown=4, judge=(Brightness(),), prompts="a\nb")
    assert len(most) > 160
    assert max(most) <= 4 + 2


def test_a_graph_is_known_by_what_feeds_it():
    graph = {
        "1": {"class_type": "Load", "inputs": {"name": "a"}},
        "2": {"class_type": "Shift", "inputs": {"model": ["1", 0], "shift": 3.0}},
        "3": {"class_type": "SoftREPACompare", "inputs": {"model": ["2", 0], "clip": ["1", 1], "steps": 3}},
    }

    def of(name, changed=None):
        nodes = {key: dict(value, inputs=dict(value["inputs"])) for key, value in graph.items()}
        if changed:
            nodes[changed[0]]["inputs"][changed[1]] = changed[2]
        return running.graph_of(nodes, "3", ("model", "clip", "vae")).get(name)

    assert of("model") == of("model", ("3", "steps", 4))
    assert of("model") != of("model", ("2", "shift", 4.0))
    assert of("clip") == of("clip", ("2", "shift", 4.0))
    assert of("clip") != of("clip", ("1", "name", "b"))
    assert of("vae") is None
    assert running.graph_of(None, None, ("model",)) == running.graph_of(graph, "9", ("model",)) == {}


def test_a_graph_that_a_loop_makes_is_known_round_by_round():
    """As ComfyUI's loops do: a node for each round, which takes what the round before it gives."""
    graph = DynamicPrompt({"load": {"class_type": "Load", "inputs": {}}, "9": {"class_type": "Loop", "inputs": {}}})
    rounds = 1500
    for index in range(rounds):
        before = f"9.{index - 1}_shift" if index else "load"
        made = {
            f"9.{index}_shift": {"class_type": "Shift", "inputs": {"model": [before, 0], "shift": index}},
            f"9.{index}_3": {"class_type": "SoftREPACompare", "inputs": {"model": [f"9.{index}_shift", 0]}},
        }
        for name, node in made.items():
            graph.add_ephemeral_node(name, node, "9", name.split("_")[1])
    node = SimpleNamespace(hidden=SimpleNamespace(dynprompt=graph, unique_id=f"9.{rounds - 1}_3"))
    nodes = whole_graph(node)
    found = [running.graph_of(nodes, f"9.{index}_3", ("model",))["model"] for index in (0, 1, rounds - 1)]
    assert len(set(found)) == 3
    assert found[2] == running.graph_of(nodes, f"9.{rounds - 1}_3", ("model",))["model"]


def test_a_node_of_a_loop_writes_below_the_one_on_the_canvas(monkeypatch):
    said = []
    server = SimpleNamespace(send_progress_text=lambda *args: said.append(args))
    monkeypatch.setattr(PromptServer, "instance", server, raising=False)
    graph = DynamicPrompt({"9": {"class_type": "Loop", "inputs": {}}})
    graph.add_ephemeral_node("9.0.0_3", {"class_type": "SoftREPACompare", "inputs": {}}, "9", "3")
    for hidden in (
        SimpleNamespace(unique_id="9.0.0_3", dynprompt=graph),
        SimpleNamespace(unique_id="9", dynprompt=graph),
        SimpleNamespace(unique_id="4", dynprompt=None),
        None,
    ):
        show_on_node(SimpleNamespace(hidden=hidden), "drawn")
    assert said == [("drawn", "3"), ("drawn", "9"), ("drawn", "4")]


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ({"prompts": " \n"}, "prompts holds no prompt"),
        ({"prompts": "a\nb\na "}, 'prompts says "a" twice'),
        ({"seeds": "one"}, 'seeds has "one"'),
        ({"strengths": "-1"}, 'strengths has "-1"'),
        ({"width": 60}, "width is 60, expected a multiple of 8"),
        ({"filename_prefix": "../out"}, "filename_prefix is"),
        ({"prompts_from": "gone.txt"}, "prompts_from is"),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_before_anything_is_drawn(compared, drawn, inputs, said):
    with pytest.raises(SoftREPAError, match=said):
        compared(**inputs)
    assert drawn == []


def test_a_model_with_tokens_is_no_baseline(world, compared):
    with pytest.raises(SoftREPAError, match="has soft tokens on it"):
        compared(model=apply_tokens(world["model"], world["tokens"]))


def test_a_second_model_of_another_family_is_refused(models, compared, drawn):
    with pytest.raises(SoftREPAError, match="second_model is SD1.5.*expected one that clip and vae fit"):
        compared(second_model=models["sd15"])
    assert drawn == []


def test_a_picture_that_is_no_numbers_is_named(compared, monkeypatch):
    monkeypatch.setattr(drawing.Painter, "draw", lambda *args: np.full((96, 96, 3), np.nan))
    with pytest.raises(SoftREPAError, match='strength 0 draws NaN or infinite values for "a red circle"'):
        compared()


def test_prompts_of_a_file(compared, comfy_folders):
    path = comfy_folders / "input" / "geneval.jsonl"
    path.write_text('{"prompt": "a red circle", "vqa_list": [["How many circles?", "one"]]}\n', encoding="utf-8")
    assert "geneval.jsonl" in next(one for one in CompareTokens.GET_SCHEMA().inputs if one.id == "prompts_from").options
    found = compared(prompts="", prompts_from="geneval.jsonl", seeds="0")
    assert found["texts"] == ["a red circle"] * 2
    with pytest.raises(SoftREPAError, match="expected one of them"):
        compared(prompts_from="geneval.jsonl")
    assert CompareTokens.validate_inputs(prompts_from="geneval.jsonl") is True
    before = CompareTokens.fingerprint_inputs(prompts_from="geneval.jsonl")
    path.unlink()
    assert before
    assert "expected a .txt or .jsonl" in CompareTokens.validate_inputs(prompts_from="geneval.jsonl")


def test_captions_of_a_dataset(compared):
    from softrepa_tests.learning import dataset

    data = dataset("sd3")
    expected = list(dict.fromkeys(example.captions[0] for example in data.train))
    found = compared(prompts="", dataset=data, seeds="0")
    assert list(dict.fromkeys(found["texts"])) == expected


def test_scores_of_any_node(compared):
    comparison = compared(judge=(Brightness(),))
    brightness = comparison["images"].mean((1, 2, 3)).tolist()
    text, mean, low, high, table = CompareScores.execute([comparison["comparison"]], brightness, ["light"], [True]).args
    assert mean == pytest.approx(comparison["difference"], abs=1e-6)
    assert low < mean < high
    assert text.startswith("light (less is better)\nstrength 0: ")
    assert len(table.splitlines()) == 3
    some = compared(shown=4)["comparison"]
    assert "of 4 of 8 pictures: raise shown" in CompareScores.execute([some], brightness[:4]).args[0]


@pytest.mark.parametrize(
    ("scores", "said"), [([1.0] * 7, "scores has 7 scores, expected 8"), ([math.nan] * 8, "scores holds nan")]
)
def test_scores_that_are_none(compared, scores, said):
    with pytest.raises(SoftREPAError, match=said):
        CompareScores.execute([compared()["comparison"]], scores)


def test_scores_are_of_one_comparison(compared):
    several = [compared()["comparison"]] * 2
    with pytest.raises(SoftREPAError, match="Comparison has 2 comparisons, expected one"):
        CompareScores.execute(several, [1.0] * 16)


def test_judges_of_one_name_are_told_apart(compared):
    class Darkness(Brightness):
        def key(self, compared):
            return "dark"

        def score(self, one, picture):
            return 1 - super().score(one, picture)

    found = compared(judge=(Brightness(), Darkness(), Brightness()))
    heads = [paragraph.splitlines() for paragraph in found["table"].split("\n\n")][:3]
    names = ["brightness", "brightness 2", "brightness 3"]
    assert [head[0].partition(" (")[0] for head in heads] == names
    assert [len(head) for head in heads] == [3, 3, 3]
    assert [row["judge"] for row in csv.DictReader(io.StringIO(found["csv"]))][::2] == names


def test_one_arm_has_no_difference(compared):
    alone = compared(strengths="1", seeds="0")["comparison"]
    with pytest.raises(SoftREPAError, match="1 arm, expected 2 or more"):
        CompareScores.execute([alone], [1.0, 2.0])
