"""What `softrepa evaluate` reads, means, keeps and writes, apart from models."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch
from comfyui_softrepa.softrepa import __main__ as command_line
from comfyui_softrepa.softrepa.comparing.records import Arm, record, write_picture
from comfyui_softrepa.softrepa.data.sources import WholeFile
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.evaluation import measuring, ranks, report
from comfyui_softrepa.softrepa.evaluation.captions import (
    check_photographs,
    paired_edits,
    read_captions,
    read_edits,
)
from comfyui_softrepa.softrepa.evaluation.inputs import arms_of, edit_arms_of, inputs_of
from comfyui_softrepa.softrepa.evaluation.measuring import Drawn, Measured, measure
from comfyui_softrepa.softrepa.evaluation.metrics import METRICS, JudgeOptions
from comfyui_softrepa.softrepa.evaluation.pictures import Judge
from comfyui_softrepa.softrepa.evaluation.presets import TABLE_4, TABLE_5, TABLE_7, published
from comfyui_softrepa.softrepa.evaluation.ranks import Rank, wait_for_others
from softrepa_tests.conftest import ROOT
from softrepa_tests.judges import photograph

COCO = {
    "images": [{"id": 7, "file_name": "b.png"}, {"id": 3, "file_name": "a.png"}],
    "annotations": [
        {"image_id": 3, "caption": "A cat."},
        {"image_id": 7, "caption": "A dog."},
        {"image_id": 3, "caption": "Another cat."},
        {"image_id": 9, "caption": "Nobody."},
    ],
}


def texts(captions):
    return [caption.text for caption in captions]


class TestCaptions:
    def test_coco_gives_the_first_caption_of_every_photograph(self, tmp_path):
        path = tmp_path / "captions_val2017.json"
        path.write_text(json.dumps(COCO))
        for name in "ab":
            photograph(tmp_path / "val2017" / f"{name}.png", 0)
        captions, left_out = read_captions(path, tmp_path / "val2017")
        assert texts(captions) == ["A cat.", "A dog."]
        assert [caption.photograph.path.name for caption in captions] == ["a.png", "b.png"]
        assert left_out == "left out 1 (no image, or several, of this annotation's image_id: annotation 4)"
        check_photographs(captions, ["fid"])

    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("prompts.txt", "A cat.\n\nA dog.\n"),
            ("some.csv", "file_name,text\na.png,A cat.\nb.png,A dog.\n"),
            ("some.tsv", "image\tcaption\nx/a.png\tA cat.\nx/b.png\tA dog.\n"),
            ("some.jsonl", '{"file_name": "a.png", "text": "A cat."}\n{"file_name": "b.png", "text": "A dog."}\n'),
            ("some.json", '[{"image": "a.png", "caption": ["A cat.", "x"]}, {"image": "b.png", "caption": "A dog."}]'),
            ("captions.txt", "image,caption\na.png,A cat.\na.png,x\nb.png,A dog.\n"),
        ],
    )
    def test_tables(self, tmp_path, name, content):
        (tmp_path / name).write_text(content)
        photograph(tmp_path / "a.png", 0)
        captions, left_out = read_captions(tmp_path / name, None)
        assert (texts(captions), left_out) == (["A cat.", "A dog."], "")
        names_files = name != "prompts.txt"
        assert [caption.photograph is not None for caption in captions] == [names_files, False]
        with pytest.raises(
            SoftREPAError, match=rf"images holds {names_files:d} of 2 photographs .* metrics fid, lpips"
        ):
            check_photographs(captions, ["fid", "lpips"])
        check_photographs(captions, [])

    def test_a_folder_gives_pictures_with_their_captions(self, tmp_path):
        for number, name in enumerate("ab"):
            photograph(tmp_path / f"{name}.png", number)
            (tmp_path / f"{name}.txt").write_text(f"The first of {name}\nanother")
        captions, _ = read_captions(tmp_path, None)
        assert texts(captions) == ["The first of a", "The first of b"]
        assert [caption.photograph.path.name for caption in captions] == ["a.png", "b.png"]

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("no.json", None, r'captions is ".*no.json", expected a file or a folder of captions'),
            ("some.xml", "x", "expected a .json, .jsonl, .csv, .tsv, .parquet or .txt file"),
            ("some.json", "{", "cannot be read \\(not JSON\\), expected a table of captions"),
            ("some.json", "[]", "has no caption \\(none there\\), expected one or more"),
            ("some.jsonl", '{"file_name": "a"}', "has no caption \\(left out 1 \\(no caption: a\\)\\)"),
        ],
    )
    def test_what_holds_no_captions_is_refused(self, tmp_path, name, content, message):
        if content is not None:
            (tmp_path / name).write_text(content)
        with pytest.raises(SoftREPAError, match=message):
            read_captions(tmp_path / name, None)


class TestEdits:
    def test_a_list_of_targets(self, tmp_path):
        photograph(tmp_path / "bear.jpg", 0)
        rows = [{"image": "bear.jpg", "source": "A bear.", "targets": ["A lion.", "A panda."]}]
        (tmp_path / "edits.json").write_text(json.dumps(rows))
        found = read_edits(tmp_path / "edits.json", None)
        assert [(edit.source, edit.target) for edit in found] == [("A bear.", "A lion."), ("A bear.", "A panda.")]
        assert found[0].photograph.path == tmp_path / "bear.jpg"

    def test_an_edit_counts_once(self, tmp_path):
        photograph(tmp_path / "bear.jpg", 0)
        rows = [{"image": "bear.jpg", "source": "A bear.", "targets": ["A lion.", "A lion. "]}]
        (tmp_path / "edits.json").write_text(json.dumps(rows))
        with pytest.raises(SoftREPAError, match="holds 2 edits of bear.jpg with one source and target"):
            read_edits(tmp_path / "edits.json", None)

    def test_pie_bench(self, tmp_path):
        photograph(tmp_path / "annotation_images" / "0_random_140" / "000000000000.jpg", 0)
        entry = {
            "image_path": "0_random_140/000000000000.jpg",
            "original_prompt": "a slanted [mountain] bicycle",
            "editing_prompt": "a slanted [rusty] mountain bicycle",
            "mask": [0, 262144],
        }
        (tmp_path / "mapping_file.json").write_text(json.dumps({"000000000000": entry}))
        (edit,) = read_edits(tmp_path / "mapping_file.json", None)
        assert (edit.source, edit.target) == ("a slanted mountain bicycle", "a slanted rusty mountain bicycle")

    def test_two_tables_of_captions(self, tmp_path):
        for name, animal in (("before", "cat"), ("after", "dog")):
            (tmp_path / f"{name}.csv").write_text(f"file_name,text\n0801.png,A {animal}.\n")
        before, after = tmp_path / "before.csv", tmp_path / "after.csv"
        with pytest.raises(SoftREPAError, match='images holds no "0801.png", expected all 1 of source_prompts'):
            paired_edits(before, after, None)
        photograph(tmp_path / "0801.png", 0)
        after.write_text("file_name,text\n0801.png,A dog.\n0802.png,\n")
        (edit,), notes = paired_edits(before, after, None)
        assert [note.partition(" (")[0] for note in notes] == ["target_prompts: left out 1"]
        assert (edit.source, edit.target, edit.name) == ("A cat.", "A dog.", "0801.png")
        after.write_text("file_name,text\n0802.png,A dog.\n")
        with pytest.raises(SoftREPAError, match=r"differ in 2 images \(first 0801.png\), expected the same"):
            paired_edits(before, after, None)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ([], "holds no edits"),
            (3, "holds no edits"),
            ([{"image": "a.png", "source": "x"}], "entry 1 lacks an image, a source or a target"),
            ([{"image": "a.png", "source": "x", "targets": [4]}], "entry 1 lacks an image, a source or a target"),
            ({"0": {"image_path": "a.png"}}, "entry 0 lacks an image, a source or a target"),
            ([{"image": "a.png", "source": "x", "targets": ["y"]}], 'entry 1: no image "a.png" in'),
        ],
    )
    def test_what_is_no_edit_is_refused(self, tmp_path, content, message):
        (tmp_path / "edits.json").write_text(json.dumps(content))
        with pytest.raises(SoftREPAError, match=message):
            read_edits(tmp_path / "edits.json", None)


CAPTIONS = {"checkpoint": "sd3", "captions": "x.txt"}
EDITS = {"checkpoint": "sd3", "edits": "x.json"}


class TestInputs:
    def test_arms(self):
        assert arms_of(inputs_of(CAPTIONS, False)) == {"plain": ("", 0.0)}
        found = arms_of(inputs_of(CAPTIONS | {"tokens": "a", "strengths": "1, 0, 0.5"}, False))
        assert list(found.items()) == [("plain", ("", 0.0)), ("tokens", ("a", 1.0)), ("tokens 0.5", ("a", 0.5))]
        found = arms_of(inputs_of(CAPTIONS | {"tokens": {"mine": "a", "theirs": "b"}, "strengths": "1"}, False))
        assert found == {"mine": ("a", 1.0), "theirs": ("b", 1.0)}

    def test_no_two_arms_have_one_name(self):
        near = inputs_of(CAPTIONS | {"tokens": "a", "strengths": "0.1234567, 0.1234568"}, False)
        assert [strength for _, strength in arms_of(near).values()] == [0.1234567, 0.1234568]
        edits = EDITS | {"n_max": "2", "target_cfg": "13.000001, 13.0000014"}
        assert len({arm.name for arm in edit_arms_of(inputs_of(edits, True))}) == 2
        for tokens, arm in (({"plain": "a"}, "plain"), ({"x": "a", "x 0.5": "b"}, "x 0.5")):
            with pytest.raises(SoftREPAError, match=f'call two arms "{arm}", expected another name'):
                inputs_of(CAPTIONS | {"tokens": tokens, "strengths": "0.5, 1"}, False)

    def test_the_papers_edits_are_the_rows_of_its_table(self):
        inputs = inputs_of(EDITS | {"preset": "paper", "tokens": "a"}, True)
        arms = edit_arms_of(inputs)
        assert [arm.name for arm in arms] == list(TABLE_5)
        assert {(bool(arm.tokens), arm.n_max, arm.target_cfg) for arm in arms} == {
            *((False, 33, cfg) for cfg in (13.5, 16.5, 19.5)),
            *((True, 30, cfg) for cfg in (10, 12, 14)),
        }
        assert (inputs.steps, inputs.source_cfg, inputs.width) == (50, 3.5, 1024)

    def test_what_a_config_says_goes_before_its_preset(self):
        inputs = inputs_of(CAPTIONS | {"preset": "paper", "family": "sdxl", "steps": 4}, False)
        assert (inputs.steps, inputs.cfg, inputs.width, inputs.zero_negative) == (4, 7.0, 1024, True)
        inputs = inputs_of(CAPTIONS | {"preset": "ablation", "tokens": {"8x2": "a"}}, False)
        assert (inputs.steps, inputs.cfg, inputs.tokenizer_options) == (28, 4.0, {"t5xxl_min_length": 512})

    @pytest.mark.parametrize(
        ("config", "edits", "message"),
        [
            ({}, False, "CONFIG lacks checkpoint"),
            ({"checkpoint": "x"}, False, "CONFIG lacks captions"),
            ({"checkpoint": "x"}, True, "CONFIG lacks edits, expected a table of edits, or source_prompts and target_"),
            (EDITS, False, "CONFIG has edits, expected it only with --edits"),
            (CAPTIONS, True, "CONFIG has captions, expected it only without --edits"),
            (CAPTIONS | {"stepps": 1}, False, "CONFIG has stepps, expected only inputs of evaluate"),
            (CAPTIONS | {"steps": "1"}, False, "CONFIG: steps is '1', expected a value of type int"),
            (CAPTIONS | {"steps": 0}, False, "steps is 0, expected more than 0"),
            (CAPTIONS | {"width": 100}, False, "width is 100, expected 16 to 16384, a multiple of 8"),
            (CAPTIONS | {"cfg": math.nan}, False, "cfg is nan, expected a number"),
            (CAPTIONS | {"metrics": {"clap": "x"}}, False, "metrics has clap, expected only imagereward, pickscore"),
            (CAPTIONS | {"metrics": {"clip": 3}}, False, "metrics has 'clip': 3, expected two texts"),
            (CAPTIONS | {"metrics": {"structure": "x"}}, False, "metrics has structure, expected it only with --edits"),
            (CAPTIONS | {"preset": "papers"}, False, 'preset is "papers", expected paper or ablation'),
            (CAPTIONS | {"preset": "paper"}, False, 'family is "", expected one of sd15, sdxl, sd3'),
            (CAPTIONS | {"preset": "ablation", "tokens": "a"}, False, 'tokens has "tokens", expected names of table 7'),
            (EDITS | {"preset": "ablation"}, True, "preset is ablation, expected paper for edits"),
            (CAPTIONS | {"strengths": "-1"}, False, 'strengths has "-1"'),
            (CAPTIONS | {"seeds": "x"}, False, 'seeds has "x"'),
            (CAPTIONS | {"lpips_net": "vgg16"}, False, 'lpips_net is "vgg16", expected one of alex, squeeze, vgg'),
        ],
    )
    def test_what_cannot_be_meant_is_refused(self, config, edits, message):
        with pytest.raises(SoftREPAError, match=message):
            inputs_of(config, edits)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"n_max": "0"}, "n_max is 0.0, expected a whole number from 1 to steps, 28"),
            ({"n_max": "29"}, "n_max is 29.0, expected a whole number"),
            ({"n_max": "1.5"}, "n_max is 1.5, expected a whole number"),
            ({"n_max": "1"} | {"target_cfg": "1, x"}, 'target_cfg is "1, x", expected different numbers'),
            ({"n_max": "1"} | {"target_cfg": "1, 1"}, 'target_cfg is "1, 1", expected different numbers'),
            ({"n_max": "1", "tokens": "a", "tokens_n_max": "-2"}, 'tokens_n_max is "-2", expected different numbers'),
        ],
    )
    def test_edits_that_cannot_be_run_are_refused(self, changed, message):
        with pytest.raises(SoftREPAError, match=message):
            edit_arms_of(inputs_of(EDITS | changed, True))


class TestPresets:
    PAGE = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")

    def rows(self, start: str) -> list[list[str]]:
        found = re.findall(rf"^\| {start}.*\|$", self.PAGE, re.MULTILINE)
        return [[cell.strip() for cell in row.strip("|").split("|")] for row in found]

    def test_figures_of_table_4_are_those_of_the_page(self):
        for family, name in (("sd15", "SD1.5"), ("sdxl", "SDXL"), ("sd3", "SD3 ")):
            (row,) = self.rows(name)
            for number, arm in enumerate(("plain", "tokens")):
                said = [float(cell.split(" -> ")[number]) for cell in row[2:]]
                assert said == list(TABLE_4[family][arm].values())

    def test_figures_of_table_5_are_those_of_the_page(self):
        rows = [*self.rows("FlowEdit \\|")[:3], *self.rows("with tokens \\|")[:3]]
        for row, (name, figures) in zip(rows, TABLE_5.items(), strict=True):
            shift = row[0] == "with tokens"  # the script's CFG is one less
            assert name.endswith(f", n_max {row[1]}, cfg {float(row[2]) + shift:g}")
            assert [float(cell) for cell in row[3:]] == list(figures.values())

    def test_figures_of_table_7_are_those_of_the_page(self):
        (names,), (rewards,) = self.rows("tokens x layers"), self.rows("ImageReward \\| \\.993")
        assert dict(zip(names[1:], map(float, rewards[1:]), strict=True)) == {
            name: figures["imagereward"] for name, figures in TABLE_7.items()
        }

    @pytest.mark.parametrize(
        ("config", "edits", "figures"),
        [
            (CAPTIONS | {"preset": "paper", "family": "sd15"}, False, TABLE_4["sd15"]),
            (CAPTIONS | {"preset": "ablation", "tokens": {"8x2": "a"}}, False, TABLE_7),
            (EDITS | {"preset": "paper", "strengths": "0, 0.5, 1", "count": 9}, True, TABLE_5),
        ],
    )
    def test_figures_stand_beside_the_papers_settings_alone(self, config, edits, figures):
        def of(config):
            inputs = inputs_of(config, edits)
            return published(inputs.preset, inputs.family, edits, asdict(inputs))

        assert of(config) == figures
        assert of(config | {"preset": ""}) == of(config | {"steps": 40}) == {}
        if edits:  # those of table 6, on other pictures
            assert of(config | {"target_cfg": "13.5", "tokens_target_cfg": "8"}) == {}


ARMS = [Arm("plain"), Arm("tokens", {"strength": 1})]


@pytest.fixture
def drawn(tmp_path):
    """Three prompts, two seeds, two arms, as grey as their number."""
    records = [
        record(arm, number, f"prompt {number}", seed) for number in range(3) for seed in range(2) for arm in ARMS
    ]
    for place, one in enumerate(records):
        write_picture(tmp_path, one, torch.full((8, 8, 3), place / 12).numpy())
    return Drawn(tmp_path, records, dict.fromkeys(range(3)))


class Grey(Judge):
    """Scores a picture by how light it is."""

    def __init__(self):
        self.judged = []

    def __call__(self, pictures):
        self.judged += [picture.path.name for picture in pictures]
        return [sum(picture.image().getpixel((0, 0))) / 765 for picture in pictures]

    def notes(self, prompts):
        return [f"{len(set(prompts))} prompts"]


class TestMeasuring:
    def measured(self, drawn, monkeypatch, judge, name="clip", weights=None):
        monkeypatch.setattr(measuring, "judge_of", lambda *_: judge)
        return measure(drawn, METRICS[name], weights or drawn.folder, JudgeOptions(), lambda text: None)

    def weights(self, tmp_path, name="weights"):
        path = tmp_path.with_name(f"{tmp_path.name}-{name}")
        path.write_text(name)
        return path

    def test_nothing_is_judged_twice_and_notes_stay(self, drawn, monkeypatch, tmp_path):
        weights, judge = self.weights(tmp_path), Grey()
        first = self.measured(drawn, monkeypatch, judge, weights=weights)
        assert len(judge.judged) == len(drawn.records)
        assert first.scores[drawn.records[3].file] == pytest.approx(64 / 255)
        assert first.notes == ("3 prompts",)
        again = self.measured(drawn, monkeypatch, None, weights=weights)
        assert (again.scores, again.notes) == (first.scores, first.notes)

    def test_scores_are_kept_while_it_goes_on(self, drawn, monkeypatch, tmp_path):
        weights, judge = self.weights(tmp_path), Grey()
        monkeypatch.setattr(measuring, "SAVED", 4)

        def dying(pictures):
            if len(judge.judged) == 6:
                (path,) = (drawn.folder / "scores").glob("*.csv")
                assert len(measuring.read_scores(path)) == 4  # all that is left where it is killed
                raise KeyboardInterrupt
            return judge(pictures)

        dying.notes, dying.batch = judge.notes, 2
        with pytest.raises(KeyboardInterrupt):
            self.measured(drawn, monkeypatch, dying, weights=weights)
        rest = Grey()
        found = self.measured(drawn, monkeypatch, rest, weights=weights)
        assert len(rest.judged) == 6
        assert found.scores == self.measured(drawn, monkeypatch, Grey(), weights=self.weights(tmp_path, "b")).scores

    @pytest.mark.parametrize("wrong", [math.nan, math.inf])
    def test_scores_that_are_no_numbers_are_refused_and_not_kept(self, drawn, monkeypatch, tmp_path, wrong):
        weights, judge = self.weights(tmp_path), Grey()

        def broken(pictures):
            return [wrong if judge.judged else score for score in judge(pictures)]

        broken.notes, broken.batch = judge.notes, 2
        with pytest.raises(SoftREPAError, match=f"metrics clip holds {wrong}, expected finite numbers"):
            self.measured(drawn, monkeypatch, broken, weights=weights)
        assert len(self.measured(drawn, monkeypatch, Grey(), weights=weights).scores) == len(drawn.records)

    def test_a_distance_that_is_no_number_is_refused_and_not_kept(self, drawn, monkeypatch, tmp_path):
        class Distance:
            value = math.nan

            def photographs(self, images):
                pass

            def distance(self, images):
                return self.value

        judge, weights = Distance(), self.weights(tmp_path)
        with pytest.raises(SoftREPAError, match="metrics fid holds nan, expected finite numbers"):
            self.measured(drawn, monkeypatch, judge, "fid", weights)
        judge.value = 1.0
        assert self.measured(drawn, monkeypatch, judge, "fid", weights).of_arms == {"plain": 1.0, "tokens": 1.0}

    def test_notes_that_cannot_be_written_are_a_refusal(self, drawn, monkeypatch, tmp_path):
        weights = self.weights(tmp_path)
        measuring.Measuring(drawn, METRICS["clip"], weights, JudgeOptions(), print).notes.mkdir(parents=True)
        with pytest.raises(SoftREPAError, match="could not be written"):
            self.measured(drawn, monkeypatch, Grey(), weights=weights)

    def test_other_weights_judge_anew(self, drawn, monkeypatch, tmp_path):
        self.measured(drawn, monkeypatch, Grey(), weights=self.weights(tmp_path))
        judge = Grey()
        self.measured(drawn, monkeypatch, judge, weights=self.weights(tmp_path, "longer"))
        assert len(judge.judged) == len(drawn.records)

    def test_all_pictures_of_an_arm_are_judged_together(self, drawn, monkeypatch, tmp_path):
        class Together:
            seen = ()

            def photographs(self, images):
                self.seen = [image.size for image in images]

            def distance(self, images):
                return float(sum(image.getpixel((0, 0))[0] for image in images))

        real = {number: WholeFile(photograph(tmp_path / f"p{number}.png", number, (30, 20))) for number in range(3)}
        judge, weights = Together(), self.weights(tmp_path)
        drawn = Drawn(drawn.folder, drawn.records, real)
        found = self.measured(drawn, monkeypatch, judge, "fid", weights)
        assert judge.seen == [(8, 8)] * 3
        greys = [round(255 * place / 12) for place in range(12)]
        assert found.of_arms == {"plain": sum(greys[::2]), "tokens": sum(greys[1::2])}
        assert found.notes == ("of 6 pictures; of fewer than 2,048 its value depends on their number",)
        assert self.measured(drawn, monkeypatch, None, "fid", weights) == found


class TestReport:
    def report(self, drawn, published=None, notes=()):
        scores = {one.file: one.prompt + (one.arm == "tokens") * (0.1 + 0.1 * one.prompt) for one in drawn.records}
        measured = [
            Measured(METRICS["clip"], scores, notes=("a note",)),
            Measured(METRICS["fid"], of_arms={"plain": 24.5, "tokens": 25.125}),
        ]
        return report.Report(inputs_of(CAPTIONS, False), drawn.records, measured, published or {}, notes)

    def test_differences_are_paired_and_of_prompts(self, drawn):
        found = self.report(drawn).as_json()
        assert (found["prompts"], found["pictures"], found["arms"]) == (3, 12, ["plain", "tokens"])
        tokens = found["metrics"]["clip"]["arms"]["tokens"]
        assert tokens["value"] == pytest.approx(1.2)
        assert tokens["difference"] == pytest.approx(0.2)
        half = 4.302653 * 0.1 / math.sqrt(3)
        assert (tokens["low"], tokens["high"]) == pytest.approx((0.2 - half, 0.2 + half))
        assert "difference" not in found["metrics"]["clip"]["arms"]["plain"]
        assert found["metrics"]["fid"]["arms"] == {"plain": {"value": 24.5}, "tokens": {"value": 25.125}}

    def test_the_table_for_reading(self, drawn, tmp_path):
        found = self.report(drawn, TABLE_4["sd3"], ["left out 1"])
        found.write(tmp_path)
        text = (tmp_path / "results.md").read_text(encoding="utf-8")
        assert "3 prompts, 2 pictures of each in every arm" in text
        assert "| plain | 1.0000 / 0.263 | 24.500 / 31.595 |\n| tokens | 1.2000 / 0.269 | 25.125 / 36.214 |" in text
        assert "|  | CLIP ↑ | FID ↓ |" in text
        assert "- tokens: +0.2 (-0.0484 to +0.448): nothing can be said from 6 pairs" in text
        assert text.endswith("- left out 1\n- CLIP: a note\n")
        assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == found.as_json()

    def test_the_curve_joins_the_cfgs_of_a_model_and_an_n_max(self, drawn, monkeypatch):
        charts = []
        monkeypatch.setattr(report.charts, "draw", charts.extend)
        inputs = inputs_of(EDITS | {"tokens": "a", "n_max": "2", "target_cfg": "4, 2"}, True)
        arms = edit_arms_of(inputs)
        records = [record(Arm(arm.name), number, "x", number) for number in range(2) for arm in arms]
        scores = {one.file: place / 10 for place, one in enumerate(records)}
        measured = [Measured(METRICS["clip"], scores), Measured(METRICS["lpips"], scores)]
        report.curve(report.Report(inputs, records, measured, {}, ()), arms)
        plain, tokens = charts[0].lines
        assert (plain.name, tokens.name) == ("plain, n_max 2", "tokens, n_max 2")
        assert list(plain.xs) == pytest.approx([0.3, 0.2])  # cfg 2, then 4
        assert list(tokens.ys) == pytest.approx([0.5, 0.4])
        assert plain.band[0] == pytest.approx(12.7062 * 0.4 / math.sqrt(2) / math.sqrt(2), rel=1e-4)
        assert report.curve(report.Report(inputs, records, measured[:1], {}, ()), arms) is None


class TestRanks:
    def test_prompts_are_shared_without_rest(self):
        records = [record(arm, number, str(number), 0) for number in range(7) for arm in ARMS]
        shares = [Rank(number, 3).share(records) for number in range(3)]
        assert sorted((one.prompt, one.arm) for share in shares for one in share) == [
            (one.prompt, one.arm) for one in records
        ]
        assert [len(share) for share in shares] == [4, 4, 6]
        assert Rank().share(records) == records

    def test_as_torchrun_says(self, monkeypatch):
        for name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name, raising=False)
        assert Rank.of_environment() == Rank(0, 1)
        for name, value in (("RANK", "5"), ("WORLD_SIZE", "8")):
            monkeypatch.setenv(name, value)
        found = Rank.of_environment()
        assert (found, found.is_first) == (Rank(5, 8), False)
        monkeypatch.setenv("RANK", "8")
        with pytest.raises(SoftREPAError, match="RANK is '8' of WORLD_SIZE '8', expected numbers as torchrun sets"):
            Rank.of_environment()

    def test_each_has_a_device_and_waits_for_no_other(self, monkeypatch, tmp_path, capsys):
        given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setattr(command_line.startup, "comfyui_folder", lambda given: tmp_path)

        def start(comfyui, options):
            named = options[options.index("--cuda-device") + 1] if "--cuda-device" in options else None
            raise SoftREPAError(f"on device {command_line.startup.device_of_process(named)}")

        monkeypatch.setattr(command_line.startup, "start", start)
        (tmp_path / "config.json").write_text(json.dumps(CAPTIONS))
        monkeypatch.setattr("sys.argv", ["softrepa", "evaluate", str(tmp_path / "config.json")])
        assert command_line.main() == 1
        assert capsys.readouterr().err.endswith("error: on device 1\n")

    def test_the_first_waits_until_all_is_there(self, drawn, monkeypatch):
        late = drawn.records[-1]
        pixels = (drawn.folder / late.file).read_bytes()
        (drawn.folder / late.file).unlink()
        told = []
        monkeypatch.setattr(ranks.time, "sleep", lambda _: (drawn.folder / late.file).write_bytes(pixels))
        wait_for_others(drawn.folder, drawn.records, told.append)
        assert told == ["waiting for 1 pictures of other processes"]
