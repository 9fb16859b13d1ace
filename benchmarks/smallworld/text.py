"""The text encoder: a CLIP-L whose weights come from a seed, frozen and never trained.

Token and position embeddings are random; eleven of the twelve layers add nothing, so the token features that SD3
reads (the last layer but one) are embedding plus position. The last layer averages the sentence into its end token,
which makes the pooled vector a bag of words. Which adjective belongs to which noun, which number, which side: that
is in the order of the tokens alone, and the diffusion model has to learn to read it.

From position `PLAIN` on all positions share one embedding: the padding that fills up to 77 tokens is one vector
repeated, and attention over n equal keys is attention over one with log(n) added. Training uses that.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F

WIDTH, LAYERS, VOCABULARY, POSITIONS = 768, 12, 49408, 77
START, END = 49406, 49407
PLAIN = 18
SEED = 20250311
POSITION_SCALE = 0.7
SENTENCE_SCALE = 3.0


def _uniform(rng: np.random.PCG64, rows: int) -> torch.Tensor:
    """Rows of unit variance. Raw bits of PCG64 are the same on every machine; normal variates are not promised."""
    bits = rng.random_raw(rows * WIDTH // 4).astype("<u8").view("<u2").reshape(rows, WIDTH)
    return torch.from_numpy((bits.astype(np.float32) + 0.5) / 32768 - 1).mul_(math.sqrt(3))


def embeddings() -> tuple[torch.Tensor, torch.Tensor]:
    """Token (49408, 768) and position (77, 768) embeddings, float16."""
    rng = np.random.PCG64(SEED)
    positions = _uniform(rng, PLAIN + 1) * POSITION_SCALE
    positions = positions[torch.arange(POSITIONS).clamp(max=PLAIN)]
    return _uniform(rng, VOCABULARY).half(), positions.half()


def checkpoint_tensors() -> dict[str, torch.Tensor]:
    """The encoder under the names of a CLIP-L text model, float16: 123M parameters, most of them zero."""
    tokens, positions = embeddings()
    sd = {
        "text_model.embeddings.token_embedding.weight": tokens,
        "text_model.embeddings.position_embedding.weight": positions,
        "text_projection.weight": torch.eye(WIDTH, dtype=torch.float16),
    }
    for norm in ("final_layer_norm", *(f"encoder.layers.{i}.layer_norm{k}" for i in range(LAYERS) for k in (1, 2))):
        sd[f"text_model.{norm}.weight"] = torch.ones(WIDTH, dtype=torch.float16)
        sd[f"text_model.{norm}.bias"] = torch.zeros(WIDTH, dtype=torch.float16)
    inner = 4 * WIDTH
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc1": (inner, WIDTH), "mlp.fc2": (WIDTH, inner)}
    for i in range(LAYERS):
        for name, shape in shapes.items():
            sd[f"text_model.encoder.layers.{i}.{name}.weight"] = torch.zeros(shape, dtype=torch.float16)
            sd[f"text_model.encoder.layers.{i}.{name}.bias"] = torch.zeros(shape[0], dtype=torch.float16)
    # queries and keys are zero: every token looks at all before it alike
    last = f"text_model.encoder.layers.{LAYERS - 1}.self_attn"
    sd[f"{last}.v_proj.weight"] = torch.eye(WIDTH, dtype=torch.float16) * SENTENCE_SCALE
    sd[f"{last}.out_proj.weight"] = torch.eye(WIDTH, dtype=torch.float16)
    return sd


class FastEncoder:
    """The same encodings without running 77 tokens through twelve layers; padding is given once.

    `context` is (B, PLAIN + 1, 768), its last row standing for `repeats` equal ones; `pooled` is (B, 768).
    """

    repeats = POSITIONS - PLAIN

    def __init__(self, tokenizer):
        """`tokenizer` is ComfyUI's `comfy.sd1_clip.SDTokenizer()`."""
        self.tokenizer = tokenizer
        self.ids: dict[str, list[int]] = {}
        tokens, positions = embeddings()
        self.tokens, self.positions = tokens.float(), positions.float()

    def token_ids(self, caption: str) -> list[int]:
        """Tokens of a caption; cached by word, since CLIP's tokenizer splits at spaces first."""
        out = []
        for word in caption.split():
            if word not in self.ids:
                pairs = self.tokenizer.tokenize_with_weights(word)[0]
                self.ids[word] = [token for token, _ in pairs if token not in (START, END)]
            out += self.ids[word]
        if len(out) > PLAIN - 2:
            raise ValueError(f'caption "{caption}" has {len(out)} tokens: at most {PLAIN - 2} are supported')
        return out

    def __call__(self, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [[START, *self.token_ids(caption), END] for caption in captions]
        ends = torch.tensor([len(row) - 1 for row in rows])
        ids = torch.tensor([row + [END] * (PLAIN + 1 - len(row)) for row in rows])
        context = self.tokens[ids] + self.positions[: PLAIN + 1]
        read = (torch.arange(PLAIN + 1)[None, :] <= ends[:, None]).float()
        mean = torch.einsum("bn,bnd->bd", read, F.layer_norm(context, (WIDTH,))) / read.sum(1, keepdim=True)
        last = context[torch.arange(len(rows)), ends]
        return context, F.layer_norm(last + SENTENCE_SCALE * mean, (WIDTH,))
