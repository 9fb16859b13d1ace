"""The reference's arithmetic: ComfyUI's network with ordinary weights, called plainly, and autograd does the rest."""

import copy
from functools import partial

TEMPERATURE = 2.0
DENOISING_WEIGHT = 1.0
"""With random weights captions differ little, and the contrast alone would be a difference of nearly equal numbers."""


class Reference:
    """A copy of a MODEL's network into which one set of rows goes, and a step of the contrastive loss on it.

    `ours` is a `TrainableNetwork` on the model; of it comes what the network is fed, made once.
    """

    def __init__(self, ours, dtype=None):
        self.network = copy.deepcopy(ours.base_model.diffusion_model).requires_grad_(False).to(dtype)
        self.dtype = next(self.network.parameters()).dtype
        self.ours, self.rows = ours, None
        if ours.adapter.stream == "joint":
            for layer in ours.places:
                block = self.network.joint_blocks[layer]
                block.forward = partial(self._joint, block.forward, layer)
        else:
            stages = {"input": "input_blocks", "middle": "middle_block", "output": "output_blocks"}
            for place in ours.places:
                for name, module in getattr(self.network, stages[place]).named_modules():
                    if name.endswith("attn2"):
                        module.forward = partial(self._cross, module.forward)

    def _joint(self, block, layer: int, text, image, **more):
        import torch

        rows = self.rows[layer].to(text.dtype).expand(len(text), -1, -1)
        text, image = block(torch.cat([rows, text], dim=1), image, **more)
        return (text if text is None else text[:, rows.shape[1] :]), image

    def _cross(self, attention, x, context=None, **more):
        import torch

        rows = self.rows[0].to(context.dtype).expand(len(context), -1, -1)
        return attention(x, context=torch.cat([context[:, :1], rows, context[:, 1:]], dim=1), **more)

    def feed(self, step) -> None:
        """What the network gets for a `StepBatch`, on its device."""
        sigma, seen, target, captions = self.ours.prepared(step)
        device = self.ours.device
        joined = captions.joined(list(range(len(step.conds))), device)
        joined = {key: value.to(self.dtype) if value.is_floating_point() else value for key, value in joined.items()}
        self.context = joined.pop("c_crossattn")
        self.extra, self.target, self.seen = joined, target.to(device), seen.to(device, self.dtype)
        self.t = self.ours.base_model.model_sampling.timestep(sigma.to(device)).float()
        self.step = step

    def errors(self, rows, images: list[int], texts: list[int]):
        """(P,) of as many pairs at once, with their graph."""
        from comfy.ldm.modules.attention import attention_pytorch

        from softrepa.training.noising import pair_error

        self.rows = rows
        options = {"optimized_attention_override": lambda _, *args, **more: attention_pytorch(*args, **more)}
        extra = {key: value[texts] for key, value in self.extra.items()}
        seen, t = self.seen[images], self.t.expand(len(images))
        output = self.network(seen, t, context=self.context[texts], transformer_options=options, **extra)
        return pair_error(output, self.target[images])

    def one_graph(self, tokens) -> None:
        """All pairs in one graph."""
        from softrepa.training.loss import contrastive_loss

        count = len(self.step.latents)
        rows = tokens.rows(self.step.t).to(self.ours.device)
        pairs = [(i, j) for i in range(count) for j in range(count)]
        errors = self.errors(rows, [i for i, _ in pairs], [j for _, j in pairs]).view(count, count)
        self._back(tokens, contrastive_loss(errors, TEMPERATURE, denoising_weight=DENOISING_WEIGHT))

    def row_by_row(self, tokens) -> None:
        """One image with all captions at a time: each row of the loss goes back through a graph of its own."""
        import torch

        from softrepa.training.loss import logits

        count = len(self.step.latents)
        for i in range(count):
            rows = tokens.rows(self.step.t).to(self.ours.device)
            errors = self.errors(rows, [i] * count, list(range(count)))
            own = torch.tensor([i], device=errors.device)
            row = torch.nn.functional.cross_entropy(logits(errors, TEMPERATURE).unsqueeze(0), own)
            self._back(tokens, (row + DENOISING_WEIGHT * errors[i]) / count)

    def _back(self, tokens, loss) -> None:
        """Adds the gradient; it is scaled on its way, or half precision would lose that of a mean over a latent."""
        import torch

        scale, parameters = self.target[0].numel(), list(tokens.parameters())
        for parameter, found in zip(parameters, torch.autograd.grad(loss * scale, parameters), strict=True):
            parameter.grad = found / scale if parameter.grad is None else parameter.grad + found / scale
