"""What a model with tokens is composed with: a LoRA and a ControlNet that fit the tiny models, and compilation."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ops
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from softrepa_tests import tiny_models
from softrepa_tests.sampling import guider, noise, record, relative_error, sigmas_of
from softrepa_tests.tiny_models import seeded

LORA_KEYS = {
    "sd15": "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "sdxl": "input_blocks.3.1.transformer_blocks.0.attn2.to_k",
    "sd3": "joint_blocks.0.x_block.mlp.fc1",
}


def lora_for(model, family: str) -> dict[str, torch.Tensor]:
    key = LORA_KEYS[family]
    out, inner = model.model.diffusion_model.state_dict()[f"{key}.weight"].shape
    return {
        f"diffusion_model.{key}.lora_up.weight": seeded((out, 4), "lora/up", 0.3),
        f"diffusion_model.{key}.lora_down.weight": seeded((4, inner), "lora/down", 0.3),
    }


def small_controlnet() -> comfy.controlnet.ControlNet:
    config = {key: value for key, value in tiny_models.UNETS["sd15"].items() if "output" not in key}
    config.pop("out_channels")
    net = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, operations=comfy.ops.manual_cast, device="cpu")
    weights = {key: seeded(value.shape, f"control/{key}", 0.1) for key, value in net.state_dict().items()}
    net.load_state_dict(weights)
    control = comfy.controlnet.ControlNet(net.float().eval(), load_device=torch.device("cpu"))
    return control.set_cond_hint(seeded((1, 3, 64, 64), "control/hint", 0.3), strength=0.8)


def one_by_one(apply_model, args):
    """A model function wrapper that splits the batch of conds, as memory savers do."""
    parts = []
    count = len(args["cond_or_uncond"])
    for index in range(count):
        c = dict(args["c"])
        for key, value in c.items():
            if torch.is_tensor(value):
                c[key] = value.chunk(count)[index]
        options = c["transformer_options"] = dict(c["transformer_options"])
        for key in ("cond_or_uncond", "uuids"):
            options[key] = [options[key][index]]
        chunks = (args["input"].chunk(count)[index], args["timestep"].chunk(count)[index])
        parts.append(apply_model(*chunks, **c))
    return torch.cat(parts)


def same_when_compiled(patched, family: str, steps: int, tolerance: float) -> None:
    """By ComfyUI's compile node `patched` gives the same at every step, and compiles nothing after the second one."""
    torch.compiler.reset()
    expected = record(guider(patched, family), noise(family), sigmas_of(patched, steps))
    compiled = patched.clone()
    set_torch_compile_wrapper(compiled, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    graphs = []

    def count(args):
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
        return args["denoised"]

    compiled.set_model_sampler_post_cfg_function(count)
    torch._dynamo.utils.counters.clear()
    outputs = record(guider(compiled, family), noise(family), sigmas_of(patched, steps))
    assert graphs[0] > 0
    assert graphs[1] == graphs[-1]
    for step, (ours, reference) in enumerate(zip(outputs, expected, strict=True)):
        assert relative_error(ours, reference) <= tolerance, step
