"""Names and shapes of the tensors in the stand-in checkpoints, as ComfyUI's loaders expect them."""

from collections.abc import Iterator

Shapes = Iterator[tuple[str, tuple[int, ...]]]


def linear(name: str, out: int, inside: int, *kernel: int, bias: bool = True) -> Shapes:
    yield f"{name}.weight", (out, inside, *kernel)
    if bias:
        yield f"{name}.bias", (out,)


def norm(name: str, width: int) -> Shapes:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def clip_l(name: str, projection: bool) -> Shapes:
    model = f"{name}.transformer.text_model"
    yield f"{model}.embeddings.token_embedding.weight", (49408, 768)
    yield f"{model}.embeddings.position_embedding.weight", (77, 768)
    for i in range(12):
        layer = f"{model}.encoder.layers.{i}"
        yield from norm(f"{layer}.layer_norm1", 768)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{part}", 768, 768)
        yield from norm(f"{layer}.layer_norm2", 768)
        yield from linear(f"{layer}.mlp.fc1", 3072, 768)
        yield from linear(f"{layer}.mlp.fc2", 768, 3072)
    yield from norm(f"{model}.final_layer_norm", 768)
    if projection:
        yield f"{name}.transformer.text_projection.weight", (768, 768)


def tiny_vae(name: str, channels: int) -> Shapes:
    def block(prefix: str) -> Shapes:
        for i in (0, 2, 4):
            yield from linear(f"{prefix}.conv.{i}", 64, 64, 3, 3)

    encoder, decoder = f"{name}.taesd_encoder", f"{name}.taesd_decoder"
    yield from linear(f"{encoder}.0", 64, 3, 3, 3)
    for i in (2, 6, 10):
        yield from linear(f"{encoder}.{i}", 64, 64, 3, 3, bias=False)
    for i in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):
        yield from block(f"{encoder}.{i}")
    yield from linear(f"{encoder}.14", channels, 64, 3, 3)
    yield from linear(f"{decoder}.1", 64, channels, 3, 3)
    for i in (7, 12, 17):
        yield from linear(f"{decoder}.{i}", 64, 64, 3, 3, bias=False)
    for i in (3, 4, 5, 8, 9, 10, 13, 14, 15, 18):
        yield from block(f"{decoder}.{i}")
    yield from linear(f"{decoder}.19", 3, 64, 3, 3)


def unet(name: str) -> Shapes:
    """One level of SD1.5: a residual block with cross-attention going in, in the middle, and two going out."""
    width, time, context = 320, 1280, 768

    def residual(prefix: str, inside: int) -> Shapes:
        yield from norm(f"{prefix}.in_layers.0", inside)
        yield from linear(f"{prefix}.in_layers.2", width, inside, 3, 3)
        yield from linear(f"{prefix}.emb_layers.1", width, time)
        yield from norm(f"{prefix}.out_layers.0", width)
        yield from linear(f"{prefix}.out_layers.3", width, width, 3, 3)
        if inside != width:
            yield from linear(f"{prefix}.skip_connection", width, inside, 1, 1)

    def transformer(prefix: str) -> Shapes:
        block = f"{prefix}.transformer_blocks.0"
        yield from norm(f"{prefix}.norm", width)
        yield from linear(f"{prefix}.proj_in", width, width, 1, 1)
        for attention, source in (("attn1", width), ("attn2", context)):
            yield from linear(f"{block}.{attention}.to_q", width, width, bias=False)
            yield from linear(f"{block}.{attention}.to_k", width, source, bias=False)
            yield from linear(f"{block}.{attention}.to_v", width, source, bias=False)
            yield from linear(f"{block}.{attention}.to_out.0", width, width)
        yield from linear(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from linear(f"{block}.ff.net.2", width, 4 * width)
        for i in (1, 2, 3):
            yield from norm(f"{block}.norm{i}", width)
        yield from linear(f"{prefix}.proj_out", width, width, 1, 1)

    yield from linear(f"{name}.time_embed.0", time, width)
    yield from linear(f"{name}.time_embed.2", time, time)
    yield from linear(f"{name}.input_blocks.0.0", width, 4, 3, 3)
    yield from residual(f"{name}.input_blocks.1.0", width)
    yield from transformer(f"{name}.input_blocks.1.1")
    yield from residual(f"{name}.middle_block.0", width)
    yield from transformer(f"{name}.middle_block.1")
    yield from residual(f"{name}.middle_block.2", width)
    for i in (0, 1):
        yield from residual(f"{name}.output_blocks.{i}.0", 2 * width)
        yield from transformer(f"{name}.output_blocks.{i}.1")
    yield from norm(f"{name}.out.0", width)
    yield from linear(f"{name}.out.2", 4, width, 3, 3)


MMDIT_DEPTH = 6  # its width is 64 times that: ComfyUI reads one from the other


def mmdit(name: str) -> Shapes:
    width = 64 * MMDIT_DEPTH
    yield f"{name}.pos_embed", (1, 64 * 64, width)
    yield from linear(f"{name}.x_embedder.proj", width, 16, 2, 2)
    yield from linear(f"{name}.context_embedder", width, 4096)
    for embedder, inside in (("t_embedder", 256), ("y_embedder", 2048)):
        yield from linear(f"{name}.{embedder}.mlp.0", width, inside)
        yield from linear(f"{name}.{embedder}.mlp.2", width, width)
    for i in range(MMDIT_DEPTH):
        for stream in ("x_block", "context_block"):
            block = f"{name}.joint_blocks.{i}.{stream}"
            keys_only = stream == "context_block" and i == MMDIT_DEPTH - 1
            yield from linear(f"{block}.adaLN_modulation.1", (2 if keys_only else 6) * width, width)
            yield from linear(f"{block}.attn.qkv", 3 * width, width)
            if not keys_only:
                yield from linear(f"{block}.attn.proj", width, width)
                yield from linear(f"{block}.mlp.fc1", 4 * width, width)
                yield from linear(f"{block}.mlp.fc2", width, 4 * width)
    yield from linear(f"{name}.final_layer.adaLN_modulation.1", 2 * width, width)
    yield from linear(f"{name}.final_layer.linear", 2 * 2 * 16, width)
