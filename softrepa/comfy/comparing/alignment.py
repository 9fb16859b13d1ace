"""The plain model as a judge of its own pictures: whether the own prompt explains a picture better than others do."""

import random
from functools import partial

import comfy.model_management as memory
import torch

from ...comparing.judging import Compared, Scorer
from ...comparing.plan import GROUP
from ...comparing.records import Record, short_hash
from ...data.dataset import Cond
from ...errors import SoftREPAError
from ...numbers import check_finite
from ...statistics import Unit
from ...training.pairs import StepBatch
from ..data.encoding import encode_caption, encode_image
from ..tokens.call_state import KEY
from ..training.memory_use import load
from ..training.out_of_memory import halving
from ..training.pairs import PairNetwork


class AlignmentJudge:
    """The share of other prompts and timesteps at which a picture's denoising error is above that of its own prompt.

    All arms are judged by one model, without tokens, on the same noise: what was drawn is compared, not what draws.
    """

    title = "alignment"
    unit = Unit(percent=True)

    def __init__(self, others: int, timesteps: tuple[int, ...]):
        self.others, self.timesteps = others, timesteps

    def check(self, compared: Compared) -> None:
        if len(compared.prompts) < 2:
            raise SoftREPAError(
                "The alignment judge has 1 prompt, expected 2 or more: a picture is compared with other prompts."
            )
        if compared.model.get_attachment(KEY) is not None:
            raise SoftREPAError("Model has soft tokens on it, expected the plain model, which judges all arms.")
        PairNetwork(compared.model)  # refuses a model of which no errors can be measured

    def key(self, compared: Compared) -> str:
        texts = short_hash("\n".join(one.text for one in compared.prompts))
        return f"{self.others} {self.timesteps} {compared.identity} {texts}"

    def note(self) -> str:
        return f"own prompt fits better than another, of at most {self.others}; chance 50%; by the plain model"

    def opened(self, compared: Compared) -> Scorer:
        patcher = compared.model.clone()
        texts = [one.text for one in compared.prompts]
        encoded: dict[str, Cond] = {}

        def cond(text: str) -> Cond:
            if text not in encoded:
                if len(encoded) > 2 * GROUP:
                    encoded.clear()
                encoded[text] = encode_caption(compared.clip, text)
            return encoded[text]

        def score(one: Record, picture: torch.Tensor) -> float:
            latent = encode_image(compared.vae, picture[0], one.file)
            conds = [cond(text) for text in (one.text, *self._others(texts, one.prompt))]
            wins = []
            with torch.inference_mode(False), torch.no_grad():
                latents = patcher.model.process_latent_in(latent[None].clone())
                load(patcher, int(patcher.model.memory_required([len(conds), *latents.shape[1:]])))
                network = PairNetwork(patcher)
                for t in self.timesteps:
                    memory.throw_exception_if_processing_interrupted()
                    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(t))
                    step = StepBatch.of_all(latents, noise, conds, t)
                    errors, _ = halving(partial(network.errors, None, step), len(conds))
                    check_finite("The alignment judge's denoising error", errors)
                    own, *rest = errors[0].tolist()
                    wins += [float(own < other) + 0.5 * float(own == other) for other in rest]
            return sum(wins) / len(wins)

        return score

    def _others(self, texts: list[str], own: int) -> list[str]:
        """The same for each picture of a prompt, from prompts near it, which are encoded together."""
        start = own // GROUP * GROUP
        near = texts[start : start + GROUP] if len(texts) - start > 1 else texts[-GROUP:]
        rest = [text for text in near if text != texts[own]]
        return random.Random(own).sample(rest, min(self.others, len(rest)))
