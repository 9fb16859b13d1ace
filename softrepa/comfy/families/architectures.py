"""What differs between transformers whose attention sees soft rows as further keys: names of their parts, and time."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from typing import Any

import torch
from comfy.ldm.flux.layers import timestep_embedding
from torch import Tensor, nn

BlockName = tuple[str, int]
"""A block as the network writes it into transformer options: kind and number."""

Modulation = Any
"""What a network's own embedders make of the time of one call."""

KeysValues = tuple[Tensor, Tensor]
"""(B, heads, n, D) each, of as many heads as the block projects to."""


class Architecture(ABC):
    """One class of networks."""

    adds_in_place = False
    """Whether its blocks add to their inputs in place."""
    rotates_fused = False
    """Whether it uses comfy-kitchen's fused rotation in training too."""
    of_all_samples: Collection[str] = ()
    """What it takes one of for all samples of a call, by its keyword."""

    def hooks(self, options: dict) -> dict:
        """Transformer options of a call that it needs besides."""
        return {}

    def is_joint(self, options: dict) -> bool:
        """Whether the attention that is asked for, in a block with rows, is the one that sees them."""
        return True

    @abstractmethod
    def family(self, network) -> str | None:
        """The family's name; None for a network of the class that no family has."""

    @abstractmethod
    def width(self, network) -> int: ...

    def hears_steps(self, network) -> bool:
        """Whether it must be told the steps of a sampling."""
        return False

    @abstractmethod
    def blocks(self, network) -> dict[BlockName, nn.Module]:
        """In the order in which they run."""

    @abstractmethod
    def modulation(self, network, x: Tensor, timestep: Tensor, *args, **kwargs) -> Modulation:
        """From what the network is called with."""

    @abstractmethod
    def keys_values(self, name: BlockName, block, rows: Tensor, modulation: Modulation) -> KeysValues:
        """As a block makes them of rows (B, n, d) in its stream of text."""


def with_heads(projected: Tensor, heads: int) -> Tensor:
    """(B, n, heads * D) -> (B, heads, n, D)."""
    return projected.unflatten(-1, (heads, -1)).transpose(1, 2)


class NextDiT(Architecture):
    """Lumina 2 and Z-Image: one sequence of text and image. Its refiners run before, without a name."""

    def family(self, network) -> str | None:
        if network.clip_text_pooled_proj is not None:  # NewBie's time hears the text as well
            return None
        return "zimage" if len(network.layers[0].adaLN_modulation) == 1 else "lumina2"

    def width(self, network) -> int:
        return network.dim

    def blocks(self, network):
        return {("double", index): block for index, block in enumerate(network.layers)}

    def modulation(self, network, x, timestep, *_, **__):
        return network.t_embedder((1.0 - timestep) * network.time_scale, dtype=x.dtype)

    def keys_values(self, name, block, rows, modulation):
        attention = block.attention
        scale = block.adaLN_modulation(modulation).chunk(4, dim=1)[0]
        seen = block.attention_norm1(rows.to(modulation.dtype)) * (1 + scale.unsqueeze(1))
        groups = attention.n_local_kv_heads
        *_, k, v = attention.qkv(seen).split(
            [attention.head_dim * heads for heads in (attention.n_local_heads, groups, groups)], dim=-1
        )
        return attention.k_norm(with_heads(k, groups)), with_heads(v, groups)


class Krea2(Architecture):
    """Krea 2: one sequence, of which each block makes its modulation from one that all share."""

    def family(self, network) -> str | None:
        return "krea2"

    def width(self, network) -> int:
        return network.first.out_features

    def blocks(self, network):
        return {("single", index): block for index, block in enumerate(network.blocks)}

    def modulation(self, network, x, timestep, *_, **__):
        embedded = timestep_embedding(timestep, network.tdim).unsqueeze(1).to(x.dtype)
        return network.tproj(network.tmlp(embedded))

    def keys_values(self, name, block, rows, modulation):
        attention = block.attn
        scale, shift, *_ = block.mod(modulation)
        seen = (1 + scale) * block.prenorm(rows.to(modulation.dtype)) + shift
        k, v = (with_heads(projected(seen), attention.kvheads) for projected in (attention.wk, attention.wv))
        return attention.qknorm.knorm(k), v


class QwenImage(Architecture):
    """Qwen-Image: text and image in streams of their own, joined in each attention."""

    def family(self, network) -> str | None:
        return "qwenimage"

    def width(self, network) -> int:
        return network.inner_dim

    def blocks(self, network):
        return {("double", index): block for index, block in enumerate(network.transformer_blocks)}

    def modulation(
        self, network, x, timestep, context, attention_mask=None, ref=None, additional_t_cond=None, *_, **__
    ):
        return network.time_text_embed(timestep, x, additional_t_cond)

    def keys_values(self, name, block, rows, modulation):
        attention = block.attn
        first, _ = block.txt_mod(modulation).chunk(2, dim=-1)
        shift, scale, _ = first.unsqueeze(1).chunk(3, dim=-1)
        seen = (1 + scale) * block.txt_norm1(rows.to(modulation.dtype)) + shift
        k, v = (
            with_heads(projected(seen), attention.heads) for projected in (attention.add_k_proj, attention.add_v_proj)
        )
        return attention.norm_added_k(k), v


class Doubles(Architecture):
    """Flux and what descends from it: double blocks with a stream of text, then single blocks with one sequence."""

    adds_in_place = True

    def width(self, network) -> int:
        return network.hidden_size

    def blocks(self, network):
        kinds = {"double": network.double_blocks, "single": network.single_blocks}
        return {(kind, index): block for kind, blocks in kinds.items() for index, block in enumerate(blocks)}

    def keys_values(self, name, block, rows, modulation):
        is_double = name[0] == "double"
        shift, scale = self.shift_scale(name, block, modulation)
        normed = (block.txt_norm1 if is_double else block.pre_norm)(rows.to(scale.dtype))
        seen = (1 + scale) * normed + shift
        projected = block.txt_attn.qkv(seen) if is_double else block.linear1(seen)[..., : 3 * block.hidden_size]
        q, k, v = (with_heads(one, block.num_heads) for one in projected.chunk(3, dim=-1))
        norm = block.txt_attn.norm if is_double else block.norm
        return norm(q, k, v)[1], v

    def shift_scale(self, name, block, modulation) -> KeysValues:
        """(B, 1, d) each, of the block's own modulation."""
        first, _ = (block.txt_mod if name[0] == "double" else block.modulation)(modulation)
        return first.shift, first.scale


class Flux(Doubles):
    """Flux 1 and Flux 2, whose blocks share one modulation."""

    def family(self, network) -> str | None:
        if network.params.global_modulation:
            return "flux2"
        return None if network.vector_in is None else "flux"  # LongCat-Image has no pooled text

    def modulation(self, network, x, timestep, context, y=None, guidance=None, *_, **__):
        time = network.time_in(timestep_embedding(timestep, 256).to(x.dtype))
        if network.params.guidance_embed and guidance is not None:
            time = time + network.guidance_in(timestep_embedding(guidance, 256).to(x.dtype))
        if network.vector_in is not None:
            width = network.params.vec_in_dim
            pooled = x.new_zeros(len(x), width) if y is None else y[:, :width]
            time = time + network.vector_in(pooled)
        if not network.params.global_modulation:
            return time
        return {"double": network.double_stream_modulation_txt(time), "single": network.single_stream_modulation(time)}

    def shift_scale(self, name, block, modulation):
        if not isinstance(modulation, dict):
            return super().shift_scale(name, block, modulation)
        first, _ = modulation[name[0]]
        return first.shift, first.scale


class Chroma(Doubles):
    """Chroma: one small network makes the modulation of all blocks."""

    def family(self, network) -> str | None:
        return "chroma"

    def modulation(self, network, x, timestep, context, guidance, *_, **__):
        count = 344  # as Chroma's own forward has it
        given = [timestep_embedding(one, 16).to(x.dtype) for one in (timestep, guidance)]
        index = timestep_embedding(torch.arange(count, device=x.device), 32).to(x.dtype).expand(len(x), -1, -1)
        of_all = torch.cat([torch.cat(given, dim=1).unsqueeze(1).expand(-1, count, -1), index], dim=-1)
        vectors = network.distilled_guidance_layer(of_all)
        return lambda kind, index: network.get_modulations(vectors, kind, idx=index)

    def shift_scale(self, name, block, modulation):
        kind, index = name
        found = modulation("double_txt", index)[0] if kind == "double" else modulation("single", index)
        return found.shift, found.scale


class HunyuanImage(Doubles):
    """HunyuanImage 2.1; HunyuanVideo and the refiner are networks of the same class for latents with a time axis."""

    of_all_samples = ("attention_mask",)

    def family(self, network) -> str | None:
        return "hunyuanimage" if len(network.patch_size) == 2 else None

    def hears_steps(self, network) -> bool:
        return network.time_r_in is not None

    def modulation(self, network, x, timestep, context, y=None, byt5=None, clip=None, guidance=None, *rest, **more):
        time = network.time_in(timestep_embedding(timestep, 256, time_factor=1.0).to(x.dtype))
        options = more.get("transformer_options") or next((one for one in rest if isinstance(one, dict)), {})
        if network.time_r_in is not None and (aim := next_time(options)) is not None:
            aim = aim.unsqueeze(0).to(timestep)
            embedded = network.time_r_in(timestep_embedding(aim, 256, time_factor=1000.0).to(x.dtype))
            time = time + embedded if network.params.meanflow_sum else (time + embedded) / 2
        if network.params.guidance_embed and guidance is not None:
            time = time + network.guidance_in(timestep_embedding(guidance, 256).to(x.dtype))
        return time


class Anima(Architecture):
    """Anima: text that blocks attend to apart from the image. Rows are of its width and not modulated, as it is not."""

    rotates_fused = True

    def family(self, network) -> str | None:
        return "anima"

    def width(self, network) -> int:
        return network.blocks[0].cross_attn.context_dim

    def blocks(self, network):
        return {(None, index): block for index, block in enumerate(network.blocks)}

    def modulation(self, network, x, timestep, *_, **__):
        return None

    def hooks(self, options):
        patches = options.get("patches", {})
        return {CROSSING: [], "patches": patches | {"attn2_patch": [*patches.get("attn2_patch", []), crosses]}}

    def is_joint(self, options):
        announced = bool(options[CROSSING])
        options[CROSSING].clear()
        return announced

    def keys_values(self, name, block, rows, modulation):
        attention = block.cross_attn
        k, v = (with_heads(projected(rows), attention.n_heads) for projected in (attention.k_proj, attention.v_proj))
        return attention.k_norm(k), attention.v_norm(v)


CROSSING = "softrepa_crossing"
"""Key of a list in transformer options that holds something while a block attends to the text."""


@torch.compiler.disable
def crosses(q, k, v, pe=None, attn_mask=None, extra_options=None) -> dict:
    """attn2 patch of Anima's own kind that changes nothing: the next attention is the one to the text."""
    extra_options[CROSSING].append(True)
    return {}


def next_time(options: dict) -> Tensor | None:
    """The noise level that a step of sampling ends at, which distilled models hear besides its own."""
    steps = options["sample_sigmas"]
    here = (steps == options["sigmas"][0]).nonzero().flatten()
    return steps[here[0] + 1] if len(here) else None


ARCHITECTURES: Mapping[str, Architecture] = {
    "comfy.ldm.lumina.model.NextDiT": NextDiT(),
    "comfy.ldm.krea2.model.SingleStreamDiT": Krea2(),
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": QwenImage(),
    "comfy.ldm.flux.model.Flux": Flux(),
    "comfy.ldm.chroma.model.Chroma": Chroma(),
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": HunyuanImage(),
    "comfy.ldm.anima.model.Anima": Anima(),
}
"""By the class of the network."""
