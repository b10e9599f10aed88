"""Trajectory objectives against their closed forms, written out again here, in float64."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from examples import gradient, transition

from gdro.objectives.base import Transition, clipped_surrogate
from gdro.objectives.registry import TRAJECTORY
from gdro.objectives.trajectory.dance_grpo import DanceGrpo
from gdro.objectives.trajectory.flow_grpo import FlowGrpo, step_kl
from gdro.objectives.trajectory.grpo_guard import GrpoGuard, guarded_log_ratio
from gdro.samplers.sde import flow_cps_step, kl_scale, log_prob, ratio_scale

ALL = [kind() for kind in TRAJECTORY]
NAMES = [objective.name for objective in ALL]


def by_hand(seen: Transition, clip: float) -> list[float]:
    """max(-A rho, -A clip(rho)) image by image."""
    losses = []
    for a, now, old in zip(seen.advantage.tolist(), seen.log_prob.tolist(), seen.old_log_prob.tolist(), strict=True):
        rho = math.exp(now - old)
        losses.append(max(-a * rho, -a * min(max(rho, 1 - clip), 1 + clip)))
    return losses


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_one_loss_an_image_with_detached_figures(objective: Any) -> None:
    loss, figures = objective.loss(transition())
    assert loss.shape == (5,)
    assert loss.requires_grad
    assert {"loss_policy", "ratio", "clipped"} <= set(figures)
    assert ("kl" in figures) == objective.uses_base
    for value in figures.values():
        assert value.shape == (5,)
        assert not value.requires_grad


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_only_what_is_declared_is_needed(objective: Any) -> None:
    seen = transition()
    needed = dataclasses.replace(
        seen,
        base_mean=seen.base_mean if objective.uses_base else None,
        old_mean=seen.old_mean if objective.uses_old_mean else None,
    )
    assert torch.equal(objective.loss(seen)[0], objective.loss(needed)[0])
    if objective.uses_base or objective.uses_old_mean:
        with pytest.raises(ValueError, match="was not given"):
            objective.loss(dataclasses.replace(seen, base_mean=None, old_mean=None))
    if objective.uses_base:
        assert not dataclasses.replace(objective, kl_weight=0.0).uses_base


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_before_any_update_ratios_are_one_and_the_gradient_is_the_policy_gradient(objective: Any) -> None:
    """-A grad log p, and for GRPO-Guard the same times std / -dt; a base equal to the policy adds nothing."""
    seen = transition(moved=0.0)
    seen = dataclasses.replace(seen, base_mean=seen.mean.detach())
    loss, figures = objective.loss(seen)
    assert (figures["ratio"] == 1).all()
    assert (figures["clipped"] == 0).all()
    scale = seen.std / 0.2 if objective.name == "grpo_guard" else 1.0
    expected = gradient(-seen.advantage * seen.log_prob * scale, seen.mean)
    torch.testing.assert_close(gradient(loss, seen.mean), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("objective", [kind(clip_range=0.02) for kind in TRAJECTORY], ids=NAMES)
def test_gradient_against_finite_differences(objective: Any) -> None:
    seen = transition()
    assert seen.old_mean is not None
    x_next = seen.old_mean + 0.1

    def loss(mean: torch.Tensor) -> torch.Tensor:
        def log_prob(mu: torch.Tensor) -> torch.Tensor:
            return torch.distributions.Normal(mu, seen.std).log_prob(x_next).flatten(1).mean(1)

        return objective.loss(
            dataclasses.replace(seen, mean=mean, log_prob=log_prob(mean), old_log_prob=log_prob(seen.old_mean))
        )[0]

    assert torch.autograd.gradcheck(loss, (seen.mean,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("objective", [FlowGrpo(clip_range=0.01, kl_weight=0.0), DanceGrpo(clip_range=0.01)])
def test_the_clipped_surrogate_by_hand(objective: Any) -> None:
    seen = transition(moved=0.5)
    loss, figures = objective.loss(seen)
    assert loss.tolist() == pytest.approx(by_hand(seen, 0.01), abs=1e-12)
    assert 0 < figures["clipped"].mean() < 1
    assert (gradient(loss, seen.mean)[figures["clipped"] == 1] == 0).all()


def test_clipping_is_one_sided() -> None:
    """Only a ratio that has already gone the advantage's way loses its gradient."""
    a = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0])
    log_ratio = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], requires_grad=True)
    loss, ratio, clipped = clipped_surrogate(a, log_ratio, 0.1)
    assert clipped.tolist() == [1, 0, 0, 1, 0]
    torch.testing.assert_close(gradient(loss, log_ratio), -a * ratio * (1 - clipped))


def test_flow_grpo_adds_the_divergence_of_two_gaussians() -> None:
    seen = transition()
    assert seen.base_mean is not None
    p, q = (torch.distributions.Normal(mean, seen.std) for mean in (seen.mean, seen.base_mean))
    kl = torch.distributions.kl_divergence(p, q).flatten(1).mean(1)
    loss, figures = FlowGrpo(kl_weight=0.3).loss(seen)
    kl = kl * -seen.dt  # as the authors weigh it
    torch.testing.assert_close(figures["kl"], kl.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(loss, FlowGrpo(kl_weight=0.0).loss(seen)[0] + 0.3 * kl, rtol=1e-12, atol=1e-12)


def test_step_kl_takes_a_std_an_image() -> None:
    seen = transition()
    assert seen.base_mean is not None
    stds = torch.linspace(0.1, 0.5, 5, dtype=torch.float64)
    each = [step_kl(seen.mean[i : i + 1], seen.base_mean[i : i + 1], stds[i]) for i in range(5)]
    torch.testing.assert_close(step_kl(seen.mean, seen.base_mean, stds[:, None, None]), torch.cat(each))


def test_guard_centers_and_rescales_the_log_ratio() -> None:
    """For x' = old_mean + std eps it is mean eps (mean - old_mean): zero on average, the plain one is not."""
    generator = torch.Generator().manual_seed(0)
    old_mean = torch.zeros(4000, 4, 3, dtype=torch.float64)
    eps = torch.randn(old_mean.shape, generator=generator, dtype=torch.float64)
    shift = torch.tensor([0.4, -0.2, 0.1], dtype=torch.float64)
    for noise in (0.05, 0.5):
        std = torch.tensor(noise, dtype=torch.float64)
        mean, x_next = old_mean + noise * shift, old_mean + noise * eps
        now, old = (torch.distributions.Normal(m, std).log_prob(x_next).flatten(1).mean(1) for m in (mean, old_mean))
        guarded = guarded_log_ratio(now, old, mean, old_mean, std)
        torch.testing.assert_close(guarded, (eps * (mean - old_mean)).flatten(1).mean(1), rtol=1e-9, atol=1e-12)
        standard_error = float(guarded.std()) / math.sqrt(len(guarded))
        assert abs(float(guarded.mean())) < 4 * standard_error
        assert float((now - old).mean()) == pytest.approx(-float(shift.square().mean()) / 2, abs=0.006)


def test_guard_weighs_steps_by_their_length() -> None:
    """Half the step, twice the weight of the policy's term and half that of the divergence; times of an image too."""
    long, short = transition(dt=-0.2), transition(dt=-0.1)
    objective = GrpoGuard(kl_weight=0.04)
    torch.testing.assert_close(2 * objective.loss(long)[1]["loss_policy"], objective.loss(short)[1]["loss_policy"])
    torch.testing.assert_close(objective.loss(long)[1]["kl"], 2 * objective.loss(short)[1]["kl"])
    each = dataclasses.replace(long, dt=torch.full((5,), -0.2), std=long.std.expand(5, 1, 1))
    torch.testing.assert_close(objective.loss(each)[0], objective.loss(long)[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(("step", "density"), [(0, 0.68), (8, 7900.0)])
def test_flow_cps_weighs_its_steps_as_its_authors_do(step: int, density: float) -> None:
    """log-ratio: mean (x' - old)^2 - mean (x' - new)^2, which densities would multiply by `density`; KL: the whole."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    t, t_next = scheduler.sigmas[step].double(), scheduler.sigmas[step + 1].double()
    generator = torch.Generator().manual_seed(0)
    x, v, n, move = (torch.randn(5, 4, 3, generator=generator, dtype=torch.float64) for _ in range(4))
    old, std = flow_cps_step(x, v, t, t_next, 0.7)
    x_next = old + std * n
    mean = flow_cps_step(x, v + 1e-3 * move, t, t_next, 0.7)[0].requires_grad_()
    assert 1 / (2 * float(std) ** 2) == pytest.approx(density, rel=0.01)
    seen = Transition(
        log_prob=log_prob(x_next, mean, std),
        old_log_prob=log_prob(x_next, old, std),
        advantage=torch.ones(5, dtype=torch.float64),
        mean=mean,
        std=std,
        dt=t_next - t,
        ratio_scale=ratio_scale("flow_cps", std),
        kl_scale=kl_scale("flow_cps", t_next - t),
        base_mean=old,
    )
    expected = ((x_next - old).square() - (x_next - mean).square()).flatten(1).mean(1)
    loss, figures = FlowGrpo(clip_range=1.0, kl_weight=0.1).loss(seen)
    kl = (mean - old).square().flatten(1).mean(1) / (2 * std.square())
    torch.testing.assert_close(figures["ratio"], expected.exp().detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(figures["kl"], kl.detach(), rtol=1e-9, atol=1e-15)
    torch.testing.assert_close(gradient(loss, mean), gradient(0.1 * kl - expected.exp(), mean), rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("sampler", ["flow_grpo", "dance_grpo"])
def test_the_other_samplers_ratios_are_of_densities(sampler: str) -> None:
    std, dt = torch.linspace(0.1, 0.5, 5)[:, None, None], -torch.linspace(0.1, 0.2, 5)
    assert torch.equal(ratio_scale(sampler, std), torch.ones(5))
    assert torch.equal(torch.as_tensor(kl_scale(sampler, dt)), -dt)
    assert torch.equal(ratio_scale("flow_cps", std), 2 * std.flatten() ** 2)
