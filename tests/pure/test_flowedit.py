"""The edit loop against the paper's velocity form, written out here on its own, in float64."""

from itertools import pairwise

import pytest
import torch
from comfyui_softrepa.softrepa.editing.flowedit import Draws, flow_edit

SHAPE = (2, 3, 4, 4)


def normal(seed: int, shape=SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Toy:
    """A velocity field v(z, t, prompt) of a flow model, nonlinear in all of them."""

    def __init__(self):
        self.mix = normal(99, (3, 3))
        self.calls = []

    def velocity(self, z, t, prompt):
        mixed = torch.einsum("ij,bjhw->bihw", self.mix, z)
        return torch.tanh(mixed * (1 + prompt * t)) + prompt * torch.sin(3 * z) - 0.3 * z

    def denoised(self, z, t, prompt):
        return z - t * self.velocity(z, t, prompt)


class FlowDenoiser(Toy):
    """Latents z_t = (1 - t) x + t n, sigma = t."""

    def both(self, zs, zt, sigma):
        self.calls.append("both")
        return self.denoised(zs, sigma, 1.0), self.denoised(zt, sigma, 2.0)

    def target(self, zt, sigma):
        self.calls.append("target")
        return self.denoised(zt, sigma, 2.0)

    @staticmethod
    def add_noise(sigma, n, x):
        return sigma * n + (1 - sigma) * x


class ExplodingDenoiser(FlowDenoiser):
    """The same field behind latents z = x + sigma n: t = sigma / (1 + sigma), z_t = (1 - t) z."""

    def denoised(self, z, sigma, prompt):
        t = sigma / (1 + sigma)
        return super().denoised(z * (1 - t), t, prompt)

    @staticmethod
    def add_noise(sigma, n, x):
        return x + sigma * n


def paper(x, times, draws, n_min=0, n_avg=1, mask=1.0):
    """Algorithm 1 of arXiv 2412.08629 with the reference's order of draws; `mask` is 0 or 1."""
    toy, z = Toy(), x.clone()
    steps = len(times) - 1
    for i in range(steps - n_min):
        t, t_next = times[i], times[i + 1]
        change = 0
        for _ in range(n_avg):
            zs = (1 - t) * x + t * draws()
            zt = z + zs - x
            change = change + toy.velocity(zt, t, 2.0) - toy.velocity(zs, t, 1.0)
        z = z + mask * (t_next - t) * change / n_avg
    if n_min == 0:
        return z
    n = draws()
    zt = z + (1 - times[-n_min - 1]) * x + times[-n_min - 1] * n - x
    for i in range(steps - n_min, steps):
        stepped = zt + (times[i + 1] - times[i]) * toy.velocity(zt, times[i], 2.0)
        kept = (1 - times[i + 1]) * x + times[i + 1] * n
        zt = mask * stepped + (1 - mask) * kept
    return zt


TIMES = torch.tensor([0.85, 0.7, 0.66, 0.4, 0.21, 0.05, 0.0], dtype=torch.float64)
HALF = torch.zeros(SHAPE, dtype=torch.float64)
HALF[..., 2:] = 1


class ExactDraws:
    """A new seeded draw at every call, in float64."""

    def __init__(self):
        self.count = 0

    def __call__(self):
        self.count += 1
        return normal(self.count)


@pytest.mark.parametrize("n_avg", [1, 3])
@pytest.mark.parametrize("n_min", [0, 4, 6])
@pytest.mark.parametrize("mask", [None, HALF])
@pytest.mark.parametrize("denoiser", [FlowDenoiser, ExplodingDenoiser])
def test_equals_the_papers_velocity_form(denoiser, mask, n_min, n_avg):
    x, draws = normal(1000), ExactDraws()
    sigmas = TIMES if denoiser is FlowDenoiser else TIMES / (1 - TIMES)
    mask_at = None if mask is None else lambda sigma: mask
    toy = denoiser()
    ours = flow_edit(x, sigmas, toy, draws, toy.add_noise, n_min, n_avg, mask_at)
    expected = paper(x, TIMES, ExactDraws(), n_min, n_avg, 1.0 if mask is None else mask)
    assert (ours - expected).abs().max() < 1e-12
    assert (ours - x).abs().max() > 0.1
    assert toy.calls == ["both"] * (6 - n_min) * n_avg + ["target"] * n_min
    assert draws.count == (6 - n_min) * n_avg + (n_min > 0)
    if mask is not None:
        assert torch.equal(ours[mask == 0], x[mask == 0])


def aligned(x, times, draws, n_avg=1, mask=1.0):
    """FlowAlign (arXiv 2505.23145) as its public code steps: q of the source, p of the edit."""
    toy, z = Toy(), x.clone()
    for t, t_next in pairwise(times):
        step = 0
        for _ in range(n_avg):
            q = (1 - t) * x + t * draws()
            p = z + q - x
            v_q, v_p = toy.velocity(q, t, 1.0), toy.velocity(p, t, 2.0)
            step = step + ((t_next - t) * (v_p - v_q) + 0.01 * (q - t * v_q - p + t * v_p)) / n_avg
        z = z + mask * step
    return z


@pytest.mark.parametrize("n_avg", [1, 3])
@pytest.mark.parametrize("mask", [None, HALF])
@pytest.mark.parametrize("denoiser", [FlowDenoiser, ExplodingDenoiser])
def test_equals_the_velocity_form_of_flow_align(denoiser, mask, n_avg):
    x, toy, estimates = normal(1000), denoiser(), []
    times = torch.cat([TIMES.new_tensor([0.97, 0.96]), TIMES])  # from a step that the pull outweighs
    sigmas = times if denoiser is FlowDenoiser else times / (1 - times)
    mask_at = None if mask is None else lambda sigma: mask
    ours = flow_edit(
        *(x, sigmas, toy, ExactDraws(), toy.add_noise, 0, n_avg, mask_at),
        on_step=lambda step, estimate, zt: estimates.append(estimate),
        zeta=0.01,
    )
    expected = aligned(x, times, ExactDraws(), n_avg, 1.0 if mask is None else mask)
    assert (ours - expected).abs().max() < 1e-12
    assert (estimates[-1] - ours).abs().max() < 1e-12
    assert (ours - flow_edit(x, sigmas, toy, ExactDraws(), toy.add_noise, 0, n_avg, mask_at)).abs().max() > 1e-3


def test_soft_mask_weighs_the_edit_once():
    """With a difference that never changes, a weight m makes the edit m times what it is without, at every step."""

    class Constant(FlowDenoiser):
        def __init__(self):
            self.edits = []

        def both(self, zs, zt, sigma):
            self.edits.append(zt - zs)
            return zs, zs + 1.0

    def run(mask_at):
        toy = Constant()
        return flow_edit(normal(1), TIMES, toy, ExactDraws(), toy.add_noise, mask_at=mask_at), toy.edits

    weight = torch.linspace(0, 1, 4, dtype=torch.float64).expand(SHAPE)
    plain, plain_edits = run(None)
    weighed, weighed_edits = run(lambda sigma: weight)
    for a, b in zip(weighed_edits, plain_edits, strict=True):
        assert (a - weight * b).abs().max() < 1e-12
    assert (plain - normal(1) - 1).abs().max() < 1e-12
    assert (weighed - normal(1) - weight).abs().max() < 1e-12


def test_estimate_of_the_last_step_is_the_result():
    x, toy, steps = normal(1), FlowDenoiser(), []
    ours = flow_edit(
        x, TIMES, toy, ExactDraws(), toy.add_noise, 2, on_step=lambda step, estimate, zt: steps.append((step, estimate))
    )
    assert [step for step, _ in steps] == [0, 1, 2, 3, 4, 5]
    assert (ours - steps[-1][1]).abs().max() < 1e-12


def test_equal_prompts_change_nothing():
    class Same(FlowDenoiser):
        def both(self, zs, zt, sigma):
            return self.denoised(zs, sigma, 1.0), self.denoised(zt, sigma, 1.0)

    x = normal(1)
    assert torch.equal(flow_edit(x, TIMES, Same(), ExactDraws(), FlowDenoiser.add_noise), x)


def test_draws_begin_with_the_noise_given_and_differ_after_it():
    first = normal(5).float()
    draws = Draws(first)
    got = [draws() for _ in range(3)]
    assert torch.equal(got[0], first)
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert (got[a] - got[b]).abs().mean() > 0.5
    assert abs(torch.stack(got[1:]).mean()) < 0.3
    again = Draws(first)
    assert all(torch.equal(again(), noise) for noise in got)


def test_draws_of_an_image_do_not_depend_on_its_batch():
    first = normal(5, (3, 3, 4, 4)).float()
    whole, alone = Draws(first), Draws(first[1:2])
    for _ in range(3):
        assert torch.equal(whole()[1:2], alone())


def test_draws_leave_the_global_generator_alone():
    state = torch.random.get_rng_state()
    draws = Draws(normal(5).float())
    draws(), draws()
    assert torch.equal(torch.random.get_rng_state(), state)
