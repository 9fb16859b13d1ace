"""A node that `benchmarks.soak` puts beside the pack: what a model is and does, and what the server holds."""

import gc
import hashlib
import json

import comfy.sample
import psutil
import torch


class SoakProbe:
    RETURN_TYPES = ()
    OUTPUT_NODE = True
    FUNCTION = "look"
    CATEGORY = "test"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",)}}

    @classmethod
    def IS_CHANGED(cls, **_):
        return float("nan")  # at every prompt

    def look(self, model, positive):
        weights = hashlib.sha256()
        for name, weight in sorted(model.model.state_dict().items()):
            weights.update(name.encode() + weight.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        latent = torch.zeros(1, 16, 12, 12)
        noise = torch.randn(latent.shape, generator=torch.Generator().manual_seed(0))
        drawn = comfy.sample.sample(
            model, noise, 2, 2.0, "euler", "simple", positive, positive, latent, disable_pbar=True, seed=0
        )
        gc.collect()
        process = psutil.Process()
        found = {
            "weights": weights.hexdigest(),
            "drawn": hashlib.sha256(drawn.numpy().tobytes()).hexdigest(),
            "memory": process.memory_info().rss,
            "handles": process.num_handles() if hasattr(process, "num_handles") else process.num_fds(),
            "threads": process.num_threads(),
        }
        return {"ui": {"text": [json.dumps(found)]}}


NODE_CLASS_MAPPINGS = {"SoakProbe": SoakProbe}
