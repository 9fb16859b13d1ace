"""The tokens that a run starts from: fresh ones as they are asked for, or those that it goes on from."""

from dataclasses import dataclass, replace

from ...data.dataset import Cond
from ...errors import SoftREPAError
from ...families import Blocks, depth, format_blocks, parse_blocks
from ...tokens import SoftTokens
from ...training.inputs import AUTO, TIME_TABLE, TrainingInputs
from ...training.trainer import new_tokens
from ..families import ModelShape


def starting_tokens(inputs: TrainingInputs, shape: ModelShape, empty: Cond) -> SoftTokens:
    """For a model of this shape; `empty` is the cond of "". Raises SoftREPAError."""
    plan = TokenPlan.of(inputs)
    if inputs.init_tokens is not None:
        return plan.checked(inputs.init_tokens)
    return plan.start(shape, inputs.config.seed, empty)


@dataclass(frozen=True)
class TokenPlan:
    """What is trained: tokens a layer, where, with or without a time table. None is the family's recipe."""

    n_tokens: int | None = None
    blocks: str | None = None
    time_table: bool | None = None
    two_banks: bool = False

    @classmethod
    def of(cls, inputs: TrainingInputs) -> "TokenPlan":
        blocks = None if inputs.blocks == AUTO else inputs.blocks
        return cls(inputs.n_tokens or None, blocks, TIME_TABLE[inputs.time_table], inputs.config.objective == "agsm")

    def start(self, shape: ModelShape, seed: int, empty: Cond) -> SoftTokens:
        """Fresh tokens for a model of this shape; `empty` is the cond of ""."""
        family, recipe = shape.family, shape.family.recipe
        has_table = recipe.has_time_table if self.time_table is None else self.time_table
        bos = empty["cross_attn"][0, 0].clone() if recipe.starts_from_bos else None
        count = self.n_tokens or recipe.n_tokens
        return new_tokens(family, shape.width, count, self._blocks(shape), has_table, seed, bos, self.two_banks)

    def checked(self, tokens: SoftTokens) -> SoftTokens:
        """`tokens` to go on from. Raises SoftREPAError where they are not what is asked for."""
        if tokens.splice is not None:
            raise SoftREPAError(f"{tokens.label} take the place of padding, expected tokens that join the text.")
        if tokens.negative_tokens is not None and not self.two_banks:
            raise SoftREPAError(f"{tokens.label} have a second bank, expected one: training would leave it behind.")
        if tokens.negative_tokens is None and self.two_banks:
            tokens = replace(tokens, negative_tokens=tokens.tokens)
        has_table = tokens.time_table is not None
        blocks = format_blocks(tokens.blocks)
        wanted = self.blocks and format_blocks(parse_blocks(self.blocks, tokens.family, "Training"))
        for name, asked, found in (
            ("n_tokens", self.n_tokens, tokens.count),
            ("blocks", wanted, blocks),
            ("time_table", self.time_table, has_table),
        ):
            if asked is not None and asked != found:
                raise SoftREPAError(f"{name} is {asked}, expected {found} as in init_tokens, or its default.")
        return tokens

    def _blocks(self, shape: ModelShape) -> Blocks:
        if self.blocks is None:
            return shape.family.usual_blocks(shape.layers)
        blocks = parse_blocks(self.blocks, shape.family, "Training")
        if depth(blocks) > shape.layers:
            raise SoftREPAError(f"Training: blocks is {blocks}, expected at most the model's {shape.layers} layers.")
        return blocks
