"""What of a MODEL and of tokens, or of pictures, must agree."""

from comfy.model_patcher import ModelPatcher

from ..data.latent_lists import PIXELS
from ..errors import SoftREPAError
from ..families import Blocks, depth, parse_blocks
from ..tokens import SoftTokens
from .families import ModelShape, most_cells
from .tokens.call_state import KEY


def check_positions(name: str, model: ModelPatcher, width: int, height: int) -> None:
    """Refuses latents of more cells a side than the network has positions for."""
    most = most_cells(model)
    if most is not None and max(width, height) > most:
        raise SoftREPAError(
            f"{name} is {PIXELS * width} x {PIXELS * height} pixels, expected at most {PIXELS * most} a side: this "
            "model has no positions beyond; choose a smaller size."
        )


def check_plain(model: ModelPatcher) -> None:
    """Tokens are trained on the model without any: those on it would be learned around."""
    if model.get_attachment(KEY) is not None:
        raise SoftREPAError("Model has soft tokens on it, expected the plain model; go on with init_tokens.")


def check_fit(tokens: SoftTokens, shape: ModelShape) -> None:
    """Raises SoftREPAError unless `tokens` can act in a model of this shape."""
    is_of_its_size = tokens.layers <= shape.layers and tokens.hidden_width in (None, shape.width)
    if tokens.family is not shape.family or not is_of_its_size:
        raise SoftREPAError(
            f"{tokens.label} are for {tokens.family.name} ({tokens.shape_text}), but this model is {shape.text}."
        )


def chosen_blocks(tokens: SoftTokens, text: str) -> Blocks:
    """Blocks for the node option `text`: "auto" is what the file says; a count cannot exceed the file's layers."""
    if text.strip().lower() == "auto":
        return tokens.blocks
    blocks = parse_blocks(text, tokens.family, tokens.label)
    if depth(blocks) > tokens.layers:
        raise SoftREPAError(f"{tokens.label}: blocks is {blocks}, expected at most the file's {tokens.layers} layers.")
    return blocks
