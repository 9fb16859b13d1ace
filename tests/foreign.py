"""What other packs put on a MODEL, in small; each takes a MODEL and gives a patched clone, or is a context."""

from contextlib import contextmanager

import torch
from comfy.ldm.modules.attention import CrossAttention, optimized_attention
from softrepa_tests.tiny_models import seeded


def drops_masks(model):
    """An attention override whose kernel takes no mask, whatever it is told."""
    return with_override(model, lambda func, q, k, v, heads, mask=None, **rest: func(q, k, v, heads, mask=None, **rest))


def refuses_masks(model):
    """As flash attention: raises where there is a mask."""

    def override(func, q, k, v, heads, mask=None, **rest):
        if mask is not None:
            raise RuntimeError("no masks here")
        return func(q, k, v, heads, mask=None, **rest)

    return with_override(model, override)


def has_no_backward(model):
    """As sage attention: the result of a kernel that autograd does not know."""
    return with_override(model, lambda func, *args, **kwargs: func(*args, **kwargs).detach())


def with_override(model, override):
    model = model.clone()
    model.model_options["transformer_options"]["optimized_attention_override"] = override
    return model


def interleaved(model):
    """NegPip: keys and values lie in one context in turn, twice as long, and a patch takes them apart."""
    model = model.clone()
    model.set_model_attn2_patch(lambda q, k, v, extra: (q, k[:, 0::2], v[:, 1::2]))
    return model


def in_turn(conds):
    """A CONDITIONING in which every vector stands twice, as key and as value."""
    return [[context.repeat_interleave(2, dim=1), dict(extra)] for context, extra in conds]


def regions(model, count: int = 2):
    """Queries and contexts repeated for regions, folded again behind the attention; who belongs where is not said."""
    model = model.clone()
    model.set_model_attn2_patch(lambda q, k, v, extra: tuple(x.repeat(count, 1, 1) for x in (q, k, v)))
    model.set_model_attn2_output_patch(lambda out, extra: sum(out.chunk(count)) / count)
    return model


def couple(model, regional: torch.Tensor):
    """Attention Couple as comfyui-ppm has it: the positive prompt gets a second region, the context `regional`."""
    model = model.clone()

    def patch(q, k, v, extra):
        kinds = extra["cond_or_uncond"]
        made = extra["cond_or_uncond_couple"] = []
        size, out = len(q) // len(kinds), ([], [])
        for kind, query, context in zip(kinds, q.split(size), k.split(size), strict=True):
            texts = [context] if kind == 1 else [context, regional.to(context).expand(size, -1, -1)]
            out[0].extend([query] * len(texts))
            out[1].extend(texts)
            made.extend([kind] * len(texts))
        joined = torch.cat(out[1])
        return torch.cat(out[0]), joined, joined

    def fold(out, extra):
        made, kinds = extra["cond_or_uncond_couple"], extra["cond_or_uncond"]
        parts, folded = list(out.split(len(out) // len(made))), []
        for kind in kinds:
            folded.append(parts.pop(0) if kind == 1 else 0.25 * parts.pop(0) + 0.75 * parts.pop(0))
        return torch.cat(folded)

    model.set_model_attn2_patch(patch)
    model.set_model_attn2_output_patch(fold)
    return model


@contextmanager
def longer_context(model, appended: torch.Tensor, weight: float = 0.0, through_options: bool = False):
    """NAG's guider: the context has one row more than the batch, a negative prompt that each cross-attention uses.

    The attention's output for the last sample goes by `weight` to what it is under `appended` (1, N, d).
    """
    network = model.model.diffusion_model
    modules = [m for name, m in network.named_modules() if name.endswith("attn2") and isinstance(m, CrossAttention)]
    forward = network.forward

    def attention(module, x, context=None, value=None, transformer_options=None, **_):
        q, k = module.to_q(x), module.to_k(context)
        v = module.to_v(context if value is None else value)
        options = {"transformer_options": transformer_options} if through_options else {}
        out = optimized_attention(q, k[: len(x)], v[: len(x)], module.heads, **options)
        negative = optimized_attention(q[-1:], k[len(x) :], v[len(x) :], module.heads, **options)
        return module.to_out(torch.cat([out[:-1], out[-1:] + weight * (negative - out[-1:])]))

    def longer(x, timesteps=None, context=None, **rest):
        for module in modules:
            module.forward = lambda *args, _module=module, **more: attention(_module, *args, **more)
        try:
            return forward(x, timesteps, torch.cat([context, appended.to(context)]), **rest)
        finally:
            for module in modules:
                del module.forward

    network.forward = longer
    try:
        yield
    finally:
        del network.forward


def own_context(model):
    """An attn2 replacement that attends to a context of its own and not to the prompt."""

    def replacement(q, k, v, extra):
        image = seeded((1, 5, q.shape[-1]), "own", 1.0).expand(len(q), -1, -1)
        return optimized_attention(q, image, torch.zeros_like(k)[:, :5] + image, extra["n_heads"])

    model = model.clone()
    model.set_model_attn2_replace(replacement, "input", 1)
    return model


@contextmanager
def guided_joint_blocks(model, appended: torch.Tensor, weight: float):
    """NAG's guider on SD3: joint blocks with one text more than images, run without transformer options."""
    network = model.model.diffusion_model
    forward = network.forward

    def block_forward(block, text, image, c, use_checkpoint=True):
        extra = len(text) - len(image)
        text_qkv, text_rest = block.context_block.pre_attention(text, c)
        image_qkv, image_rest = block.x_block.pre_attention(image, c[:-extra])
        q, k, v = (torch.cat([a, torch.cat([b, b[-extra:]])], dim=1) for a, b in zip(text_qkv, image_qkv, strict=True))
        out = optimized_attention(q, k, v, heads=block.x_block.attn.num_heads)
        length = text_qkv[0].shape[1]
        texts, images = out[:, :length], out[:, length:]
        images, negative = images[:-extra], images[-extra:]
        images = torch.cat([images[:-extra], images[-extra:] + weight * (negative - images[-extra:])])
        text = None if block.context_block.pre_only else block.context_block.post_attention(texts, *text_rest)
        return text, block.x_block.post_attention(images, *image_rest)

    def core(x, c_mod, context=None, control=None, transformer_options={}):
        replaced = transformer_options.get("patches_replace", {}).get("dit", {})
        for i, block in enumerate(network.joint_blocks):

            def original(args, block=block):
                text, image = block(args["txt"], args["img"], c=args["vec"])
                return {"txt": text, "img": image}

            args = {"img": x, "txt": context, "vec": c_mod, "transformer_options": transformer_options}
            run = replaced.get(("double_block", i), lambda args, extra: extra["original_block"](args))
            out = run(args, {"original_block": original})
            context, x = out["txt"], out["img"]
        return network.final_layer(x, c_mod[: len(x)])

    def longer(x, timesteps, context=None, y=None, **rest):
        network.forward_core_with_concat = core
        embed, embedder = network.t_embedder.forward, network.t_embedder
        embedder.forward = lambda *args, **more: (lambda c: torch.cat([c, c[-1:]]))(embed(*args, **more))
        for block in network.joint_blocks:
            block.forward = lambda *args, _block=block, **more: block_forward(_block, *args, **more)
        try:
            return forward(x, timesteps, torch.cat([context, appended.to(context)]), torch.cat([y, y[-1:]]), **rest)
        finally:
            del network.forward_core_with_concat, embedder.forward
            for block in network.joint_blocks:
                del block.forward

    network.forward = longer
    try:
        yield
    finally:
        del network.forward
