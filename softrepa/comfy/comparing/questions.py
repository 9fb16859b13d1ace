"""A vision language model as a judge: how probable the right answer is to a question about a picture.

Text encoders that ComfyUI ships can be such models (Qwen3-VL and others that `TextGenerate` takes an image with). What
`clip.generate` gives are tokens; the logits behind the first one are taken on their way (as VQAScore, arXiv
2404.01291, and the Soft-TIFA of GenEval 2 do).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import comfy.model_management as memory
import torch
from comfy.sd import CLIP
from torch import Tensor, nn

from ...comparing.facts import Fact, parse_facts, whole
from ...comparing.judging import Compared, Scorer
from ...comparing.records import Record, short_hash
from ...errors import SoftREPAError
from ...statistics import Unit
from ..identity import clip_identity

HOW = "{} Answer in one word."
GREEDY = {"do_sample": False, "temperature": 1.0, "top_k": 1, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
MOST_WORDS = 4
"""Tokens of an answer whose logits cannot be had."""


class Answered(Exception):
    """Ends the writing of an answer whose first token is all that is asked for."""

    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = logits


class QuestionJudge:
    """The mean over a prompt's facts of the probability that the answer begins with the right word."""

    title = "questions"
    unit = Unit(percent=True)

    def __init__(self, clip: CLIP, facts: str = ""):
        self.clip, self.facts = clip, facts
        self.writer = writer_of(clip)

    def check(self, compared: Compared) -> None:
        parse_facts(self.facts, [one.text for one in compared.prompts])
        blank = torch.full((1, 64, 64, 3), 0.5)
        if not hasattr(self.clip, "generate") or not hasattr(self.clip.cond_stage_model, "generate"):
            raise SoftREPAError(
                "The question judge has a text encoder that writes nothing, expected a vision language model such as "
                "qwen3vl_8b.safetensors in Load CLIP, and a ComfyUI that has the node TextGenerate."
            )
        if not any(isinstance(entry, dict) for entry in ids_of(self._tokens(Fact("?"), blank))):
            raise SoftREPAError(
                "The question judge has a text encoder that takes no image, expected a vision language model such as "
                "qwen3vl_8b.safetensors in Load CLIP."
            )

    def key(self, compared: Compared) -> str:
        asked = "\n".join(repr(facts) for facts in self._asked(compared))
        return f"{clip_identity(self.clip)} {self.writer is not None} {short_hash(HOW + asked)}"

    def note(self) -> str:
        if self.writer is None:
            return "share of facts answered right, greedily: this text encoder does not show its logits"
        return "mean probability of the right answer to each fact"

    def opened(self, compared: Compared) -> Scorer:
        asked = self._asked(compared)

        def score(one: Record, picture: Tensor) -> float:
            found = []
            for fact in asked[one.prompt]:
                memory.throw_exception_if_processing_interrupted()
                found.append(self.answer(fact, picture))
            return sum(found) / len(found)

        return score

    def _asked(self, compared: Compared) -> list[tuple[Fact, ...]]:
        """By prompt: the facts given here, or else those that came with it, or else the prompt as a whole."""
        given = parse_facts(self.facts, [one.text for one in compared.prompts])
        return [
            own or prompt.facts or (whole(prompt.text),) for own, prompt in zip(given, compared.prompts, strict=True)
        ]

    def answer(self, fact: Fact, picture: Tensor) -> float:
        """The probability of the right answer's first token, in any of its spellings; greedily 0 or 1."""
        if self.writer is None:
            text = self._written(fact, picture)
            return float(text.strip().lower().startswith(fact.answer.lower()))
        logits = self.logits(fact, picture)
        return torch.softmax(logits.double(), 0)[self.spellings(fact.answer)].sum().item()

    def logits(self, fact: Fact, picture: Tensor) -> Tensor:
        """(vocabulary,) of the first token of the answer, float32 on the CPU."""
        assert self.writer is not None
        try:
            with watched(self.writer):
                self._written(fact, picture)
        except Answered as answer:
            return answer.logits[0, -1].float().cpu()
        raise SoftREPAError("The question judge's text encoder wrote an answer without logits, expected some.")

    def spellings(self, answer: str) -> list[int]:
        """First tokens of the answer as it may be written, each once."""
        found = []
        for word in (answer, answer.lower(), answer.capitalize(), answer.upper()):
            for text in (word, f" {word}"):
                ids = [
                    entry
                    for entry in ids_of(self.clip.tokenize(text, skip_template=True))
                    if not hasattr(entry, "keys")
                ]
                found += [next(one for one in ids if self.clip.decode([one]).strip())]
        return sorted(set(found))

    def _tokens(self, fact: Fact, picture: Tensor) -> dict:
        """As `TextGenerate` makes them."""
        question = HOW.format(fact.question)
        return self.clip.tokenize(question, image=picture, skip_template=False, min_length=1, thinking=False)

    def _written(self, fact: Fact, picture: Tensor) -> str:
        tokens = self._tokens(fact, picture)
        return self.clip.decode(self.clip.generate(tokens, max_length=MOST_WORDS, seed=0, **GREEDY))


def ids_of(tokens: dict) -> list:
    """Token ids in their order; an image is a dict among them."""
    return [entry[0] for batch in next(iter(tokens.values())) for entry in batch]


def writer_of(clip: CLIP) -> nn.Module | None:
    """The part of a text encoder that gives the logits of the next token, where there is one."""
    modules = clip.cond_stage_model.modules()
    return next((one for one in modules if callable(getattr(one, "logits", None)) and hasattr(one, "generate")), None)


@contextmanager
def watched(writer: nn.Module) -> Iterator[None]:
    """Ends the writing at the first logits, which come with `Answered`."""
    logits: Any = writer.logits

    def first(*args, **kwargs):
        raise Answered(logits(*args, **kwargs))

    vars(writer)["logits"] = first
    try:
        yield
    finally:
        del vars(writer)["logits"]
