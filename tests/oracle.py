"""Soft tokens inserted by plain module hooks: a second, independent implementation to compare the patch with."""

import inspect
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
        if token_sets[0].family.stream == "sequence":  # some of these count their time from 0 to 1
            call["t"] = call["t"] * (1000 / model.model.model_sampling.timestep(torch.tensor(1.0)))

    handles.append(network.register_forward_pre_hook(remember_timesteps, with_kwargs=True))
    if token_sets[0].family.stream == "context":
        for name, module in network.named_modules():
            if isinstance(module, BasicTransformerBlock):
                active = [s for s in token_sets if STAGES[name.split(".")[0]] in s.blocks]
                if active:
                    handles.append(module.register_forward_pre_hook(_context_hook(active, call), with_kwargs=True))
    elif token_sets[0].family.stream == "sequence":
        for layer, block in enumerate(blocks_of(network)):
            active = [s for s in token_sets if layer < s.blocks]
            if active and token_sets[0].family.name == "anima":
                handles.append(block.register_forward_pre_hook(_text_hook(layer, active, call)))
            elif active:
                before, after = _sequence_hooks(layer, active, call)
                handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(block.register_forward_hook(after))
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
    own = tokens.tokens if tokens.tokens.ndim == 2 else tokens.tokens[layer]
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


def _text_hook(layer, active, call):
    """Rows behind the text that a block is called with."""

    def hook(module, args):
        x, time, text = args
        soft = torch.cat([_rows(tokens, layer, call["t"]) for tokens in active], dim=1).to(text.dtype)
        return x, time, torch.cat([text, soft], dim=1)

    return hook


def blocks_of(network) -> list[torch.nn.Module]:
    """The blocks of a transformer, in the order in which they run."""
    lists = ("layers", "blocks", "transformer_blocks", "double_blocks", "single_blocks")
    return [block for name in lists for block in getattr(network, name, ())]


SEQUENCES = {
    "JointTransformerBlock": ("x", "x_mask", "freqs_cis"),
    "QwenImageTransformerBlock": ("encoder_hidden_states", "encoder_hidden_states_mask", "image_rotary_emb"),
    "DoubleStreamBlock": ("txt", "attn_mask", "pe"),
    "SingleStreamBlock": ("x", "attn_mask", "pe"),
    "comfy.ldm.krea2.model": ("x", "mask", "freqs"),
}
"""By class or module of a block, what it calls its text, the mask of keys and the rotations."""


def _sequence_hooks(layer, active, call):
    """Rows stand behind the text, or behind a sequence of both, unrotated, as queries too; afterwards they are cut."""

    def before(module, args, kwargs):
        names = SEQUENCES.get(type(module).__module__) or SEQUENCES[type(module).__name__]
        given = inspect.signature(type(module).forward).bind(module, *args, **kwargs).arguments
        given.pop("self")
        text, mask, rotations = (given.get(name) for name in names)
        soft = torch.cat([_rows(tokens, layer, call["t"]) for tokens in active], dim=1).to(text.dtype)
        call["place"], call["n"] = text.shape[1], soft.shape[1]
        axis = 1 if type(module).__name__ == "JointTransformerBlock" else 2
        shape = list(rotations.shape)
        shape[axis] = call["n"]
        still = torch.eye(2, dtype=rotations.dtype).expand(shape)
        length = rotations.shape[axis]
        ahead, behind = (
            rotations.narrow(axis, 0, call["place"]),
            rotations.narrow(axis, call["place"], length - call["place"]),
        )
        given[names[0]] = torch.cat([text, soft], dim=1)
        given[names[2]] = torch.cat([ahead, still, behind], dim=axis)
        if mask is not None:
            seen = torch.full((*mask.shape[:-1], call["n"]), 0, dtype=mask.dtype)
            parts = [mask[..., : call["place"]], seen, mask[..., call["place"] :]]
            given[names[1]] = torch.cat(parts, dim=-1)
        return (), given

    def after(module, args, output):
        place, n = call["place"], call["n"]

        def cut(sequence):
            return torch.cat([sequence[:, :place], sequence[:, place + n :]], dim=1)

        if not isinstance(output, tuple):
            return cut(output)
        text_is = 0 if type(module).__name__ == "QwenImageTransformerBlock" else 1
        return tuple(cut(one) if index == text_is else one for index, one in enumerate(output))

    return before, after
