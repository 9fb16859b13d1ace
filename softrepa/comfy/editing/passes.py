"""Guided predictions of one prompt pair, or of two in one batch."""

import math
from collections import defaultdict
from uuid import uuid4

import comfy.model_management as memory
import torch
from comfy.samplers import CFGGuider, calc_cond_batch, sampling_function
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from ..families import is_guard
from ..tokens.call_state import KEY

ROLES = ("positive", "negative")

NOT_PLAIN = ("area", "mask", "strength", "control", "gligen", "hooks", "default", "timestep_start", "timestep_end")
"""What ComfyUI reads of a cond besides its tensors."""

FOREIGN = (
    "sampler_calc_cond_batch_function",
    "model_function_wrapper",
    "context_handler",
    "multigpu_clones",
    "registered_hooks",
)
"""Model options that see the batch as a whole."""


class Pass(CFGGuider):
    """The prediction of one pair of processed conds, {"positive": ..., "negative": ...}, at its own guidance scale.

    A guider in its own right: wrappers and patches see it as they see any other. `prepared` is the one that is
    sampling, with its model loaded and its options merged.
    """

    def __init__(self, prepared: CFGGuider, conds: dict[str, list[dict]], cfg: float, extra_args: dict):
        super().__init__(prepared.model_patcher)
        self.model_options = prepared.model_options
        self.inner_model = prepared.inner_model
        self.loaded_models = prepared.loaded_models
        self.conds, self.cfg, self.extra_args = conds, cfg, extra_args

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """D of x (B, C, H, W) at one sigma."""
        return self(x, sigma * x.new_ones(len(x)), self.extra_args["model_options"], self.extra_args.get("seed"))

    @property
    def skips_negative(self) -> bool:
        """Whether guidance 1 leaves the negative half out, as ComfyUI decides it."""
        return math.isclose(self.cfg, 1.0) and not self.model_options.get("disable_cfg1_optimization", False)


class Stack(Pass):
    """Source and target as one batch: [zs ; zt] (2B, C, H, W), every cond the two passes' conds row by row."""

    def __init__(self, source: Pass, target: Pass, conds: dict[str, dict]):
        named = {f"{name}_{role}": one.conds[role] for name, one in self._named(source, target) for role in ROLES}
        super().__init__(source, {role: [cond] for role, cond in conds.items()} | named, target.cfg, source.extra_args)
        self.passes = (source, target)

    @staticmethod
    def _named(source: Pass, target: Pass):
        return ("source", source), ("target", target)

    @classmethod
    def of(cls, source: Pass, target: Pass, batch: int) -> "Stack | None":
        """None unless one batch is sure to give what two forwards give."""
        if source.model_patcher is not target.model_patcher or source.skips_negative != target.skips_negative:
            return None
        if not has_plain_options(source):
            return None
        found = {role: stacked(source.conds[role], target.conds[role], batch) for role in ROLES}
        conds = {role: cond for role, cond in found.items() if cond is not None}
        return cls(source, target, conds) if len(conds) == len(found) else None

    def both(self, zs: Tensor, zt: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        d_source, d_target = self.denoise(torch.cat([zs, zt]), sigma).chunk(2)
        return d_source, d_target

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        """One forward for all halves, then each pass guides its own."""
        roles = [self.conds["positive"], None if self.skips_negative else self.conds["negative"]]
        predictions = calc_cond_batch(self.inner_model, roles, x, timestep, model_options)
        halves = zip(*(prediction.chunk(2) for prediction in predictions), strict=True)
        guided = []
        for one, z, t, half in zip(self.passes, x.chunk(2), timestep.chunk(2), halves, strict=True):
            options = model_options | {"sampler_calc_cond_batch_function": lambda args, half=half: list(half)}
            guided.append(
                sampling_function(
                    self.inner_model,
                    z,
                    t,
                    one.conds["negative"],
                    one.conds["positive"],
                    one.cfg,
                    model_options=options,
                    seed=seed,
                )
            )
        return torch.cat(guided)

    def fits(self, z: Tensor) -> bool:
        """Whether memory holds the whole batch, by ComfyUI's own measure; z (B, C, H, W)."""
        roles = ROLES[:1] if self.skips_negative else ROLES
        cond_shapes = defaultdict(list)
        for role in roles:
            for name, cond in self.conds[role][0]["model_conds"].items():
                cond_shapes[name].append(cond.size())
        shape = [2 * len(roles) * len(z), *z.shape[1:]]
        free = getattr(self.model_patcher, "get_free_memory", memory.get_free_memory)(z.device)
        return self.inner_model.memory_required(shape, cond_shapes=cond_shapes) * 1.5 < free


def stacked(source: list[dict], target: list[dict], batch: int) -> dict | None:
    """One cond of 2 * batch rows, or None where the two are not single plain conds of one shape."""
    if len(source) != 1 or len(target) != 1:
        return None
    (first,), (second,) = source, target
    if any(cond.get(key) is not None for cond in (first, second) for key in NOT_PLAIN):
        return None
    if first["model_conds"].keys() != second["model_conds"].keys():
        return None
    model_conds = {}
    for name in first["model_conds"]:
        a, b = (cond["model_conds"][name].process_cond(batch_size=batch, area=None) for cond in (first, second))
        if not a.can_concat(b):
            return None
        model_conds[name] = a._copy_with(a.concat([b]))
    return {"model_conds": model_conds, "uuid": uuid4()}


def has_plain_options(one: Pass) -> bool:
    """Whether nothing but soft tokens, guidance functions and torch.compile acts on the model.

    Other packs' patches may count the images of a batch or keep what they saw for the guidance function.
    """
    options = one.model_options
    transformer = options.get("transformer_options", {})
    wrapper_keys = {
        key
        for wrappers in transformer.get("wrappers", {}).values()
        for key, functions in wrappers.items()
        if len(functions) > 0
    }
    patches = [patch for patches in transformer.get("patches", {}).values() for patch in patches]
    replacements = [patch for patches in transformer.get("patches_replace", {}).values() for patch in patches.values()]
    return (
        all(options.get(key) is None for key in FOREIGN)
        and not one.model_patcher.injections
        and wrapper_keys <= {KEY, COMPILE_KEY}
        and all(map(is_guard, patches + replacements))
    )
