"""Guided predictions of one prompt pair, or of two in one batch."""

import math
from collections import defaultdict
from collections.abc import Sequence
from uuid import uuid4

import comfy.model_management as memory
import torch
from comfy.samplers import CFGGuider, calc_cond_batch, sampling_function
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from ...editing.methods import Method
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
        """D of x (B, C, ...) at one sigma."""
        return self(x, sigma * x.new_ones(len(x)), self.extra_args["model_options"], self.extra_args.get("seed"))

    def guided(self, x: Tensor, timestep: Tensor, predictions: Sequence[Tensor], model_options: dict, seed) -> Tensor:
        """D of x by what the network predicts for the positive and the negative prompt."""
        options = model_options | {"sampler_calc_cond_batch_function": lambda args: list(predictions)}
        negative, positive = self.conds["negative"], self.conds["positive"]
        return sampling_function(
            self.inner_model, x, timestep, negative, positive, self.cfg, model_options=options, seed=seed
        )

    @property
    def skips_negative(self) -> bool:
        """Whether guidance 1 leaves the negative half out, as ComfyUI decides it."""
        return math.isclose(self.cfg, 1.0) and not self.model_options.get("disable_cfg1_optimization", False)


class Stack(Pass):
    """Source and target as one batch: [zs ; zt] (2B, C, ...), every cond the two passes' conds row by row."""

    def __init__(self, source: Pass, target: Pass, conds: dict[str, dict]):
        named = {f"{name}_{role}": one.conds[role] for name, one in self._named(source, target) for role in ROLES}
        super().__init__(source, {role: [cond] for role, cond in conds.items()} | named, target.cfg, source.extra_args)
        self.passes = (source, target)

    @staticmethod
    def _named(source: Pass, target: Pass):
        return ("source", source), ("target", target)

    @classmethod
    def of(cls, source: Pass, target: Pass, batch: int) -> "Stack | None":
        """None unless the two passes' conds go together row by row."""
        if source.skips_negative != target.skips_negative:
            return None
        found = {role: stacked(batch, source.conds[role], target.conds[role]) for role in ROLES}
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
        guided = [
            one.guided(z, t, half, model_options, seed)
            for one, z, t, half in zip(self.passes, x.chunk(2), timestep.chunk(2), halves, strict=True)
        ]
        return torch.cat(guided)

    def fits(self, z: Tensor) -> bool:
        """Whether memory holds the whole batch, by ComfyUI's own measure; z (B, C, ...)."""
        roles = ROLES[:1] if self.skips_negative else ROLES
        return self._fits(2 * len(roles), roles, z)

    def _fits(self, times: int, roles: Sequence[str], z: Tensor) -> bool:
        """Whether memory holds `times` the images in z, with the conds of these roles."""
        cond_shapes = defaultdict(list)
        for role in roles:
            for name, cond in self.conds[role][0]["model_conds"].items():
                cond_shapes[name].append(cond.size())
        shape = [times * len(z), *z.shape[1:]]
        free = getattr(self.model_patcher, "get_free_memory", memory.get_free_memory)(z.device)
        return self.inner_model.memory_required(shape, cond_shapes=cond_shapes) * 1.5 < free


class UnguidedSource(Stack):
    """A source without guidance and a target with it, as one batch: [zs ; zt ; zt] (3B, C, ...) of one role."""

    @classmethod
    def of(cls, source: Pass, target: Pass, batch: int) -> "Stack | None":
        """None unless the three conds go together row by row and nothing asks which of them is negative."""
        tokens = source.model_patcher.get_attachment(KEY)
        if not source.skips_negative or target.skips_negative or (tokens is not None and tokens.has_roles):
            return None
        three = stacked(batch, source.conds["positive"], target.conds["positive"], target.conds["negative"])
        return None if three is None else cls(source, target, {"positive": three})

    def both(self, zs: Tensor, zt: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
        d_source, d_target = self.denoise(torch.cat([zs, zt, zt]), sigma).chunk(2)
        return d_source, d_target

    def predict_noise(self, x, timestep, model_options={}, seed=None):
        """One forward for all three, then each pass guides its own: (2B, C, ...)."""
        (predictions,) = calc_cond_batch(self.inner_model, [self.conds["positive"]], x, timestep, model_options)
        plain, positive, negative = predictions.chunk(3)
        (zs, zt, _), (t, *_) = x.chunk(3), timestep.chunk(3)
        source, target = self.passes
        d_source = source.guided(zs, t, (plain, torch.zeros_like(plain)), model_options, seed)
        return torch.cat([d_source, target.guided(zt, t, (positive, negative), model_options, seed)])

    def fits(self, z: Tensor) -> bool:
        return self._fits(3, ROLES[:1], z)


def stack_of(source: Pass, target: Pass, batch: int, method: Method) -> Stack | None:
    """None unless one batch is sure to give what two forwards give."""
    if source.model_patcher is not target.model_patcher or not has_plain_options(source):
        return None
    # FlowEdit's guidance 1 for the source alone stays two forwards, whose last digits its edits have had all along
    kinds = (Stack,) if method.source_cfg is None else (Stack, UnguidedSource)
    return next((stack for kind in kinds if (stack := kind.of(source, target, batch)) is not None), None)


def stacked(batch: int, *lists: list[dict]) -> dict | None:
    """One cond of `batch` rows for each list, or None where they are not single plain conds of one shape."""
    if any(len(conds) != 1 for conds in lists):
        return None
    first, *others = (cond for (cond,) in lists)
    if any(cond.get(key) is not None for cond in (first, *others) for key in NOT_PLAIN):
        return None
    if any(cond["model_conds"].keys() != first["model_conds"].keys() for cond in others):
        return None
    model_conds = {}
    for name, given in first["model_conds"].items():
        one = given.process_cond(batch_size=batch, area=None)
        rest = [cond["model_conds"][name].process_cond(batch_size=batch, area=None) for cond in others]
        if not all(one.can_concat(cond) for cond in rest):
            return None
        model_conds[name] = one._copy_with(one.concat(rest))
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
