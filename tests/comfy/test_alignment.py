"""The study of soft tokens behind ComfyUI: what is trained is kept, and acts where a row says."""

import shutil
from types import SimpleNamespace

import pytest
from comfy.ldm.modules.diffusionmodules import mmdit

from benchmarks import alignment, alignment_rows
from benchmarks.alignment_places import placed
from benchmarks.alignment_rows import Placing
from benchmarks.smallworld import padding, study
from benchmarks.smallworld.measure import StockModel
from softrepa.comfy import headless
from softrepa.comfy.tokens.call_state import KEY
from softrepa.comfy.tokens.patching import apply_tokens
from softrepa.data import dataset
from softrepa.smallworld.checkpoint import TOKENS
from softrepa.token_files import load


@pytest.fixture
def stock(tmp_path, monkeypatch):
    stock = StockModel(tmp_path)
    monkeypatch.setattr(alignment, "stock_model", lambda work: stock)
    return stock


def test_tokens_are_trained_once_and_act_where_the_row_says(stock, tmp_path, monkeypatch):
    trained = []

    def train(config):
        trained.append(config["filename_prefix"])
        return shutil.copyfile(TOKENS, tmp_path / "trained.safetensors")

    monkeypatch.setattr(headless, "train", train)
    monkeypatch.setattr(alignment, "PICTURES", 2)
    monkeypatch.setattr(alignment_rows, "TOKENS", tmp_path / "tokens")
    placing = Placing(2.0, "positive", 0.25, 0.5)
    job = placed("SoftREPA", 2.0, placing, "reported").jobs()[0]
    for _ in range(2):
        (acting,) = alignment.patched(tmp_path, job).get_attachment(KEY).sets
        found = (acting.strength, acting.apply_to, acting.start_percent, acting.end_percent)
        assert found == (placing.strength, placing.apply_to, placing.start_percent, placing.end_percent)
    assert trained == [job.trained_as]
    assert alignment_rows.tokens_path(job).read_bytes() == TOKENS.read_bytes()


@pytest.mark.parametrize(("row", "made"), [("hard negatives", []), (alignment_rows.OTHER_NUMBERS, ["four", "three"])])
def test_hard_negatives_are_wrong_by_what_a_row_says(row, made, stock, tmp_path, monkeypatch):
    found = []

    def train(config):
        example = SimpleNamespace(captions=["two circles"])
        found.extend(dataset.wrong_captions(example, *example.captions))
        return shutil.copyfile(TOKENS, tmp_path / "trained.safetensors")

    monkeypatch.setattr(headless, "train", train)
    monkeypatch.setattr(alignment, "PICTURES", 2)
    monkeypatch.setattr(alignment_rows, "TOKENS", tmp_path / "tokens")
    alignment.trained_tokens(tmp_path, alignment_rows.ROWS[row].jobs()[0])
    assert sorted(found) == [f"{number} circles" for number in made]


@pytest.mark.parametrize("strength", [None, 1.0, 2.0])
def test_padding_given_once_draws_the_same(stock, strength, monkeypatch):
    test = study.Test(stock, {"counting": 1, "position": 2}, 1)
    model = stock.model if strength is None else apply_tokens(stock.model, load(TOKENS), strength=strength)
    whole, lengths = test.pictures(model, 2.0), []
    embed = stock.model.model.diffusion_model.context_embedder
    for name in ("forward", "optimized_attention"):  # taken back behind the test
        owner = mmdit.MMDiT if name == "forward" else mmdit
        monkeypatch.setattr(owner, name, getattr(owner, name))
    padding.give_once()
    with_hook = embed.register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    short = test.pictures(model, 2.0)
    with_hook.remove()
    assert set(lengths) == {19}
    assert abs(short - whole).max() < 2e-3


def test_what_a_picture_is_measured_by(stock):
    """Other noise draws other pictures; prompts keep theirs however often they are drawn."""
    prompts = {"counting": 2, "colours": 1}
    one, other = (study.Test(stock, prompts, 1, spec_of=study.reported_spec, noise=noise, batch=3) for noise in (7, 8))
    assert one.prompts == other.prompts
    first, again, another = (test.pictures(stock.model, 1.0) for test in (one, one, other))
    assert (first == again).all()
    assert (first != another).any()
    found = one.facts(first)
    assert [len(found.margin), len(found.surplus)] == [3, 2]
    assert [bool(value) for value in found.right["counting"]] == [not number for number in found.surplus]
