"""Soft tokens that take the place of a text's padding, from files as anima_lora writes them."""

from contextlib import contextmanager
from dataclasses import replace
from itertools import count

import pytest
import torch
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from comfyui_softrepa.nodes import token_plot
from comfyui_softrepa.softrepa import token_files
from comfyui_softrepa.softrepa.comfy.tokens.call_state import KEY
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.comfy.training.start import TokenPlan
from comfyui_softrepa.softrepa.errors import SoftREPAError
from comfyui_softrepa.softrepa.training.identity import tokens_hash
from safetensors.torch import save_file
from softrepa_tests.sampling import prompt, relative_error, sample
from softrepa_tests.tiny_models import seeded
from softrepa_tests.token_sets import tokens_for

EXACT = 1e-5
FAMILY, ROWS = "anima", 24
LAYERS, COUNT, WIDTH, BUCKETS = 2, 3, 1024, 64
SPLICES = pytest.mark.parametrize("splice", ["end_of_sequence", "front_of_padding"])
TENSORS = {
    "tokens": seeded((2, LAYERS, COUNT, WIDTH), "banks", 0.5),
    "t_offsets.weight": seeded((BUCKETS, 2 * LAYERS * WIDTH), "offsets", 0.5),
}


def written(folder, splice=None, banks=2):
    """A file as anima_lora saves it, of one bank or two."""
    of_one = {"tokens": TENSORS["tokens"][0], "t_offsets.weight": TENSORS["t_offsets.weight"][:, : LAYERS * WIDTH]}
    tensors = {name: one.contiguous() for name, one in (TENSORS if banks == 2 else of_one).items()}
    path = folder / f"{splice}{banks}.safetensors"
    save_file(tensors, path, {"ss_n_layers": str(LAYERS)} | ({"ss_splice_position": splice} if splice else {}))
    return path


def padded(name: str, words: int) -> list:
    """A prompt of so many words, filled up with zeros as Anima's network does it."""
    ((text, extra),) = prompt(FAMILY, name, length=words)
    return [[torch.nn.functional.pad(text, (0, 0, 0, ROWS - words)), extra]]


PROMPTS = {"positive": padded("positive", 9), "negative": padded("negative", 4)}


@contextmanager
def overwritten(model, splice: str, mix=lambda plain, changed, soft: changed):
    """Within it the blocks of `model` are called with contexts in which rows are overwritten, sample by sample."""
    network, call = model.model.diffusion_model, {}

    def remember(module, args, kwargs):
        call["sigma"] = args[1]  # Anima's own time is sigma

    def in_block(layer):
        def hook(module, args):
            x, time, text = args
            changed, rows = text.clone(), []
            for one, sigma in enumerate(call["sigma"].flatten().tolist()):
                row = min(int(sigma * BUCKETS), BUCKETS - 1)
                offset = TENSORS["t_offsets.weight"][row].view(2, LAYERS, WIDTH)[0, layer]
                rows.append(TENSORS["tokens"][0, layer] + offset)
                words = sum(bool(word.any()) for word in text[one])
                first = words if splice == "front_of_padding" else len(text[one]) - COUNT
                for index in range(COUNT):
                    changed[one, first + index] = rows[-1][index]
            return x, time, mix(text, changed, torch.stack(rows))

        return hook

    handles = [network.register_forward_pre_hook(remember, with_kwargs=True)]
    handles += [network.blocks[layer].register_forward_pre_hook(in_block(layer)) for layer in range(LAYERS)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@SPLICES
@pytest.mark.parametrize("banks", [1, 2])
def test_rows_take_the_place_of_padding(models, tmp_path, splice, banks):
    tokens = token_files.load(written(tmp_path, splice, banks))
    ours = sample(apply_tokens(models[FAMILY], tokens), FAMILY, **PROMPTS)
    with overwritten(models[FAMILY], splice):
        expected = sample(models[FAMILY], FAMILY, **PROMPTS)
    assert relative_error(ours, expected) <= EXACT
    joined = apply_tokens(models[FAMILY], replace(tokens, splice=None, time_table=None))
    for other in (models[FAMILY], joined):
        assert relative_error(sample(other, FAMILY, **PROMPTS), expected) > 1e-3


@pytest.mark.parametrize(
    ("strength", "mix"),
    [
        (0.5, lambda plain, changed, soft: torch.cat([plain, changed], dim=1)),  # one of two contexts has the rows
        (3.0, lambda plain, changed, soft: torch.cat([changed, soft, soft], dim=1)),
    ],
)
def test_other_strengths(models, tmp_path, strength, mix):
    tokens = token_files.load(written(tmp_path))
    ours = sample(apply_tokens(models[FAMILY], tokens, strength=strength), FAMILY, **PROMPTS)
    with overwritten(models[FAMILY], "end_of_sequence", mix):
        assert relative_error(ours, sample(models[FAMILY], FAMILY, **PROMPTS)) <= EXACT


def test_strength_zero_and_a_window_that_is_closed_are_the_plain_model(models, tmp_path):
    tokens = token_files.load(written(tmp_path))
    plain = sample(models[FAMILY], FAMILY, **PROMPTS)
    for options in ({"strength": 0.0}, {"start_percent": 1.0}):
        assert torch.equal(sample(apply_tokens(models[FAMILY], tokens, **options), FAMILY, **PROMPTS), plain)


def test_only_one_role(models, tmp_path):
    """Samples of the other role keep their padding."""
    tokens = token_files.load(written(tmp_path))
    ours = sample(apply_tokens(models[FAMILY], tokens, apply_to="positive"), FAMILY, **PROMPTS)

    def of_the_positive(plain, changed, soft):
        is_positive = (plain == PROMPTS["positive"][0][0]).all(dim=2).all(dim=1)
        return torch.where(is_positive[:, None, None], changed, plain)

    with overwritten(models[FAMILY], "front_of_padding", of_the_positive):
        assert relative_error(ours, sample(models[FAMILY], FAMILY, **PROMPTS)) <= EXACT


@pytest.mark.parametrize("spliced_first", [True, False])
def test_beside_tokens_that_join_the_text(models, tmp_path, spliced_first):
    sets = [token_files.load(written(tmp_path)), replace(tokens_for(FAMILY, blocks=LAYERS), time_table=None)]
    patched = models[FAMILY]
    for tokens in sets if spliced_first else reversed(sets):
        patched = apply_tokens(patched, tokens)
    layer = count()

    def both(plain, changed, soft):
        more = sets[1].tokens[next(layer) % LAYERS]
        return torch.cat([changed, more.expand(len(plain), -1, -1)], dim=1)

    ours = sample(patched, FAMILY, **PROMPTS)
    with overwritten(models[FAMILY], "end_of_sequence", both):
        assert relative_error(ours, sample(models[FAMILY], FAMILY, **PROMPTS)) <= EXACT


def test_the_words_of_a_caption_are_read_before(models, tmp_path):
    """The network's own adapter of text fills it up to 512 rows, and 509 words leave place for three."""
    tokens = token_files.load(written(tmp_path))
    patched = apply_tokens(models[FAMILY], tokens)

    def of_words(number):
        ids = {"t5xxl_ids": torch.arange(3, 3 + number), "t5xxl_weights": torch.ones(number)}
        return [[prompt(FAMILY, "positive")[0][0], ids]]

    options = {"cfg": 1.0, "steps": 1}
    with overwritten(models[FAMILY], "front_of_padding"):
        expected = sample(models[FAMILY], FAMILY, positive=of_words(509), **options)
    assert relative_error(sample(patched, FAMILY, positive=of_words(509), **options), expected) <= EXACT
    with pytest.raises(SoftREPAError, match="place of 3 rows .* a text fills 510 of 512 rows, expected at most 509"):
        sample(patched, FAMILY, positive=of_words(510), **options)


def test_when_compiled_padding_comes_back_outside_of_the_window(models, tmp_path):
    """What is inserted into compiled networks never changes: rows that do not act are there, with no weight."""
    patched = apply_tokens(models[FAMILY], token_files.load(written(tmp_path)), start_percent=1.0)
    patched.add_wrapper_with_key(
        "apply_model", COMPILE_KEY, lambda executor, *args, **kwargs: executor(*args, **kwargs)
    )
    ours = sample(patched, FAMILY, **PROMPTS)
    assert relative_error(ours, sample(models[FAMILY], FAMILY, **PROMPTS)) <= EXACT
    inserted = patched.get_attachment(KEY).state(patched.model, torch.tensor([0.5]), [False], is_fixed=True)
    assert inserted.bias[0].tolist() == [[0.0] * COUNT + [-torch.inf] * COUNT]


@SPLICES
def test_saved_they_stay_what_they_are(models, tmp_path, splice):
    tokens = token_files.load(written(tmp_path, splice))
    again = token_files.load(token_files.save(tokens, tmp_path / "ours.safetensors"))
    assert (again.splice, again.family, again.blocks) == (splice, tokens.family, LAYERS)
    assert again.metadata == tokens.metadata
    assert "the first of two" in again.metadata["bank"]
    assert f"padding     the tokens take its place in the text, {splice}" in token_files.summary(again)
    one, other = (sample(apply_tokens(models[FAMILY], each), FAMILY, **PROMPTS) for each in (tokens, again))
    assert torch.equal(one, other)
    assert token_plot.norm_map(again)[0].shape == (LAYERS, 100)
    assert tokens_hash(again) != tokens_hash(replace(again, splice=None, time_table=None))


def test_what_cannot_be_is_refused(models, tmp_path):
    tokens = token_files.load(written(tmp_path))
    with pytest.raises(SoftREPAError, match="which Tokens .* have taken, expected one such set on a model"):
        apply_tokens(apply_tokens(models[FAMILY], tokens), tokens)
    with pytest.raises(SoftREPAError, match="take the place of padding, expected tokens that join the text"):
        TokenPlan().checked(tokens)
