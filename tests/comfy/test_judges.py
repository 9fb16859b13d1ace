"""Judges that ComfyUI's own models are: their scores are what the models say, computed here another way."""

from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import comfy.ops
import comfy.sd
import comfy.sd1_clip
import numpy as np
import pytest
import torch
from comfy.clip_vision import ClipVisionModel
from comfy.text_encoders import qwen3vl
from comfyui_softrepa.nodes.compare import AlignmentJudgeNode, CLIPJudgeNode, CompareTokens, QuestionJudgeNode
from comfyui_softrepa.softrepa.comfy.comparing.alignment import AlignmentJudge
from comfyui_softrepa.softrepa.comfy.comparing.clip_score import CLIPJudge
from comfyui_softrepa.softrepa.comfy.comparing.questions import QuestionJudge, writer_of
from comfyui_softrepa.softrepa.comfy.data.encoding import encode_caption
from comfyui_softrepa.softrepa.comfy.tokens.patching import apply_tokens
from comfyui_softrepa.softrepa.comfy.training.pairs import PairNetwork, pair_errors
from comfyui_softrepa.softrepa.comparing.facts import Fact
from comfyui_softrepa.softrepa.comparing.inputs import Prompt
from comfyui_softrepa.softrepa.comparing.records import Arm, record
from comfyui_softrepa.softrepa.errors import SoftREPAError
from safetensors.torch import load_file, save_file
from softrepa_tests.comparing import PROMPTS, SMALL, small_world
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPVisionConfig, CLIPVisionModelWithProjection

from softrepa.smallworld.world import Group, Spec, draw, plain_caption, random_scene

IDENTITY = "of a test"


@dataclass
class Comparison:
    """What a judge sees of one."""

    prompts: list[Prompt]
    model: object = None
    clip: object = None
    vae: object = None
    identity: str = field(default=IDENTITY)


def of(*texts, **more):
    return Comparison([Prompt(text) for text in texts], **more)


def pictures(count, size=96, seed=0):
    return torch.rand(count, 1, size, size, 3, generator=torch.Generator().manual_seed(seed))


def one(text, prompt=0):
    return record(Arm("strength 0"), prompt, text, 0)


def random_state(module, spread=0.05):
    """Seeded weights for a module that has none yet, as half precision holds them; norms stay near 1."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: (torch.randn(weight.shape, generator=generator) * spread + ("norm" in name and name.endswith("weight")))
        .half()
        .float()
        for name, weight in module.state_dict().items()
        if weight.is_floating_point()
    }


# ---------------------------------------------------------------- questions


@dataclass
class TinyText(qwen3vl.Qwen3VL_8BConfig):
    hidden_size: int = 64
    intermediate_size: int = 64
    num_hidden_layers: int = 3
    num_attention_heads: int = 2
    num_key_value_heads: int = 1


TINY_VISION = {"hidden_size": 64, "intermediate_size": 64, "depth": 2, "deepstack_visual_indexes": [0, 1]}
QUESTION = "Does this image show a cat? Answer in one word."


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A small Qwen3-VL with random weights in the file format of the large one, as Load CLIP reads it."""
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setitem(qwen3vl.QWEN3VL_CONFIGS, "qwen3vl_8b", TinyText)
        patch.setitem(qwen3vl.QWEN3VL_VISION, "qwen3vl_8b", TINY_VISION)
        model = qwen3vl._make_qwen3vl_model("qwen3vl_8b")({}, torch.float32, "cpu", comfy.ops.disable_weight_init)
        names = (("model.lm_head.", "lm_head."), ("model.", "model.language_model."), ("visual.", "model.visual."))
        state = {}
        for name, weight in random_state(model).items():
            old, new = next(pair for pair in names if name.startswith(pair[0]))
            state[name.replace(old, new, 1)] = weight
        path = tmp_path_factory.mktemp("qwen") / "qwen3vl_8b.safetensors"
        save_file(state, path)
        yield comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.STABLE_DIFFUSION)


def first_logits(clip, picture):
    """Of the answer to QUESTION, by the encoder's own forward pass and its output weights."""
    tokens = clip.tokenize(QUESTION, image=picture, min_length=1)
    encoder = clip.cond_stage_model.qwen3vl_8b
    ids = [[entry[0] for entry in batch] for batch in tokens["qwen3vl_8b"]]
    embeds, _, _, info = encoder.process_tokens(ids, torch.device("cpu"))
    hidden = encoder.transformer(None, embeds=embeds, embeds_info=info)[0]
    return (hidden[0, -1] @ encoder.transformer.model.lm_head.weight.T).float()


def test_the_probability_is_the_encoders_own(qwen):
    judge, picture = QuestionJudge(qwen), pictures(1)[0]
    logits = first_logits(qwen, picture)
    assert torch.allclose(judge.logits(Fact("Does this image show a cat?"), picture), logits, rtol=1e-3, atol=1e-4)
    tokenizer = qwen.tokenizer.qwen3vl_8b.tokenizer
    words = ("yes", "Yes", "YES", " yes", " Yes", " YES")
    ids = sorted({tokenizer(word)["input_ids"][0] for word in words})
    expected = torch.softmax(logits, 0)[ids].sum().item()
    assert judge.answer(Fact("Does this image show a cat?"), picture) == pytest.approx(expected, rel=1e-3)
    assert "logits" not in vars(writer_of(qwen))


def test_the_picture_and_the_question_count(qwen):
    judge = QuestionJudge(qwen)
    ones, others = ([judge.answer(Fact(text), picture) for picture in pictures(2)] for text in ("A cat?", "A dog?"))
    assert len({*ones, *others}) == 4


def test_comfyui_would_have_written_the_same(qwen):
    """The likeliest first token is the one that `clip.generate` gives."""
    judge, picture = QuestionJudge(qwen), pictures(1)[0]
    tokens = qwen.tokenize(QUESTION, image=picture, skip_template=False, min_length=1, thinking=False)
    written = qwen.generate(tokens, do_sample=False, max_length=1)
    assert judge.logits(Fact("Does this image show a cat?"), picture).argmax().item() == written[0]


def test_a_prompt_has_the_mean_of_its_facts(qwen):
    facts = (Fact("A cat?"), Fact("How many?", "three"))
    picture = pictures(1)[0]
    given = QuestionJudge(qwen)
    of_file = given.opened(Comparison([Prompt("cats", facts)]))(one("cats"), picture)
    assert of_file == pytest.approx(sum(given.answer(fact, picture) for fact in facts) / 2)
    typed = QuestionJudge(qwen, "a cat; a dog")
    expected = [typed.answer(Fact(f"Does this image show {what}?"), picture) for what in ("a cat", "a dog")]
    found = typed.opened(Comparison([Prompt("cats", facts)]))(one("cats"), picture)
    assert found == pytest.approx(sum(expected) / 2)
    asked = QuestionJudge(qwen).opened(of("cats"))(one("cats"), picture)
    assert asked == pytest.approx(given.answer(Fact('Does this image show "cats"?'), picture))


def test_without_logits_it_is_greedy_and_says_so(qwen, monkeypatch):
    """As of a build whose encoder gives tokens only."""
    monkeypatch.setattr(qwen3vl.Qwen3VL, "logits", None)
    judge = QuestionJudge(qwen)
    assert judge.writer is None
    assert "greedily" in judge.note()
    assert "greedily" not in QuestionJudge.note(type("Judge", (), {"writer": 1})())
    ids = qwen.tokenizer.qwen3vl_8b.tokenizer(" Yes, it does")["input_ids"]
    monkeypatch.setattr(qwen, "generate", lambda tokens, **options: ids)
    score = judge.opened(of("a"))
    assert score(one("a"), pictures(1)[0]) == 1.0
    assert judge.answer(Fact("?", "no"), pictures(1)[0]) == 0.0
    assert judge.key(of("a")) != QuestionJudge(qwen).key(of("a")).replace("False", "True")


# ---------------------------------------------------------------- CLIP score

TEXT = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
VISION = {
    **TEXT, "image_size": 32, "patch_size": 8, "projection_dim": 64, "num_channels": 3, "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5, "model_type": "clip_vision_model",
}  # fmt: skip


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """A small CLIP's text and vision model by transformers, and both as ComfyUI loads their files."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    with torch.inference_mode(False):
        options = {"vocab_size": 49408, "projection_dim": 64, "eos_token_id": 49407, "hidden_act": "quick_gelu"}
        text = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT, **options)).eval()
        vision = CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION)).eval()
        for model in (text, vision):
            model.load_state_dict(random_state(model, 0.1), strict=False)
        save_file(
            {key: value for key, value in text.state_dict().items() if "position_ids" not in key},
            folder / "l.safetensors",
        )
        save_file(vision.state_dict(), folder / "vision.safetensors")
    with torch.inference_mode():
        target = SimpleNamespace(params={}, clip=comfy.sd1_clip.SD1ClipModel, tokenizer=comfy.sd1_clip.SD1Tokenizer)
        options = {"clip_l_model_config": TEXT}
        clip = comfy.sd.CLIP(target, state_dict=[load_file(folder / "l.safetensors")], model_options=options)
        seen = ClipVisionModel(VISION)
        seen.load_sd(load_file(folder / "vision.safetensors"))
    return text, vision, clip, seen


def test_the_cosine_is_transformers(halves):
    text, vision, clip, seen = halves
    judge, picture = CLIPJudge(clip, seen), pictures(1, size=32)[0]
    ids = torch.tensor([[token for token, *_ in clip.tokenize("two red cats")["l"][0]]])
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (seen.image_mean, seen.image_std))
    pixels = ((picture * 255).round() / 255).movedim(-1, 1)
    with torch.no_grad():
        expected = torch.cosine_similarity(
            vision(pixel_values=(pixels - mean) / std).image_embeds, text(input_ids=ids).text_embeds
        ).item()
    score = judge.opened(of("two red cats"))
    assert score(one("two red cats"), picture) == pytest.approx(expected, abs=1e-4)
    assert score(one("a dog"), picture) != pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 1e-3


def test_halves_of_two_clips_are_refused(halves):
    _, _, clip, _ = halves
    with pytest.raises(SoftREPAError, match="text model of width 64 and a vision model of width 32"):
        CLIPJudge(clip, seeing(32)).check(of("a"))
    CLIPJudge(clip, halves[3]).check(of("a"))


def test_encoders_without_a_projection_of_their_own_are_refused(halves):
    with pytest.raises(SoftREPAError, match="pooled output of width 2048 and no projection for it"):
        CLIPJudge(small_world()[1], halves[3]).check(of("a"))


def seeing(width):
    model = ClipVisionModel(VISION | {"projection_dim": width})
    model.load_sd(random_state(model.model))
    return model


def test_a_text_model_without_its_projection_is_refused(halves):
    _, _, clip, seen = halves
    weight = clip.cond_stage_model.clip_l.transformer.text_projection.weight
    kept = weight.clone()
    try:
        for lost in (torch.zeros_like(kept), torch.eye(64), torch.full_like(kept, 1e-7)):
            weight.copy_(lost)
            with pytest.raises(SoftREPAError, match="without its projection"):
                CLIPJudge(clip, seen).check(of("a"))
    finally:
        weight.copy_(kept)


def test_encoders_that_see_nothing_are_refused(qwen, halves):
    with pytest.raises(SoftREPAError, match="writes nothing"):
        QuestionJudge(small_world()[1]).check(of("a"))
    with pytest.raises(SoftREPAError, match="takes no image"):
        QuestionJudge(halves[2]).check(of("a"))
    QuestionJudge(qwen).check(of("a"))
    with pytest.raises(SoftREPAError, match="facts has 2 lines, expected 1"):
        QuestionJudge(qwen, "a\nb").check(of("a"))


# ---------------------------------------------------------------- alignment


@pytest.fixture(scope="module")
def world():
    return dict(zip(("model", "clip", "vae", "tokens"), small_world(), strict=True))


def compared_in(world, *texts):
    return of(*texts, **{name: world[name] for name in ("model", "clip", "vae")})


TEXTS = ("a red circle", "two blue squares", "a green cross above a black diamond")


def test_alignment_by_hand(world):
    judge, picture = AlignmentJudge(7, (300, 700)), pictures(1)[0]
    found = judge.opened(compared_in(world, *TEXTS))(one(TEXTS[1], 1), picture)
    latents = world["model"].model.process_latent_in(world["vae"].encode(picture))
    wins = []
    for t in (300, 700):
        noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(t))
        conds = [encode_caption(world["clip"], text) for text in TEXTS]
        errors = torch.cat([pair_errors(world["model"], None, latents, noise, [cond], t, 1)[0] for cond in conds])
        wins += [errors[1] < errors[0], errors[1] < errors[2]]
    assert found == pytest.approx(sum(map(float, wins)) / 4)


def test_true_pictures_fit_their_prompts(world):
    rng = np.random.default_rng(0)
    specs = [Spec((Group(shape, count),)) for shape in ("circle", "square", "cross") for count in (1, 2)]
    texts = [plain_caption(spec) for spec in specs]
    score = AlignmentJudge(5, (500, 700, 900)).opened(compared_in(world, *texts))
    right = [
        score(one(text, number), torch.from_numpy(draw(random_scene(rng, spec)))[None])
        for number, (text, spec) in enumerate(zip(texts, specs, strict=True))
    ]
    assert sum(right) / len(right) > 0.85


def test_errors_that_are_no_numbers_are_no_score(world, monkeypatch):
    monkeypatch.setattr(PairNetwork, "errors", lambda *_: torch.tensor([[torch.nan, 1.0, 2.0]]))
    score = AlignmentJudge(7, (300,)).opened(compared_in(world, *TEXTS))
    with pytest.raises(SoftREPAError, match="alignment judge's denoising error has 1 NaN or infinite values"):
        score(one(TEXTS[1], 1), pictures(1)[0])


def test_the_plain_model_judges_every_arm(world):
    judge = AlignmentJudge(7, (500,))
    with pytest.raises(SoftREPAError, match="has soft tokens on it"):
        judge.check(compared_in(world | {"model": apply_tokens(world["model"], world["tokens"])}, *TEXTS))
    with pytest.raises(SoftREPAError, match="has 1 prompt, expected 2 or more"):
        judge.check(compared_in(world, "a"))


def test_what_decides_a_score_keys_it(world):
    of_world = compared_in(world, *TEXTS)
    keys = {
        AlignmentJudge(7, (500,)).key(of_world),
        AlignmentJudge(6, (500,)).key(of_world),
        AlignmentJudge(7, (400,)).key(of_world),
        AlignmentJudge(7, (500,)).key(compared_in(world, *TEXTS[:2])),
        AlignmentJudge(7, (500,)).key(replace(of_world, identity="another")),
    }
    assert len(keys) == 5


def test_others_are_near_and_never_the_own():
    texts = [f"prompt {number}" for number in range(33)]
    judge = AlignmentJudge(7, (500,))
    for own in (0, 31, 32):
        others = judge._others(texts, own)
        assert len(set(others)) == 7
        assert texts[own] not in others
        assert others == judge._others(texts, own)
    assert len(judge._others(texts[:3], 1)) == 2


# ---------------------------------------------------------------- in the node


def test_judges_in_a_row(world, halves, qwen):
    first = AlignmentJudgeNode.execute(1, "500").args[0]
    second = CLIPJudgeNode.execute(halves[2], halves[3], first).args[0]
    third = QuestionJudgeNode.execute(qwen, "", second).args[0]
    given = world | SMALL | {"prompts": PROMPTS, "seeds": "0", "filename_prefix": "judged"}
    grid, _, table, *_ = CompareTokens.execute(**given, judge=third).args
    heads = [paragraph.splitlines()[0] for paragraph in table.split("\n\n")]
    assert [head.partition(" (")[0] for head in heads[:3]] == ["alignment", "CLIP score", "questions"]
    assert grid.std() > 0.05
