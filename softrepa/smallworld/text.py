"""The text encoder: a CLIP-L whose weights come from a seed, frozen and never trained.

Token and position embeddings are random. The first layer looks back: three heads of it read the token before, three
the one before that, up to four tokens away, so that a noun knows its adjectives, its number, and a relation just
before it. Ten layers add nothing: SD3 reads token features after them. The last layer averages the sentence into its
end token, which makes the pooled vector a bag of words.

From position `PLAIN` on all positions share one embedding and look back at the start token: the padding that fills
up to 77 tokens is one vector repeated, and attention over n equal keys is attention over one with log(n) added.
Training uses that.
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
HEAD = 64
REACH = (1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4)  # how many tokens back each head of the first layer looks
LOOK_BACK_SCALE = 1.0
SHARPNESS = 360.0  # of looking back: the token looked at gets all but about e-20 of the attention


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


def looked_at(reach: int) -> torch.Tensor:
    """The position that each of the first PLAIN + 1 looks at, `reach` tokens back; padding looks at the start."""
    positions = (torch.arange(PLAIN + 1) - reach).clamp(min=0)
    positions[PLAIN] = 0
    return positions


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
    # a head finds its position by projecting on all position vectors, which are nearly orthogonal
    first = "text_model.encoder.layers.0.self_attn"
    codes = positions[: PLAIN + 1].float() / positions[0].float().square().sum()
    for head, reach in enumerate(REACH):
        keys = sd[f"{first}.k_proj.weight"][head * HEAD : (head + 1) * HEAD]
        queries = sd[f"{first}.q_proj.weight"][head * HEAD : (head + 1) * HEAD]
        keys[: PLAIN + 1] = codes.half()
        for position, target in enumerate(looked_at(reach)):
            queries[target] += (SHARPNESS * codes[position]).half()
    sd[f"{first}.v_proj.weight"] = torch.eye(WIDTH, dtype=torch.float16)
    # what was read lands in other dimensions than it came from: one word, another feature
    sd[f"{first}.out_proj.weight"] = torch.eye(WIDTH, dtype=torch.float16).roll(WIDTH // 2, 0) * LOOK_BACK_SCALE
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
        normal = F.layer_norm(context, (WIDTH,))
        read = [normal[:, looked_at(reach), i * HEAD : (i + 1) * HEAD] for i, reach in enumerate(REACH)]
        context = context + LOOK_BACK_SCALE * torch.cat(read, -1).roll(WIDTH // 2, -1)
        heard = (torch.arange(PLAIN + 1)[None, :] <= ends[:, None]).float()
        mean = torch.einsum("bn,bnd->bd", heard, F.layer_norm(context, (WIDTH,))) / heard.sum(1, keepdim=True)
        last = context[torch.arange(len(rows)), ends]
        return context, F.layer_norm(last + SENTENCE_SCALE * mean, (WIDTH,))

    def as_comfyui(self, caption: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What ComfyUI's SD3 text encoding makes of it: (1, 77, 4096) and (1, 2048), zeros for the other encoders."""
        context, pooled = self([caption])
        full = torch.cat([context, context[:, -1:].expand(-1, self.repeats - 1, -1)], dim=1)
        return F.pad(full, (0, 4096 - WIDTH)), F.pad(pooled, (0, 2048 - WIDTH))
