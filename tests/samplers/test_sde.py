"""Stochastic steps: without noise the ODE's, with noise its marginals (or, Flow-CPS, its coefficients).

Data x0 ~ N(M, S^2) have the velocity v(x, t) = E[eps - x0 | x] = -M + (t - (1 - t) S^2) / V (x - (1 - t) M), with
V = (1 - t)^2 S^2 + t^2 the variance of x_t. It is linear in x, so a step x' = b + c x + std n carries mean and variance
exactly: mean' = b + c mean, V' = c^2 V + std^2.
"""

import math
from itertools import pairwise

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from gdro.samplers.sde import PUBLISHED_NOISE, STEPS, dance_grpo_step, flow_cps_step, flow_grpo_step, log_prob

M, S = 1.3, 0.5
EXACT_IN_THE_LIMIT = ["flow_grpo", "dance_grpo"]
TIMES = [1.0, 0.97, 0.6, 0.25, 0.02, 0.0]
PAIRS = [*pairwise(TIMES), (1.0, 0.5), (1.0, 0.0)]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def grid(steps: int, start: float = 1.0) -> list[float]:
    return [start * (1 - i / steps) for i in range(steps)] + [0.0]


def marginal(t: float, s: float = S) -> tuple[float, float]:
    return (1 - t) * M, (1 - t) ** 2 * s**2 + t**2


def velocity(x: Tensor, t: float, s: float = S) -> Tensor:
    mean, variance = marginal(t, s)
    return -M + (t - (1 - t) * s**2) / variance * (x - mean)


def carried(name: str, noise_level: float, times: list[float], s: float = S) -> tuple[float, float]:
    """(mean, variance) at the last of `times` of steps that begin with the marginal of the first."""
    mean, variance = marginal(times[0], s)
    for t, t_next in pairwise(times):
        x = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None]
        moved, std = STEPS[name](x, velocity(x, t, s), t, t_next, noise_level)
        b, c = moved[0].item(), (moved[1] - moved[0]).item()
        mean, variance = b + c * mean, c**2 * variance + std.item() ** 2
    return mean, variance


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", STEPS)
def test_without_noise_a_step_is_eulers_to_the_last_bit(name: str, dtype: torch.dtype):
    x, v = normal(3, 5, 4, dtype=dtype), normal(3, 5, 4, seed=1, dtype=dtype)
    for t, t_next in (torch.tensor(pair, dtype=dtype) for pair in PAIRS):
        mean, std = STEPS[name](x, v, t, t_next, 0.0)
        assert torch.equal(mean, x + v * (t_next - t))
        assert mean.dtype == std.dtype == dtype
        assert not std.any()


@pytest.mark.parametrize("name", STEPS)
def test_without_noise_a_step_is_diffusers_own(name: str):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(7)
    x = normal(2, 5, 4, dtype=torch.float32)
    for i, timestep in enumerate(scheduler.timesteps):
        v = normal(2, 5, 4, seed=i, dtype=torch.float32)
        mean, _ = STEPS[name](x, v, scheduler.sigmas[i], scheduler.sigmas[i + 1], 0.0)
        x = scheduler.step(v, timestep, x, return_dict=False)[0]
        assert torch.equal(mean, x)


@pytest.mark.parametrize(("t", "t_next"), [(0.97, 0.6), (0.6, 0.25), (0.25, 0.02), (1.0, 0.97)])
def test_the_formulas_as_published(t: float, t_next: float):
    """Mean and standard deviation as each paper writes them, which our common form only rearranges."""
    x, v, a, dt = normal(2, 5, 4), normal(2, 5, 4, seed=1), 0.7, t_next - t

    s = a * math.sqrt(t / (1 - (t if t < 1 else t_next)))
    mean, std = flow_grpo_step(x, v, t, t_next, a)
    assert torch.allclose(mean, x * (1 + s**2 / (2 * t) * dt) + v * (1 + s**2 * (1 - t) / (2 * t)) * dt, atol=1e-12)
    assert std.item() == pytest.approx(s * math.sqrt(-dt))

    score = -(x - (x - t * v) * (1 - t)) / t**2
    mean, std = dance_grpo_step(x, v, t, t_next, a)
    assert torch.allclose(mean, x + (v - a**2 / 2 * score) * dt, atol=1e-12)
    assert std.item() == pytest.approx(a * math.sqrt(-dt))

    s = t_next * math.sin(a * math.pi / 2)
    mean, std = flow_cps_step(x, v, t, t_next, a)
    expected = (x - t * v) * (1 - t_next) + (x + (1 - t) * v) * math.sqrt(t_next**2 - s**2)
    assert torch.allclose(mean, expected, atol=1e-12)
    assert std.item() == pytest.approx(s)


@pytest.mark.parametrize("name", STEPS)
def test_a_time_an_image_is_a_step_an_image(name: str):
    """As training needs it, which mixes the steps of a trajectory; bit by bit what each image gets alone."""
    x, v = normal(3, 5, 4, dtype=torch.float32), normal(3, 5, 4, seed=1, dtype=torch.float32)
    t, t_next = torch.tensor([1.0, 0.6, 0.3]), torch.tensor([0.9, 0.4, 0.1])
    mean, std = STEPS[name](x, v, t, t_next, 0.7)
    assert std.shape == (3, 1, 1)
    logs = log_prob(v, mean, std)
    for i in range(3):
        one, one_std = STEPS[name](x[i : i + 1], v[i : i + 1], t[i], t_next[i], 0.7)
        assert torch.equal(one[0], mean[i])
        assert torch.equal(one_std, std[i, 0, 0])
        assert torch.equal(log_prob(v[i : i + 1], one, one_std)[0], logs[i])


@pytest.mark.parametrize("name", EXACT_IN_THE_LIMIT)
@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_marginals_are_the_odes_in_the_limit(name: str, noise_level: float):
    """The mean is exact at any number of steps; the variance's error shrinks with the step, a quarter at a quarter."""
    errors = []
    for steps in (80, 320, 1280):
        mean, variance = carried(name, noise_level, grid(steps, 0.9))
        assert mean == pytest.approx(M, abs=1e-9)
        errors.append(variance / S**2 - 1)
    assert abs(errors[-1]) < 2e-3
    for coarse, fine in pairwise(errors):
        assert fine / coarse == pytest.approx(0.25, rel=0.15)


@pytest.mark.parametrize("name", EXACT_IN_THE_LIMIT)
def test_marginals_from_pure_noise(name: str):
    """From t = 1 too, where Flow-GRPO's first step has the finite noise a^2 however short: later ones forget it."""
    for noise_level in (0.3, 0.7, 1.0):
        mean, variance = carried(name, noise_level, grid(1280))
        assert mean == pytest.approx(M, abs=1e-9)
        assert variance == pytest.approx(S**2, rel=5e-3)


@pytest.mark.parametrize("name", EXACT_IN_THE_LIMIT)
def test_samples_have_the_odes_marginals(name: str):
    """40,000 scalars drawn in float32: mean and variance within 4 standard errors, at t = 0.5 and at t = 0."""
    count, times = 40_000, grid(400)
    x = normal(count, 1, 1, dtype=torch.float32)
    for i, (t, t_next) in enumerate(pairwise(times)):
        mean, std = STEPS[name](x, velocity(x, t), t, t_next, PUBLISHED_NOISE[name])
        x = mean + std * normal(count, 1, 1, seed=i + 1, dtype=torch.float32)
        if t_next in (0.5, 0.0):
            expected, variance = marginal(t_next)
            assert abs(x.mean().item() - expected) < 4 * math.sqrt(variance / count)
            # the 400 steps themselves are short of the limit by under 1 %
            assert abs(x.var().item() / variance - 1) < 4 * math.sqrt(2 / count) + 0.01


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_flow_cps_keeps_coefficients(noise_level: float):
    """1 - t' of signal, and old and new noise together t'^2, at a step of any length."""
    x0, eps = normal(2, 5, 4), normal(2, 5, 4, seed=1)
    for t, t_next in PAIRS:
        signal, _ = flow_cps_step((1 - t) * x0, -x0, t, t_next, noise_level)
        assert torch.allclose(signal, (1 - t_next) * x0, atol=1e-12)
        old, std = flow_cps_step(t * eps, eps, t, t_next, noise_level)
        share = (old / eps).mean().item()
        assert torch.allclose(old, share * eps, atol=1e-12)
        assert share**2 + std.item() ** 2 == pytest.approx(t_next**2, abs=1e-12)


@pytest.mark.parametrize("noise_level", [0.3, 0.7, 1.0])
def test_flow_cps_marginals(noise_level: float):
    """A single image: exact with any number of steps, where Flow-GRPO's leave noise. Elsewhere: the mean is exact, the
    variance short, the more so the more noise: each step puts x0_hat, an average, in the place of x0."""
    for steps in (2, 3, 10):
        times = grid(steps)[:-1]
        mean, variance = carried("flow_cps", noise_level, times, s=0.0)
        assert (mean, variance) == pytest.approx(marginal(times[-1], 0.0))
        assert carried("flow_grpo", noise_level, times, s=0.0)[1] > 1.001 * variance
    mean, variance = carried("flow_cps", noise_level, grid(320))
    assert mean == pytest.approx(M, abs=1e-9)
    assert 0.4 * S**2 < variance < 0.95 * S**2
    assert variance > carried("flow_cps", noise_level + 0.1, grid(320))[1]


def test_samples_of_flow_cps_follow_its_theory():
    """Mean and variance of drawn scalars are those the linear recursion carries."""
    count, times = 40_000, grid(50)
    x = normal(count, 1, 1, dtype=torch.float32)
    for i, (t, t_next) in enumerate(pairwise(times)):
        mean, std = flow_cps_step(x, velocity(x, t), t, t_next, 0.7)
        x = mean + std * normal(count, 1, 1, seed=i + 1, dtype=torch.float32)
    expected, variance = carried("flow_cps", 0.7, times)
    assert abs(x.mean().item() - expected) < 4 * math.sqrt(variance / count)
    assert abs(x.var().item() / variance - 1) < 4 * math.sqrt(2 / count)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probability_is_the_gaussians(dtype: torch.dtype):
    mean, x = normal(3, 5, 4, dtype=dtype), normal(3, 5, 4, seed=1, dtype=dtype)
    for std in (torch.tensor(0.3, dtype=dtype), torch.tensor([0.01, 0.3, 2.0], dtype=dtype)[:, None, None]):
        expected = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).mean(dim=(1, 2))
        assert log_prob(x, mean, std).shape == (3,)
        assert torch.allclose(log_prob(x, mean, std), expected, rtol=1e-6)


@pytest.mark.parametrize("name", STEPS)
def test_float32_is_enough(name: str):
    """A ratio of policies is exp of a difference of log-probabilities: single precision leaves it 1e-5."""
    x, v, n = (normal(4, 32, 16, seed=seed) for seed in range(3))
    for t, t_next in PAIRS[:4]:
        found = []
        for dtype in (torch.float32, torch.float64):
            mean, std = STEPS[name](x.to(dtype), v.to(dtype), t, t_next, 0.7)
            after = (mean + std * n.to(dtype)).detach()
            found.append(log_prob(after, mean, std).double())
        assert torch.allclose(found[0], found[1], atol=1e-5, rtol=0)
