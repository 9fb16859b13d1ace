"""Tiny seeded models of every family, built inside ComfyUI, and the three of the golden vectors.

Every weight of these is drawn from its own diffusers name, so any implementation can rebuild it.
"""

import hashlib

import comfy.conds
import comfy.model_base
import comfy.model_detection
import comfy.ops
import comfy.supported_models
import comfy.utils
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import Timestep
from comfy.model_patcher import ModelPatcher

CPU = torch.device("cpu")
CHANNELS = {
    "sd15": 4,
    "sdxl": 4,
    "sd3": 16,
    "lumina2": 16,
    "zimage": 16,
    "flux": 16,
    "chroma": 16,
    "qwenimage": 16,
    "flux2": 128,
    "krea2": 16,
    "hunyuanimage": 64,
    "anima": 16,
}
WIDTH = {
    "sd15": 768,
    "sdxl": 2048,
    "sd3": 4096,
    "lumina2": 2304,
    "zimage": 2560,
    "flux": 4096,
    "chroma": 4096,
    "qwenimage": 3584,
    "flux2": 7680,
    "krea2": 30720,
    "hunyuanimage": 3584,
    "anima": 1024,
}
LENGTH = {"sd15": 77, "sdxl": 77, "sd3": 24}
"""Of a text; a few tokens elsewhere. SD3's own is 154 and takes three times as long."""
GOLDEN_LENGTH = LENGTH | {"sd3": 154}
POOLED = {"sdxl": 1280, "sd3": 2048, "flux": 768}
"""Width of the pooled text, where there is one."""
HIDDEN = {
    "sd3": 128,
    "lumina2": 96,
    "zimage": 256,
    "flux": 128,
    "chroma": 128,
    "qwenimage": 128,
    "flux2": 128,
    "krea2": 128,
    "hunyuanimage": 128,
    "anima": 1024,
}
"""Width of the tokens of a transformer."""
HAS_TIME_AXIS = ("qwenimage", "krea2", "anima")
"""Families whose latents are those of videos, (B, C, 1, H, W) for stills."""


def latent_shape(family: str, size: tuple[int, int] = (8, 8)) -> tuple[int, ...]:
    """(C, H, W), or (C, 1, H, W)."""
    return (CHANNELS[family], *((1,) if family in HAS_TIME_AXIS else ()), *size)


_DOUBLES = {
    "in_channels": 16,
    "hidden_size": 128,
    "num_heads": 2,
    "depth": 2,
    "depth_single_blocks": 2,
    "axes_dim": [16, 24, 24],
    "theta": 10000,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "context_in_dim": 4096,
    "txt_ids_dims": [],
    "patch_size": 2,
    "out_channels": 16,
}
TRANSFORMERS = {
    "lumina2": (
        "Lumina2",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 96,
            "cap_feat_dim": 2304,
            "n_layers": 4,
            "qk_norm": True,
            "n_heads": 4,
            "n_kv_heads": 2,
            "axes_dims": [8, 8, 8],
            "axes_lens": [300, 512, 512],
            "rope_theta": 10000.0,
            "ffn_dim_multiplier": 1.0,
        },
    ),
    "zimage": (
        "ZImage",
        {
            "image_model": "lumina2",
            "patch_size": 2,
            "in_channels": 16,
            "dim": 256,
            "cap_feat_dim": 2560,
            "n_layers": 4,
            "qk_norm": True,
            "n_heads": 4,
            "n_kv_heads": 4,
            "axes_dims": [16, 24, 24],
            "axes_lens": [1536, 512, 512],
            "rope_theta": 256.0,
            "ffn_dim_multiplier": 1.0,
            "z_image_modulation": True,
            "time_scale": 1000.0,
            "pad_tokens_multiple": 32,
        },
    ),
    "flux": ("Flux", _DOUBLES | {"image_model": "flux", "guidance_embed": True, "vec_in_dim": 768}),
    "chroma": (
        "Chroma",
        _DOUBLES
        | {
            "image_model": "chroma",
            "in_channels": 64,
            "out_channels": 64,
            "vec_in_dim": None,
            "in_dim": 64,
            "out_dim": 128,
            "hidden_dim": 64,
            "n_layers": 2,
        },
    ),
    "qwenimage": (
        "QwenImage",
        {
            "image_model": "qwen_image",
            "in_channels": 64,
            "num_layers": 4,
            "attention_head_dim": 64,
            "num_attention_heads": 2,
            "axes_dims_rope": [16, 24, 24],
        },
    ),
    "flux2": (
        "Flux2",
        _DOUBLES
        | {
            "image_model": "flux2",
            "in_channels": 128,
            "out_channels": 128,
            "context_in_dim": 7680,
            "axes_dim": [16, 16, 16, 16],
            "theta": 2000,
            "mlp_ratio": 3.0,
            "patch_size": 1,
            "txt_ids_dims": [3],
            "global_modulation": True,
            "mlp_silu_act": True,
            "qkv_bias": False,
            "ops_bias": False,
            "default_ref_method": "index",
            "ref_index_scale": 10.0,
            "guidance_embed": False,
            "vec_in_dim": None,
        },
    ),
    "krea2": (
        "Krea2",
        {
            "image_model": "krea2",
            "features": 128,
            "channels": 16,
            "patch": 2,
            "layers": 4,
            "heads": 4,
            "kvheads": 2,
            "tdim": 64,
            "txtlayers": 480,  # the real one has 12 layers of width 2560, as many numbers in all
            "txtdim": 64,
            "txtheads": 4,
            "txtkvheads": 4,
            "multiplier": 1,
        },
    ),
    "hunyuanimage": (
        "HunyuanImage21",
        {
            "image_model": "hunyuan_video",
            "in_channels": 64,
            "out_channels": 64,
            "patch_size": [1, 1],
            "vec_in_dim": None,
            "axes_dim": [32, 32],
            "meanflow": False,
            "context_in_dim": 3584,
            "hidden_size": 128,
            "mlp_ratio": 4.0,
            "num_heads": 2,
            "depth": 2,
            "depth_single_blocks": 2,
            "theta": 256,
            "qkv_bias": True,
            "byt5": False,
            "guidance_embed": False,
            "use_cond_type_embedding": False,
            "vision_in_dim": None,
            "meanflow_sum": False,
        },
    ),
    "anima": (
        "Anima",
        {
            "image_model": "anima",
            "max_img_h": 240,
            "max_img_w": 240,
            "max_frames": 128,
            "in_channels": 16,
            "out_channels": 16,
            "patch_spatial": 2,
            "patch_temporal": 1,
            "model_channels": 128,
            "concat_padding_mask": True,
            "crossattn_emb_channels": 1024,
            "pos_emb_cls": "rope3d",
            "pos_emb_learnable": True,
            "pos_emb_interpolation": "crop",
            "use_adaln_lora": True,
            "adaln_lora_dim": 16,
            "num_blocks": 3,
            "num_heads": 2,
            "extra_per_block_abs_pos_emb": False,
            "rope_h_extrapolation_ratio": 4.0,
            "rope_w_extrapolation_ratio": 4.0,
            "rope_enable_fps_modulation": False,
        },
    ),
}
"""By family: ComfyUI's class of its models, and the configuration that its detection would find in a small file."""

_UNET = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 2],
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
}
UNETS = {
    "sd15": _UNET
    | {
        "model_channels": 32,
        "transformer_depth": [1, 1],
        "transformer_depth_output": [1, 1, 1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 768,
        "num_heads": 8,
        "num_head_channels": -1,
        "use_linear_in_transformer": False,
        "adm_in_channels": None,
    },
    "sdxl": _UNET
    | {
        "model_channels": 64,
        "transformer_depth": [0, 2],
        "transformer_depth_output": [0, 0, 2, 2],
        "transformer_depth_middle": 2,
        "context_dim": 2048,
        "num_heads": -1,
        "num_head_channels": 64,
        "use_linear_in_transformer": True,
        "adm_in_channels": 2816,
        "num_classes": "sequential",
    },
}


def seeded(shape, name: str, std: float, mean: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
    return torch.randn(shape, generator=generator) * std + mean


def build(family: str) -> ModelPatcher:
    """The tiny model of a family."""
    if family in TRANSFORMERS:
        return with_network(*TRANSFORMERS[family])
    return mmdit_of(HIDDEN[family], 6) if family == "sd3" else _unet(family)


def golden(family: str) -> ModelPatcher:
    """That of the golden vectors. SD3's takes several times as long as the tiny one."""
    return _mmdit() if family == "sd3" else build(family)


def store_in(model: ModelPatcher, dtype: torch.dtype) -> None:
    """Keeps the weights in `dtype` and computes in float32, as ComfyUI does for fp8 files."""
    network = model.model.diffusion_model
    in_files = network.state_dict().keys()
    made = {name: buffer for name, buffer in network.named_buffers() if name not in in_files}
    network.to(dtype)
    for name, buffer in made.items():
        parent, _, own = name.rpartition(".")
        network.get_submodule(parent)._buffers[own] = buffer
    model.model.diffusion_model.dtype = dtype
    model.model.manual_cast_dtype = torch.float32
    for module in model.model.diffusion_model.modules():
        if hasattr(module, "comfy_cast_weights"):
            module.comfy_cast_weights = True


def compute_in(model: ModelPatcher, dtype: torch.dtype) -> None:
    """Keeps the weights in `dtype` and computes in it, as a GPU does with half precision."""
    model.model.diffusion_model.to(dtype)
    model.model.diffusion_model.dtype = dtype


def _weight(name: str, shape, tag: str) -> torch.Tensor:
    if len(shape) == 1:
        is_norm_scale = "norm" in name and name.endswith("weight")
        return seeded(shape, f"{tag}/{name}", 0.02, 1.0 if is_norm_scale else 0.0)
    return seeded(shape, f"{tag}/{name}", torch.Size(shape[1:]).numel() ** -0.5)


def _unet(family: str) -> ModelPatcher:
    config = UNETS[family]
    classes = {
        "sd15": (comfy.supported_models.SD15, comfy.model_base.BaseModel),
        "sdxl": (comfy.supported_models.SDXL, comfy.model_base.SDXL),
    }
    model_config = classes[family][0](dict(config))
    model_config.unet_config.update(config)
    model_config.set_inference_dtype(torch.float32, None)
    model = classes[family][1](model_config, device="cpu")
    names = {
        ours: theirs for theirs, ours in comfy.utils.unet_to_diffusers(config).items() if "class_emb" not in theirs
    }
    shapes = {key: value.shape for key, value in model.diffusion_model.state_dict().items()}
    weights = {key: _weight(names[key], shape, f"{family}tiny") for key, shape in shapes.items()}
    model.diffusion_model.load_state_dict(weights)
    return ModelPatcher(model, CPU, CPU)


def mmdit_config(width: int, blocks: int, **more) -> dict:
    return {
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": 2,
        "depth": width // 64,
        "num_blocks": blocks,
        "adm_in_channels": 2048,
        "input_size": None,
        "num_patches": 64 * 64,
        "pos_embed_max_size": 64,
        "pos_embed_scaling_factor": None,
        "context_embedder_config": {
            "target": "torch.nn.Linear",
            "params": {"in_features": 4096, "out_features": width},
        },
        **more,
    }


def mmdit_of(width: int, blocks: int, dtype=torch.float32, **more) -> ModelPatcher:
    """An SD3 model of any width with small random weights (for shapes, not for golden values)."""
    config = mmdit_config(width, blocks, **more)
    model_config = comfy.supported_models.SD3(config)
    model_config.unet_config.update(config)
    model_config.set_inference_dtype(dtype, None)
    model = comfy.model_base.SD3(model_config, device="cpu")
    fill(model.diffusion_model)
    return ModelPatcher(model, CPU, CPU)


def fill(network: torch.nn.Module) -> None:
    """Small random weights, each by its name."""
    pool = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for name, tensor in network.state_dict().items():
        std = torch.Size(tensor.shape[1:]).numel() ** -0.5 if tensor.ndim > 1 else 0.02
        mean = 1.0 if tensor.ndim == 1 and ("norm" in name or ".ln_" in name) else 0.0
        shift = sum(name.encode()) * 97 % 4096  # a different stretch of the pool for each weight
        values = pool[shift:].repeat(tensor.numel() // (len(pool) - shift) + 1)[: tensor.numel()]
        tensor.copy_(values.view(tensor.shape) * std + mean)


def with_network(kind: str, config: dict) -> ModelPatcher:
    """A model of ComfyUI's class `kind` with small random weights."""
    model_config = getattr(comfy.supported_models, kind)(dict(config))
    model_config.unet_config.update(config)
    model_config.set_inference_dtype(torch.float32, None)
    model = model_config.get_model({}, device="cpu")
    if hasattr(model.diffusion_model, "llm_adapter"):  # Anima's own has one size, 130M parameters
        size = {"model_dim": 32, "num_layers": 1, "num_heads": 2}
        kind = type(model.diffusion_model.llm_adapter)
        model.diffusion_model.llm_adapter = kind(**size, operations=comfy.ops.manual_cast)
    fill(model.diffusion_model)
    return ModelPatcher(model, CPU, CPU)


def _mmdit() -> ModelPatcher:
    width, blocks = 384, 6
    config = mmdit_config(width, blocks)
    model_config = comfy.supported_models.SD3(dict(config))
    model_config.unet_config.update(config)
    model_config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.SD3(model_config, device="cpu")
    shapes = {key: value.shape for key, value in model.diffusion_model.state_dict().items()}
    weights = {"pos_embed.pos_embed": _sincos(64, 16, width)}
    for name, target in comfy.utils.mmdit_to_diffusers({"depth": blocks, "num_blocks": blocks}).items():
        ours, part = (target, None) if isinstance(target, str) else target[:2]
        if ours not in shapes or name in weights:  # optional parts this size of model does not have
            continue
        shape = list(shapes[ours])
        if part is not None:
            shape[part[0]] = part[2]
        weights[name] = _weight(name, shape, "sd3tiny")
    model.diffusion_model.load_state_dict(comfy.model_detection.convert_diffusers_mmdit(weights), strict=True)
    return ModelPatcher(model, CPU, CPU)


def _sincos(side: int, base: int, dim: int) -> torch.Tensor:
    """2-D sine/cosine table (1, side * side, dim); the first half of `dim` encodes the column."""
    position = torch.arange(side, dtype=torch.float64) * (base / side)
    omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    axis = torch.cat([torch.sin(position[:, None] * omega), torch.cos(position[:, None] * omega)], dim=1)
    column, row = axis[None].expand(side, side, -1), axis[:, None].expand(side, side, -1)
    return torch.cat([column, row], dim=-1).reshape(1, side * side, dim).float()


def sdxl_vector(pooled: torch.Tensor, size: float) -> torch.Tensor:
    """SDXL's 2816-wide vector: pooled text (B, 1280) and the embeddings of a square size without crop."""
    sizes = [size, size, 0.0, 0.0, size, size]
    embedding = torch.cat([Timestep(256)(torch.tensor([value])) for value in sizes]).flatten()
    return torch.cat([pooled, embedding[None].expand(pooled.shape[0], -1)], dim=1)
