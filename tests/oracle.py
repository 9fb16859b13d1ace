"""Soft tokens inserted by plain module hooks: a second, independent implementation to compare the patch with."""

from contextlib import contextmanager

import torch
from comfy.ldm.modules.attention import BasicTransformerBlock
from comfyui_softrepa.softrepa.tokens import SoftTokens

STAGES = {"input_blocks": "down", "middle_block": "mid", "output_blocks": "up"}


@contextmanager
def injected(model, *token_sets: SoftTokens):
    """Within it the network of `model` sees `token_sets` in every sample, at strength 1."""
    network = model.model.diffusion_model
    handles, call = [], {}

    def remember_timesteps(module, args, kwargs):
        call["t"] = args[1] if len(args) > 1 else kwargs["timesteps"]

    handles.append(network.register_forward_pre_hook(remember_timesteps, with_kwargs=True))
    if token_sets[0].family.is_unet:
        for name, module in network.named_modules():
            if isinstance(module, BasicTransformerBlock):
                active = [s for s in token_sets if STAGES[name.split(".")[0]] in s.blocks]
                if active:
                    handles.append(module.register_forward_pre_hook(_context_hook(active, call), with_kwargs=True))
    else:
        for layer, block in enumerate(network.joint_blocks):
            active = [s for s in token_sets if layer < s.blocks]
            if active:
                handles.extend(_joint_hooks(block, layer, active, call, network))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(tokens: SoftTokens, layer: int, t: torch.Tensor, embed=None) -> torch.Tensor:
    """(B, m, d) by the definition: tokens[k] + time_table[bucket(t)]'s k-th chunk."""
    own = tokens.tokens if tokens.family.is_unet else tokens.tokens[layer]
    if embed is not None and own.shape[-1] == 4096:
        own = embed(own)
    samples = []
    for value in t.tolist():
        row = own
        if tokens.time_table is not None:
            width = own.shape[-1]
            row = own + tokens.time_table[min(int(value), 999) // 10][layer * width : (layer + 1) * width]
        samples.append(row)
    return torch.stack(samples)


def _context_hook(active, call):
    def hook(module, args, kwargs):
        context = kwargs["context"]
        soft = torch.cat([_rows(tokens, 0, call["t"]) for tokens in active], dim=1).to(context.dtype)
        size = 77 if context.shape[1] % 77 == 0 else context.shape[1]
        parts = []
        for chunk in context.split(size, dim=1):
            parts += [chunk[:, :1], soft, chunk[:, 1:]]
        return args, kwargs | {"context": torch.cat(parts, dim=1)}

    return hook


def _joint_hooks(block, layer, active, call, network):
    def before(module, args, kwargs):
        soft = torch.cat([_rows(tokens, layer, call["t"], network.context_embedder) for tokens in active], dim=1)
        call["n"] = soft.shape[1]
        soft = torch.cat([soft, soft[-1:].expand(len(args[0]) - len(soft), -1, -1)])  # texts appended to the samples'
        return (torch.cat([soft.to(args[0].dtype), args[0]], dim=1), *args[1:]), kwargs

    def after(module, args, output):
        text, image = output
        return (text if text is None else text[:, call["n"] :], image)

    return [block.register_forward_pre_hook(before, with_kwargs=True), block.register_forward_hook(after)]
