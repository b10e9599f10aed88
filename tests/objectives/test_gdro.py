"""The objective's algebra, in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gdro.objectives.flow import implicit_reward, velocity_error
from gdro.objectives.forward.gdro import (
    diagnostics,
    gdro_loss,
    gdro_weights,
    listwise_loss,
    loss_weights,
    order_by_reward,
    rank_loss,
    rank_targets,
    soft_targets,
    top1_loss,
    top1_targets,
)

TARGETS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "gdro": soft_targets,
    "rank": lambda r, tau: rank_targets(r),
    "top1": top1_targets,
}
START: dict[str, Callable[[int], float]] = {
    "gdro": lambda k: math.lgamma(k + 1),
    "rank": lambda k: math.lgamma(k + 1),
    "top1": math.log,
}
TAUS = (1e-300, 1e-3, 0.025, 0.05, 0.5, 100.0)


def example(k: int, groups: int = 5, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Random s and descending rewards in [0, 1], (groups, k) float64."""
    generator = torch.Generator().manual_seed(k)
    s = scale * torch.randn(groups, k, generator=generator, dtype=torch.float64)
    r = torch.rand(groups, k, generator=generator, dtype=torch.float64).sort(-1, descending=True).values
    return s, r


@pytest.mark.parametrize("k", [2, 3, 6, 16])
@pytest.mark.parametrize("tau", TAUS)
def test_policy_equal_to_reference_costs_ln_k_factorial(k: int, tau: float) -> None:
    _, r = example(k)
    s = torch.zeros_like(r)
    expected = torch.full((5,), math.log(math.factorial(k)), dtype=torch.float64)
    torch.testing.assert_close(gdro_loss(s, r, tau), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(rank_loss(s), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(top1_loss(s, r, tau), torch.full_like(expected, math.log(k)), rtol=0, atol=1e-12)
    for objective in ("gdro", "rank", "top1"):
        loss = listwise_loss(s.float(), TARGETS[objective](r.float(), tau))
        torch.testing.assert_close(loss, torch.full((5,), START[objective](k)), rtol=1e-6, atol=0)


def test_six_images_start_at_the_published_figure() -> None:
    assert math.lgamma(7) == pytest.approx(6.5793, abs=1e-4)


def test_definition_term_by_term() -> None:
    """The vectorized loss is the double sum of the paper, written out."""
    s, r = example(6, scale=3.0)
    tau = 0.1
    for group in range(s.shape[0]):
        expected = 0.0
        for i in range(5):
            suffix = range(i, 6)
            partition = sum(math.exp(s[group, m]) for m in suffix)
            weights = [math.exp((r[group, j] - r[group, i]) / tau) for j in suffix]
            expected += math.log(partition)
            expected -= sum(w / sum(weights) * float(s[group, j]) for w, j in zip(weights, suffix, strict=True))
        assert float(gdro_loss(s, r, tau)[group]) == pytest.approx(expected, abs=1e-12)


def test_two_images_and_vanishing_tau_are_dpo() -> None:
    s, r = example(2, groups=20, scale=4.0)
    dpo = -torch.nn.functional.logsigmoid(s[:, 0] - s[:, 1])
    torch.testing.assert_close(gdro_loss(s, r, 1e-6), dpo, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(rank_loss(s), dpo, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("k", [2, 4, 8])
def test_rank_only_is_the_limit_of_vanishing_tau(k: int) -> None:
    s, r = example(k)
    torch.testing.assert_close(gdro_loss(s, r, 1e-7), rank_loss(s), rtol=1e-12, atol=1e-12)
    assert torch.equal(soft_targets(r.float(), 1e-300), rank_targets(r))


def test_infinite_tau_asks_for_uniform_suffixes() -> None:
    q = soft_targets(example(4)[1], 1e12)
    expected = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1]]).double() / torch.tensor([[4.0], [3.0], [2.0]])
    torch.testing.assert_close(q, expected.expand_as(q), rtol=1e-9, atol=0)


@pytest.mark.parametrize("objective", ["gdro", "rank", "top1"])
def test_shifting_every_s_of_a_group_changes_nothing(objective: str) -> None:
    s, r = example(6)
    q = TARGETS[objective](r, 0.05)
    shift = torch.tensor([[-1e3], [-1.0], [0.0], [7.0], [1e3]], dtype=torch.float64)
    torch.testing.assert_close(listwise_loss(s + shift, q), listwise_loss(s, q), rtol=0, atol=1e-9)


def test_permuting_a_group_changes_nothing() -> None:
    s, r = example(6)
    generator = torch.Generator().manual_seed(0)
    expected = gdro_loss(s, r, 0.05)
    for _ in range(10):
        shuffled = torch.randperm(6, generator=generator)
        order = order_by_reward(r[:, shuffled], generator)
        s_sorted, r_sorted = (x[:, shuffled].gather(-1, order) for x in (s, r))
        assert torch.equal(gdro_loss(s_sorted, r_sorted, 0.05), expected)


@pytest.mark.parametrize("objective", ["gdro", "rank", "top1"])
@pytest.mark.parametrize("k", [2, 5, 8])
def test_autograd_equals_the_closed_form_weights(objective: str, k: int) -> None:
    """dL/dd_j = beta w_j, and the weights of a group sum to zero."""
    s0, r = example(k)
    beta, tau = 12.0, 0.05
    d = (0.3 - s0 / beta).requires_grad_()
    q = TARGETS[objective](r, tau)
    s = implicit_reward(d, torch.full_like(d, 0.3), beta)
    (gradient,) = torch.autograd.grad(listwise_loss(s, q).sum(), d)
    weights = loss_weights(s, q)
    assert not weights.requires_grad
    torch.testing.assert_close(gradient, beta * weights, rtol=0, atol=1e-10)
    torch.testing.assert_close(weights.sum(-1), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-12)
    if objective == "gdro":
        assert torch.equal(weights, gdro_weights(s, r, tau))


@pytest.mark.parametrize(
    "loss", [lambda s, r: gdro_loss(s, r, 0.1), lambda s, r: rank_loss(s), lambda s, r: top1_loss(s, r, 0.1)]
)
def test_gradient_against_finite_differences(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    s, r = example(5)
    assert torch.autograd.gradcheck(lambda x: loss(x, r), (s.requires_grad_(),), eps=1e-6, atol=1e-8)


@pytest.mark.parametrize("tau", [0.025, 0.5])
def test_the_optimum_is_finite(tau: float) -> None:
    """At s_i - s_j = (r_i - r_j) / tau the gradient is zero and the loss is the entropy of its targets."""
    _, r = example(6)
    s = (r / tau + 3.0).requires_grad_()
    loss = gdro_loss(s, r, tau)
    (gradient,) = torch.autograd.grad(loss.sum(), s)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-12)
    figures = diagnostics(s, soft_targets(r, tau))
    torch.testing.assert_close(figures["kl"], torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-10)
    torch.testing.assert_close(figures["entropy_p"], figures["entropy_q"], rtol=0, atol=1e-10)
    torch.testing.assert_close(figures["spread_s"], r.std(-1, correction=0) / tau)


def test_hard_ranking_has_no_finite_optimum() -> None:
    """The rank-only gradient still widens every margin where GDRO's has vanished."""
    _, r = example(4)
    weights = loss_weights(r / 0.05, rank_targets(r))
    assert (weights[:, 0] > 0).all()
    assert (weights[:, -1] < 0).all()


def test_tied_rewards_share_the_target() -> None:
    r = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64)
    q = soft_targets(r, 1e-9)
    torch.testing.assert_close(q, torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0]], dtype=torch.float64))


def test_ties_are_broken_at_random_and_only_ties() -> None:
    r = torch.tensor([0.2, 1.0, 1.0, 0.7, 1.0])
    generator = torch.Generator().manual_seed(1)
    orders = [tuple(order_by_reward(r, generator).tolist()) for _ in range(300)]
    assert all(sorted(order[:3]) == [1, 2, 4] and order[3:] == (3, 0) for order in orders)
    first = [sum(order[0] == i for order in orders) for i in (1, 2, 4)]
    assert min(first) > 60  # 100 expected each
    again = torch.Generator().manual_seed(1)
    assert tuple(order_by_reward(r, again).tolist()) == orders[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_inputs_stay_finite(dtype: torch.dtype) -> None:
    s = torch.tensor([[1e4, -1e4, 0.0, 5e3]], dtype=dtype, requires_grad=True)
    r = torch.tensor([[1.0, 1.0, 0.5, 0.0]], dtype=dtype)
    for tau in TAUS:
        loss = gdro_loss(s, r, tau)
        (gradient,) = torch.autograd.grad(loss.sum(), s)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()
        assert all(torch.isfinite(x).all() for x in diagnostics(s, soft_targets(r, tau)).values())


def test_velocity_error_is_the_mean_over_latent_elements_in_float32() -> None:
    v = torch.zeros(3, 4, 2)
    prediction = torch.tensor([0.0, 1.0, 2.0]).view(3, 1, 1).expand(3, 4, 2).to(torch.bfloat16)
    error = velocity_error(v, prediction)
    assert error.dtype == torch.float32
    assert error.tolist() == [0.0, 1.0, 4.0]


def test_diagnostics_at_the_start() -> None:
    _, r = example(6)
    figures = diagnostics(torch.zeros_like(r), soft_targets(r, 0.05))
    torch.testing.assert_close(figures["entropy_p"], torch.full((5,), math.lgamma(7), dtype=torch.float64))
    assert (figures["entropy_q"] < figures["entropy_p"]).all()
    assert (figures["spread_s"] == 0).all()
