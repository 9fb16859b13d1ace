"""A device that is not the CPU, for machines that have none: it computes on the CPU and refuses what CUDA refuses.

Its tensors report `meta`, the one device that PyTorch knows everywhere without a driver, and keep their values beside.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import comfy.model_management as memory
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_softrepa.softrepa.comfy.training import frozen
from softrepa_tests import tiny_models
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

CPU = torch.device("cpu")
DEVICE = torch.device("meta")
FREE = 32 * 2**30

aten = torch.ops.aten
CROSSING = (aten._to_copy.default, aten.copy_.default, aten._local_scalar_dense.default)
"""Copies and `.item()`."""

INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default)
"""Their indices, the second argument, may lie on the CPU where the tensor itself does not."""


class DeviceTensor(Tensor):
    """A tensor on the other device, whose `values` are on the CPU."""

    is_meta = False  # ComfyUI takes such weights for ones that are not there yet
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: Tensor):
        shape = values.shape, values.stride(), values.storage_offset()
        tensor = Tensor._make_wrapper_subclass(cls, *shape, dtype=values.dtype, device=DEVICE)
        tensor.values = values
        tensor.untyped_storage().values = values.untyped_storage()
        return tensor

    def __repr__(self):
        return f"DeviceTensor({self.dtype}, {list(self.shape)})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} on the other device after its end, expected .cpu() before")


class Device(TorchDispatchMode):
    """Runs operations on `DeviceTensor`s; `refused` is what it did not, `copied_out` how many numbers left at once."""

    def __init__(self):
        super().__init__()
        self.refused: list[str] = []
        self.copied_out: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        leaves = list(flat((args, kwargs)))
        is_here = any(isinstance(leaf, DeviceTensor) for leaf in leaves)
        named = next((leaf for leaf in leaves if isinstance(leaf, torch.device)), None)
        if not is_here and named != DEVICE:
            return func(*args, **kwargs)
        if any(type(leaf) is Tensor and leaf.device == DEVICE for leaf in leaves):
            raise AssertionError(f"{func} of a tensor without values, expected `Lists` to know its maker")
        with self:  # in inference mode operations that are made of others arrive whole
            found = func.decompose(*args, **kwargs)
        if found is not NotImplemented:
            return found
        stays = is_here if named is None else named == DEVICE
        if func is aten.copy_.default:
            stays = isinstance(args[0], DeviceTensor)
        self._check(func, args, leaves, stays)
        found = func(*changed(args, on_cpu), **changed(kwargs, on_cpu))
        if not stays:
            self.copied_out += [leaf.numel() for leaf in flat(found) if isinstance(leaf, Tensor)]
            return args[0] if func is aten.copy_.default else found
        # a view is an inference tensor or none as what it looks at is, whatever the mode
        with torch.inference_mode(args[0].is_inference() if func.is_view else torch.is_inference_mode_enabled()):
            found = args[0] if func._schema.is_mutable else changed(found, on_device)
        return return_and_correct_aliasing(func, args, kwargs, found)

    def _check(self, func, args, leaves, stays: bool) -> None:
        if stays and any(isinstance(leaf, torch.Generator) for leaf in leaves):
            self._refuse(f"{func}: expected a generator of the other device, found one of the CPU")
        if func in CROSSING or any(isinstance(leaf, torch.device) for leaf in leaves):  # a device named: a new tensor
            return
        if func in INDEXING and isinstance(args[0], DeviceTensor):
            leaves = list(flat((args[0], args[2:])))
        elsewhere = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, DeviceTensor)]
        is_changed = func._schema.is_mutable and not isinstance(args[0], DeviceTensor)
        if is_changed or any(leaf.ndim > 0 for leaf in elsewhere):  # single numbers may come along
            shapes = [list(leaf.shape) for leaf in elsewhere]
            self._refuse(f"{func}: expected all tensors on the same device, found {shapes} on the CPU")

    def _refuse(self, text: str) -> None:
        self.refused.append(text)
        raise RuntimeError(text)


def flat(values) -> Iterator:
    """What lies in nested lists, tuples and dicts: the arguments of an operation or what it gives."""
    if isinstance(values, (list, tuple)):
        for value in values:
            yield from flat(value)
    elif isinstance(values, dict):
        yield from flat(list(values.values()))
    else:
        yield values


def changed(values, change: Callable):
    """The same nesting with `change` of each; PyTorch's own `tree_map` takes ten times as long."""
    if isinstance(values, (list, tuple)):
        return type(values)([changed(value, change) for value in values])
    if isinstance(values, dict):
        return {key: changed(value, change) for key, value in values.items()}
    return change(values)


def on_cpu(value):
    if isinstance(value, (DeviceTensor, torch.UntypedStorage)):
        return getattr(value, "values", value)
    return CPU if isinstance(value, torch.device) else value


def on_device(value):
    return DeviceTensor(value) if isinstance(value, Tensor) else value


class Lists(TorchFunctionMode):
    """What makes tensors of lists and lists of tensors: PyTorch itself leaves the values of `meta` tensors out."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in (Tensor.__getitem__, Tensor.__setitem__):
            tensor, index, *rest = args
            parts = index if isinstance(index, tuple) else (index,)
            args = tensor, tuple(torch.tensor(part) if isinstance(part, list) else part for part in parts), *rest
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == DEVICE:
            return func(*args, **kwargs | {"device": CPU}).to(DEVICE)
        if func is Tensor.tolist and isinstance(args[0], DeviceTensor):
            return args[0].cpu().tolist()
        return func(*args, **kwargs)


@contextmanager
def other_device(monkeypatch, free: int = FREE):
    """Within it ComfyUI computes on the other device, of which `free` bytes are free.

    Gives its `Device`, whose refusals are errors even if somebody caught them.
    """
    device = Device()
    with monkeypatch.context() as patch, Lists(), device:
        patch.setattr(memory, "get_torch_device", lambda: DEVICE)
        patch.setattr(memory, "vram_state", memory.VRAMState.NORMAL_VRAM)
        if free < FREE:
            patch.setattr(memory, "minimum_inference_memory", lambda: 0)
        for name in ("get_free_memory", "get_total_memory"):
            patch.setattr(memory, name, _told(getattr(memory, name), free))
        patch.setattr(frozen, "HELD", (*frozen.HELD, DeviceTensor))
        try:
            yield device
        finally:
            memory.unload_all_models()
    if device.refused:
        raise AssertionError(f"refused, and caught by somebody: {device.refused}")


def _told(real, free: int):
    """ComfyUI's question for the bytes of a device, answered for the other one."""

    def amount(dev=None, *both, **named):
        if dev is not None and dev != DEVICE:
            return real(dev, *both, **named)
        return (free, free) if any((*both, *named.values())) else free

    return amount


def built(family: str, build=tiny_models.build) -> ModelPatcher:
    """The tiny model, to be loaded to the other device and kept on the CPU, as on a machine with a GPU."""
    return ModelPatcher(build(family).model, DEVICE, CPU)
