"""A trainer on a toy model whose errors and gradients are known."""

import torch
from comfyui_softrepa.softrepa.families import FAMILIES
from comfyui_softrepa.softrepa.training.config import TrainingConfig
from comfyui_softrepa.softrepa.training.trainer import Trainer, new_tokens

WIDTH = 8


class ToyPairs:
    """e_ij = |x_i - (c_j + mean of the rows)|^2, with its gradient by autograd."""

    def __init__(self):
        self.seen = []

    def moved(self, rows):
        """What the rows add to a prediction."""
        return rows.mean(dim=(0, 1))

    def embed(self, rows):
        return rows

    def guided(self, rows, batch, empty, scale, micro_batch):
        """Of images as targets: between the caption and the empty one, and beyond."""
        assert (batch.compared.sum(dim=1) <= 1).all()  # or the last caption's would stand for all
        own = torch.stack([cond["cross_attn"] for cond in batch.conds[: len(batch.latents)]])
        guided = empty["cross_attn"] + scale * (own - empty["cross_attn"])
        return guided.view_as(batch.latents) * batch.compared.any(dim=1).view(-1, 1, 1, 1)

    def gradients(self, rows, batch, micro_batch):
        self.seen.append((batch.t, batch.noise.sum().item(), [cond["name"] for cond in batch.conds]))
        errors = torch.zeros(batch.compared.shape, dtype=rows.dtype)
        gradients = []
        for i, x in enumerate(batch.latents if batch.targets is None else batch.targets):
            for j, cond in enumerate(batch.conds):
                if not batch.compared[i, j]:
                    continue
                leaf = rows.clone().requires_grad_()
                error = (x.flatten()[:WIDTH] - cond["cross_attn"] - self.moved(leaf)).square().mean()
                gradients += torch.autograd.grad(error, leaf)
                errors[i, j] = error.detach()
        return errors, torch.stack(gradients) if gradients else rows.new_zeros(0, *rows.shape)

    def errors(self, rows, batch, micro_batch):
        return self.gradients(rows, batch, micro_batch)[0]

    def weighted_gradient(self, rows, batch, weights, micro_batch):
        gradients = self.gradients(rows, batch, micro_batch)[1]
        return torch.einsum("p,p...->...", weights[batch.compared].to(gradients), gradients)

    def gradients_and_predictions(self, rows, batch, micro_batch):
        places = batch.compared.nonzero().tolist()
        seen = [(batch.conds[j]["cross_attn"] + self.moved(rows)).view_as(batch.latents[0]) for _, j in places]
        none = rows.new_zeros(0, *batch.latents[0].shape)
        return *self.gradients(rows, batch, micro_batch), torch.stack(seen) if seen else none

    def unconditional(self, rows, batch, empty, micro_batch):
        seen = (empty["cross_attn"] + self.moved(rows)).view_as(batch.latents[0])
        return seen * batch.compared.any(dim=1).view(-1, 1, 1, 1), batch.latents

    def through_unconditional(self, rows, batch, empty, pulls, micro_batch):
        leaf = rows.clone().requires_grad_()
        return torch.autograd.grad((self.moved(leaf) * pulls.sum(dim=0).flatten()).sum(), leaf)[0].double()

    def regression(self, aims, banks, teacher, batch, weights, micro_batch):
        """Each pair pulls its bank, the first to 1, the second to -1."""
        self.teachers = [*getattr(self, "teachers", []), teacher.clone()]
        distance = banks - torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)
        own = (weights * batch.compared).double()
        counted = torch.stack([own.diagonal().sum(), own.sum() - own.diagonal().sum()]).view(2, 1, 1, 1).to(banks)
        loss = (counted * distance.square()).mean()
        return loss, torch.zeros(batch.compared.shape), counted * 2 * distance / distance.numel()


def batches(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def next_batch(size):
        latents = torch.randn(size, 2, 2, 2, generator=generator)
        offset = 0.5 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(5))
        conds = [{"name": j, "cross_attn": latents[j].flatten() + offset} for j in range(size)]
        return latents, conds, [[] for _ in conds]

    return next_batch


def trainer(seed=0, **config):
    start = new_tokens(FAMILIES["sd3"], WIDTH, 2, 3, True, seed, None, config.get("objective") == "agsm")
    empty = {"name": "", "cross_attn": torch.zeros(WIDTH)}
    return Trainer(TrainingConfig(**({"steps": 50, "temperature": 1.0} | config)), start, ToyPairs(), batches(), empty)
