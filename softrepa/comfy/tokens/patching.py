"""Soft tokens on a MODEL: one patch per model that holds every token set, by model-patcher hooks only.

Before each call of the network a wrapper works out the rows of every block for the timestep of that very call, and puts
hooks that insert them (`families`) into that call's own options, behind what other nodes have put there, in
whatever order the nodes stand. Nothing is kept on the shared model.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID, uuid4
from weakref import ref

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key
from comfy_api.torch_helpers.torch_compile import COMPILE_KEY
from torch import Tensor

from ...errors import SoftREPAError
from ...families import Blocks
from ...numbers import FROM_0, SHARE, check_number
from ...tokens import SoftTokens
from ..families import adapter_of, model_shape, network_of
from ..families.noising import percent
from ..families.noising import timestep as timestep_at
from ..models import check_fit, chosen_blocks
from .attention import OVERRIDE, Asked, SoftKeyBias
from .call_state import KEY, CallState, Entries, Place
from .curve import StrengthCurve

ROLES_OPTION = "softrepa_roles"

APPLY_TO = ("both", "positive", "negative")
BANKS = ("positive", "negative")


@dataclass(frozen=True)
class TokenSet:
    """One token file and how it acts. Raises SoftREPAError for options out of range.

    strength: what the soft keys' attention weights are multiplied by, 0 or more. start_percent, end_percent: shares of
    the sampling, 0 to 1, as ComfyUI calls them. curve: what multiplies strength over the sampling.
    """

    tokens: SoftTokens
    blocks: Blocks
    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    apply_to: str = "both"
    uncond_bank: str = "positive"
    curve: StrengthCurve | None = None

    def __post_init__(self):
        label = self.tokens.label
        check_number(f"{label}: strength", self.strength, FROM_0)
        for name in ("start_percent", "end_percent"):
            check_number(f"{label}: {name}", getattr(self, name), SHARE)
        if self.start_percent > self.end_percent:
            raise SoftREPAError(
                f"{label}: start_percent is {self.start_percent}, expected at most end_percent, {self.end_percent}."
            )
        if self.apply_to not in APPLY_TO:
            raise SoftREPAError(f'{label}: apply_to is "{self.apply_to}", expected one of {", ".join(APPLY_TO)}.')
        if self.uncond_bank not in BANKS:
            raise SoftREPAError(f'{label}: uncond_bank is "{self.uncond_bank}", expected one of {", ".join(BANKS)}.')
        if self.uncond_bank == "negative" and self.tokens.negative_tokens is None:
            raise SoftREPAError(f'{label}: uncond_bank is "negative", but the file has one bank; expected "positive".')

    @property
    def is_windowed(self) -> bool:
        return self.start_percent > 0 or self.end_percent < 1

    @property
    def varies(self) -> bool:
        """Whether its weight depends on the step or the sample, or is not 1."""
        return self.is_windowed or self.has_roles or self.strength != 1 or self.curve is not None

    @property
    def has_roles(self) -> bool:
        return self.apply_to != "both" or self.uncond_bank == "negative"

    def strength_for(self, negative: bool) -> float:
        """Strength on a cond of that role."""
        return self.strength if self.apply_to in ("both", BANKS[negative]) else 0.0


def apply_tokens(
    model: ModelPatcher,
    tokens: SoftTokens,
    strength: float = 1.0,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    apply_to: str = "both",
    blocks: str = "auto",
    uncond_bank: str = "positive",
    strength_curve: object = None,
) -> ModelPatcher:
    """A clone of `model` on which `tokens` act, beside those already there (spec: strength 1 is the reference).

    strength_curve: a CURVE of ComfyUI, by the share of the sampling. Raises SoftREPAError where tokens, model and
    options do not fit together.
    """
    shape = model_shape(model)
    check_fit(tokens, shape)
    curve = None if strength_curve is None else StrengthCurve.of(strength_curve, f"{tokens.label}: strength_curve")
    added = TokenSet(
        tokens, chosen_blocks(tokens, blocks), strength, start_percent, end_percent, apply_to, uncond_bank, curve
    )
    patched = model.clone()
    if strength > 0:
        before = model.get_attachment(KEY)
        sets = (*before.sets, added) if before else (added,)
        refuse_two_in_padding(sets)
        SoftTokenPatch(sets).install(patched)
    return patched


def refuse_two_in_padding(sets: Sequence[TokenSet]) -> None:
    labels = [one.tokens.label for one in sets if one.tokens.splice is not None]
    if len(labels) > 1:
        raise SoftREPAError(
            f"{labels[-1]} take the place of the text's padding, which {labels[0]} have taken, expected one such set "
            "on a model."
        )


class SoftTokenPatch:
    """All token sets of one MODEL, in node order, and the hooks that insert them."""

    def __init__(self, sets: tuple[TokenSet, ...]):
        self.sets = sets
        self.adapter = adapter_of(sets[0].tokens.family)
        self._moved: dict[torch.device, tuple[SoftTokens, ...]] = {}
        self._asked: Asked | None = None
        self._blocks = 0
        self._is_started = False
        self._sampling: ref[Tensor] | None = None

    @property
    def label(self) -> str:
        return self.sets[-1].tokens.label

    @property
    def has_roles(self) -> bool:
        return any(token_set.has_roles for token_set in self.sets)

    def __deepcopy__(self, memo):
        """Shared by all clones: ComfyUI 0.3.75 deep-copies model options, newer ones copy lists and dicts only."""
        return self

    def install(self, model: ModelPatcher) -> None:
        """Puts the wrappers on `model` in place of those of a patch before."""
        self._blocks = len(self.adapter.blocks(network_of(model)))
        model.set_attachments(KEY, self)
        options = model.model_options
        for wrappers in options["transformer_options"].get("wrappers", {}).values():
            wrappers.pop(KEY, None)
        # In the model options, not on the patcher: whoever calls the network with these options runs them too.
        if self.has_roles:
            add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, name_roles, options, is_model_options=True)
        add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, self.note_start, options, is_model_options=True)
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self.before_network, options, is_model_options=True)
        self.adapter.guard(
            model, tuple({place: None for one in self.sets for place in self.adapter.places(one.blocks)})
        )

    def before_network(
        self, executor, x, t, c_concat=None, c_crossattn=None, control=None, transformer_options={}, **kwargs
    ):
        """APPLY_MODEL wrapper: leaves this call's rows and hooks in a copy of `transformer_options`."""
        base_model = executor.class_obj
        options = transformer_options.copy()
        negative = negative_rows(options.pop(ROLES_OPTION, {}), options.get("uuids", ()), len(x))
        # ComfyUI's compile node drops guards on transformer_options, so there what is inserted must never change.
        is_compiled = COMPILE_KEY in options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
        state = self.state(base_model, t, negative, is_fixed=is_compiled)
        if len(state.blocks) != self._blocks:
            raise SoftREPAError(
                f"{self.label}: another node gives the model {len(state.blocks)} blocks, expected its own "
                f"{self._blocks}; remove that node."
            )
        state.is_watched = self._begins(options.get("sample_sigmas"), t)
        if state.weighs:
            self.adapter.refuse_unweighable(options, state)
            state.attention = self._weighing(options)
            options[OVERRIDE] = state.attention
        options[KEY] = state
        options = self.adapter.inserting(options, state)
        return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

    def _begins(self, steps: Tensor | None, sigma: Tensor) -> bool:
        """Whether this is a sampling's first call, in which no node that reuses steps leaves blocks out."""
        if steps is None:
            return False
        is_new = self._is_started or self._sampling is None or self._sampling() is not steps
        self._is_started, self._sampling = False, ref(steps)
        return is_new and math.isclose(float(sigma.flatten()[0]), float(steps[0]), rel_tol=1e-4)

    def note_start(self, executor, *args, **kwargs):
        """OUTER_SAMPLE wrapper: another sampling begins, perhaps with the very sigmas of the one before."""
        self._is_started = True
        return executor(*args, **kwargs)

    def _weighing(self, options: dict) -> SoftKeyBias:
        """What gives attention its biases, above an override that is there already."""
        override = options.get(OVERRIDE)
        if override is None:
            return SoftKeyBias()
        if self._asked is None or self._asked.override is not override:
            self._asked = Asked(override)
        return SoftKeyBias(self._asked, self.label)

    def state(self, base_model, sigma: Tensor, negative: Sequence[bool], is_fixed: bool = False) -> CallState:
        """Rows and biases of every place for sigma (B,) and the roles of the B samples.

        Sets that do not act in this call are left out or, where `is_fixed`, inserted with weight 0.
        """
        rows: dict[Place, list[Tensor]] = {}
        strengths: dict[Place, list[list[float]]] = {}
        padding: dict[Place, int] = {}
        device = sigma.device
        sigma = sigma.expand(len(negative))
        timestep = timestep_at(base_model.model_sampling, sigma)
        for token_set, tokens in zip(self.sets, self._on(device), strict=True):
            share = share_of_strength(token_set, base_model.model_sampling, sigma)
            per_sample = [token_set.strength_for(is_negative) * share for is_negative in negative]
            if not any(per_sample) and not is_fixed:
                continue
            layers = self._rows(base_model, token_set, tokens, timestep, negative)
            for place in self.adapter.places(token_set.blocks):
                rows.setdefault(place, []).append(layers[:, self.adapter.layer(place)])
                columns = strengths.setdefault(place, [])
                columns.extend([per_sample] * tokens.count)
                if tokens.splice is not None:
                    columns[:0] = [[max(0.0, 1.0 - strength) for strength in per_sample]] * tokens.count
                    padding[place] = tokens.count
        dtype = compute_dtype(base_model)

        def made_for(entries: Entries) -> CallState:
            samples = torch.tensor([sample for sample, _ in entries], device=device)
            return self.state(base_model, sigma[samples], [is_negative for _, is_negative in entries], is_fixed)

        state = CallState(
            self.label,
            timestep,
            negative,
            rows={
                place: (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).to(dtype) for place, parts in rows.items()
            },
            padding=padding,
            blocks=self.adapter.blocks(base_model.diffusion_model),
            has_roles=self.has_roles,
            made_for=made_for,
        )
        varies = is_fixed and any(token_set.varies for token_set in self.sets)
        if varies or any(strength != 1 for columns in strengths.values() for column in columns for strength in column):
            # log(0) = -inf: the soft keys do not exist for samples of the other role
            state.bias = biases(strengths, device)
        return state

    def _rows(self, base_model, token_set: TokenSet, tokens: SoftTokens, timestep, negative: Sequence[bool]) -> Tensor:
        """(B, L, m, d), the negative bank for samples that ask for it."""

        def embed(rows: Tensor) -> Tensor:
            embedder = self.adapter.embedder(base_model.diffusion_model)
            return rows if embedder is None else embedder(rows.to(compute_dtype(base_model))).float()

        rows = tokens.at(timestep, embed=embed)
        if token_set.uncond_bank == "negative" and any(negative):
            chosen = torch.tensor(negative, device=rows.device)[:, None, None, None]
            rows = torch.where(chosen, tokens.at(timestep, negative=True, embed=embed), rows)
        return rows

    def _on(self, device: torch.device) -> tuple[SoftTokens, ...]:
        if device not in self._moved:
            self._moved[device] = tuple(token_set.tokens.to(device) for token_set in self.sets)
        return self._moved[device]


def biases(strengths: dict[Place, list[list[float]]], device: torch.device) -> dict[Place, Tensor]:
    """log(strength) by place, (B, n) from n columns of B values; places with equal columns share one tensor."""
    made: dict[tuple, Tensor] = {}
    for columns in strengths.values():
        key = tuple(map(tuple, columns))
        if key not in made:
            made[key] = torch.tensor(columns, dtype=torch.float32).T.log().to(device)
    return {place: made[tuple(map(tuple, columns))] for place, columns in strengths.items()}


def compute_dtype(base_model) -> torch.dtype:
    """What the network computes in (`get_dtype_inference` is not in ComfyUI 0.3.75 yet)."""
    return base_model.manual_cast_dtype or base_model.get_dtype()


def in_window(token_set: TokenSet, model_sampling, sigma: Tensor) -> bool:
    """ComfyUI's sampling window: sigma(end_percent) <= sigma <= sigma(start_percent)."""
    if not token_set.is_windowed:
        return True
    first = sigma.flatten()[0]  # compared as a tensor, in its own precision, as ComfyUI does for conds
    start, end = (model_sampling.percent_to_sigma(p) for p in (token_set.start_percent, token_set.end_percent))
    return not bool((first > start) | (first < end))


def share_of_strength(token_set: TokenSet, model_sampling, sigma: Tensor) -> float:
    """What multiplies a set's strength in a call at sigma: its curve within its window, 0 outside."""
    if not in_window(token_set, model_sampling, sigma):
        return 0.0
    return 1.0 if token_set.curve is None else token_set.curve.at(percent(model_sampling, sigma.flatten()[0]))


def name_roles(executor, x, timestep, model_options={}, seed=None):
    """PREDICT_NOISE wrapper: tells the network's wrapper which cond plays which role, by the cond's uuid."""
    roles: dict[UUID, bool] = {}
    for name, conds in executor.class_obj.conds.items():
        for cond in conds or ():
            is_negative = "negative" in name
            if roles.get(cond["uuid"], is_negative) != is_negative:
                # ComfyUI cuts a cond to another role's area by copying that other cond, uuid included
                cond["uuid"] = uuid4()
            roles[cond["uuid"]] = is_negative
    model_options = model_options.copy()
    model_options["transformer_options"] = model_options.get("transformer_options", {}) | {ROLES_OPTION: roles}
    return executor(x, timestep, model_options, seed)


def negative_rows(roles: dict[UUID, bool], uuids, batch: int) -> list[bool]:
    """Whether each sample of the batch is a negative.

    Under a guider a cond it does not know (Perp-Neg's own empty prompt, say) is an unconditional one; without a
    guider there are no roles and every sample is positive.
    """
    if not roles or not uuids:
        return [False] * batch
    repeats, rest = divmod(batch, len(uuids))
    if rest or not repeats:
        raise SoftREPAError(
            f"The network got {batch} samples for {len(uuids)} prompts, expected as many for each: another node splits "
            "the batch, and only apply_to both with uncond_bank positive works with it."
        )
    return [roles.get(uuid, True) for uuid in uuids for _ in range(repeats)]
