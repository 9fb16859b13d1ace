"""The bytes of a training step, counted without a card: Flux 1 dev at its real size, on PyTorch's meta device.

    python3 -m benchmarks.memory

Tensors of that device have shapes and no numbers. One image-caption pair goes forward and backward through the
network as the training node runs it, with checkpointing, and every tensor is counted from when it is made until it is
let go. Attention is counted with its whole matrix of weights, which kernels of a card do not keep. CUDA's own memory
and what its allocator cannot use are not counted.
"""

import argparse
import weakref

from tools import environment

from . import cases

GIGABYTE = 1e9
PATCH = 8
"""Pixels of a latent's cell."""
DTYPES = {"float8": "float8_e4m3fn", "bfloat16": "bfloat16"}


def flux_dev(doubles: int, singles: int) -> dict:
    return {
        "image_model": "flux",
        "guidance_embed": True,
        "in_channels": 16,
        "out_channels": 16,
        "hidden_size": 3072,
        "num_heads": 24,
        "depth": doubles,
        "depth_single_blocks": singles,
        "axes_dim": [16, 56, 56],
        "theta": 10000,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "context_in_dim": 4096,
        "vec_in_dim": 768,
        "patch_size": 2,
        "txt_ids_dims": [],
    }


def counting():
    """A dispatch mode that counts the bytes of tensors made within it on the meta device: alive `now`, at `most`."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Counting(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.now = self.most = 0
            self.known = weakref.WeakSet()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for one in tree_leaves(out):
                if isinstance(one, torch.Tensor) and one.device.type == "meta":
                    self.count(one.untyped_storage())
            return out

        def count(self, storage) -> None:
            if storage in self.known:
                return
            self.known.add(storage)
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self.let_go, storage.nbytes())

        def let_go(self, size: int) -> None:
            self.now -= size

    return Counting()


def print_table(arguments: argparse.Namespace) -> None:
    import comfy.supported_models
    import torch
    from comfy.model_patcher import ModelPatcher

    from softrepa.comfy.training.trainable import TrainableNetwork
    from softrepa.training.pairs import StepBatch

    meta, config = torch.device("meta"), flux_dev(arguments.doubles, arguments.singles)
    made = comfy.supported_models.Flux(dict(config))
    made.unet_config.update(config)
    made.set_inference_dtype(getattr(torch, DTYPES[arguments.weights]), torch.bfloat16)
    with torch.inference_mode():
        model = made.get_model({}, device=meta)
    weights = [*model.diffusion_model.parameters()]
    cells = arguments.size // PATCH
    latent = torch.zeros(1, 16, cells, cells)
    cond = {"cross_attn": torch.zeros(1, arguments.text, 4096), "pooled_output": torch.zeros(1, 768)}
    batch = StepBatch.of_all(latent, latent, [cond], 500)
    with torch.inference_mode(False), torch.enable_grad():
        network = TrainableNetwork(ModelPatcher(model, meta, meta), min(5, arguments.doubles), checkpointing=True)
        rows = torch.zeros(len(network.places), 4, 3072)
        kept = network.saved_bytes(rows, batch)
        counter = counting()
        for weight in weights:
            counter.known.add(weight.untyped_storage())
        with counter:
            network.gradients(rows, batch, 1)
    whole, layer = sum(one.nbytes for one in weights), max(one.nbytes for one in weights)
    print(f"Flux 1 dev, {arguments.size} px, a text of {arguments.text} tokens, weights in {arguments.weights}\n")
    print("| | GB |\n|---|---|")
    for title, found in (
        ("weights", whole),
        ("kept of a pair for its backward pass", kept),
        ("most at once beside the weights", counter.most),
        ("all weights on the card, and that", whole + counter.most),
        ("half of them offloaded", whole / 2 + layer + counter.most),
        ("all of them offloaded", layer + counter.most),
    ):
        print(f"| {title} | {found / GIGABYTE:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python3 -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=512, help="pixels of the image's side (512)")
    parser.add_argument("--text", type=int, default=512, help="tokens of the caption (512)")
    parser.add_argument("--weights", choices=DTYPES, default="float8", help="what the weights are stored in (float8)")
    parser.add_argument("--doubles", type=int, default=19, help="double blocks (19)")
    parser.add_argument("--singles", type=int, default=38, help="single blocks (38)")
    environment.add_arguments(parser)
    arguments = parser.parse_args()
    cases.enter("benchmarks.memory", arguments)
    print_table(arguments)


if __name__ == "__main__":
    main()
