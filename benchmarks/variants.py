"""What could make a training step faster, measured: dtypes, memory formats, attention kernels, compiled blocks.

    python3 -m benchmarks.gpu --variants

Each variant is one graph of the network called plainly (see reference.py): pairs a second, peak memory, and how far the
token gradient is from that of float32. A variant that fails says why, and the next goes on.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

from .cases import Case, build, sd3, sd15, soft_tokens
from .reference import Reference
from .training import GIGABYTE, Peak, batch, our_step

CASES = {
    "sd15": Case("SD1.5 512 px", "sd15", sd15(320), 64, 77),
    "sd3": Case("SD3 512 px", "sd3", sd3(1536, 24), 64, 154),
}
SMALL_CASES = {
    "sd15": Case("SD1.5 / 10, 64 px", "sd15", sd15(32), 8, 77),
    "sd3": Case("SD3 / 12, 6 blocks, 64 px", "sd3", sd3(128, 6), 8, 154),
}
IMAGES = 4
ROUNDS = 3
LONGEST = 3.0
"""Seconds of a variant after which it gets no further round."""

PARTS = {"sd15": 30, "sd3": 40, "sd3 compiled": 45}
"""Seconds of each process, the start of ComfyUI included; "sd15 compiled", which takes minutes, only when asked for."""

LEGEND = (
    f"One graph of {IMAGES**2} pairs, of the network called plainly but in the rows called ours; the gradient's "
    "distance is relative to the first row of its part, and float32 is without TF32 unless said."
)


@contextmanager
def only(kernel: str):
    """Attention by one of PyTorch's kernels, also where ComfyUI would choose by itself."""
    import comfy.ops
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    own = comfy.ops.scaled_dot_product_attention
    comfy.ops.scaled_dot_product_attention = torch.nn.functional.scaled_dot_product_attention
    try:
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            yield
    finally:
        comfy.ops.scaled_dot_product_attention = own


@contextmanager
def tf32(is_allowed: bool):
    import torch

    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("high" if is_allowed else "highest")
    torch.backends.cudnn.allow_tf32 = is_allowed
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@contextmanager
def channels_last(network):
    import torch

    network.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        network.to(memory_format=torch.contiguous_format)


def autocast(device):
    import torch

    return torch.autocast(device.type, torch.bfloat16)


def compile_blocks(network) -> None:
    """Residual and transformer blocks, one by one."""
    import torch
    from comfy.ldm.modules.attention import BasicTransformerBlock
    from comfy.ldm.modules.diffusionmodules.mmdit import JointBlock
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock

    torch._dynamo.config.recompile_limit = 64
    for module in network.modules():
        if isinstance(module, (BasicTransformerBlock, JointBlock, ResBlock)):
            module.forward = torch.compile(module.forward)


def timed(step: Callable[[], None], device) -> tuple[float, int]:
    """(pairs a second, peak bytes) by the median of some rounds behind a first one."""
    import torch

    seconds, peak, started = [], Peak(device), time.monotonic()
    while len(seconds) < 2 or (len(seconds) <= ROUNDS and time.monotonic() - started < LONGEST):
        start = time.perf_counter()
        with peak.watched() if not seconds else nullcontext():
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return IMAGES**2 / statistics.median(seconds[1:]), peak.bytes


def lines(part: str, chosen: dict[str, Case], device) -> Iterator[str]:
    """One for each variant of a part, as soon as it is known."""
    import torch

    from softrepa.comfy.training.run import outside_inference
    from softrepa.comfy.training.trainable import TrainableNetwork
    from softrepa.training.trainer import TrainableTokens

    family, _, is_compiled = part.partition(" ")
    case = chosen[family]
    half = torch.float16 if device.type == "cuda" else torch.float32
    model = build(case, device, half)
    start = soft_tokens(case, model)
    with outside_inference():
        ours, tokens = TrainableNetwork(model, start.blocks, checkpointing=False), TrainableTokens(start)
        step = batch(case, IMAGES)
        truth = None
        for dtype, variants in variants_of(family, device, bool(is_compiled)).items():
            reference = Reference(ours, getattr(torch, dtype))
            reference.feed(step)
            for name, within in variants.items():
                title = f"{case.title:26}{dtype:10}{name:22}"

                def one(is_ours=name == "ours", reference=reference):
                    tokens.zero_grad()
                    if is_ours:
                        our_step(ours, tokens, step, IMAGES**2)
                    else:
                        reference.one_graph(tokens)

                try:
                    with within(reference.network):
                        speed, peak = timed(one, device)
                except Exception as error:  # whatever a kernel or a compiler raises
                    text = str(error).strip()
                    yield f"{title} fails: {text.splitlines()[0][:150] if text else error!r}"
                    continue
                gradient = tokens.tokens.grad.double().cpu()
                truth = gradient if truth is None else truth
                distance = float((gradient - truth).norm() / truth.norm())
                yield f"{title}{speed:9.2f}/s {peak / GIGABYTE:8.2f} GB   gradient {distance:.1e}"


def variants_of(family: str, device, is_compiled: bool) -> dict[str, dict[str, Callable]]:
    """By dtype of the weights; the first is what the others are compared with."""
    plain = {"plain": lambda network: tf32(False)}
    half = "float16" if device.type == "cuda" else "float32"
    if is_compiled:

        def compiled(network):
            compile_blocks(network)
            return nullcontext()

        return {half: plain | {"compiled blocks": compiled}}
    kernels = {
        f"{kernel.split('_')[0].lower()} attention": lambda _, kernel=kernel: only(kernel)
        for kernel in ("FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION")
    }
    formats = {"channels last": channels_last} if family != "sd3" else {}
    found = {"float32": plain | {"TF32": lambda _: tf32(True), "autocast to bfloat16": lambda _: autocast(device)}}
    found[half] = found.get(half, {}) | plain | {"ours": lambda _: nullcontext()} | formats | kernels
    return found | ({"bfloat16": plain} if device.type == "cuda" else {})
