"""ComfyUI's fetching of offloaded weights, on a CPU: weights go through buffers that later layers reuse."""

from contextlib import contextmanager

import comfy.ops
import torch


@contextmanager
def shared_buffers(model, monkeypatch):
    """Within it every layer of `model` fetches its weights as from another device by `cast_bias_weight`.

    As `args.cuda_malloc` off and a stream of its own have it: two buffers in turn, written again by later layers.
    """
    buffers = [torch.empty(0), torch.empty(0)]
    fetched = []

    def cast_bias_weight(layer, input=None, dtype=None, device=None, bias_dtype=None, offloadable=False, **_):
        dtype = dtype or input.dtype
        weight, bias = layer.weight, layer.bias
        numbers = weight.numel() + (0 if bias is None else bias.numel())
        index = len(fetched) % 2
        if buffers[index].numel() < numbers:
            with torch.inference_mode(False):
                buffers[index] = torch.full((numbers,), torch.nan)
        buffer = buffers[index]
        with torch.no_grad():
            buffer[: weight.numel()].copy_(weight.flatten())
            if bias is not None:
                buffer[weight.numel() : numbers].copy_(bias.flatten())
        fetched.append(layer)
        found = buffer[: weight.numel()].view(weight.shape).to(dtype)
        found_bias = None if bias is None else buffer[weight.numel() : numbers].to(bias_dtype or dtype)
        return (found, found_bias, None) if offloadable else (found, found_bias)

    layers = [m for m in model.model.diffusion_model.modules() if isinstance(m, comfy.ops.CastWeightBiasOp)]
    with monkeypatch.context() as patch:
        patch.setattr(comfy.ops, "cast_bias_weight", cast_bias_weight)
        for layer in layers:
            layer.comfy_cast_weights = True
        try:
            yield fetched
        finally:
            for layer in layers:
                del layer.comfy_cast_weights
