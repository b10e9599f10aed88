"""Advantages against their definitions."""

import pytest
import torch
from torch import Tensor

from gdro.common.ranking import win_rate
from gdro.objectives.advantage import advantages

KINDS = [("group", 0.0), ("batch", 0.0), ("slas", 0.5), ("win_rate", 0.0)]


def groups() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(k, generator=generator, dtype=torch.float64) for k in (4, 8, 16)]


def test_group_standardizes_each_group() -> None:
    for r, a in zip(groups(), advantages(groups(), "group"), strict=True):
        std = ((r - r.mean()) ** 2).mean().sqrt()
        torch.testing.assert_close(a, (r - r.mean()) / (std + 1e-4))


def test_batch_divides_by_the_deviation_of_all_rewards() -> None:
    every = torch.cat(groups())
    std = ((every - every.mean()) ** 2).mean().sqrt()
    for r, a in zip(groups(), advantages(groups(), "batch"), strict=True):
        torch.testing.assert_close(a, (r - r.mean()) / (std + 1e-4))


def test_slas_is_batch_raised_to_a_power_and_equals_it_at_exponent_zero() -> None:
    every = torch.cat(groups())
    std = every.std(correction=0)
    for r, a in zip(groups(), advantages(groups(), "slas", 0.5), strict=True):
        expected = [(1 if x > r.mean() else -1) * abs(float(x - r.mean())) ** 1.5 / (float(std) + 1e-4) for x in r]
        assert a.tolist() == pytest.approx(expected)
    for a, b in zip(advantages(groups(), "slas", 0.0), advantages(groups(), "batch"), strict=True):
        torch.testing.assert_close(a, b)


def test_win_rate_counts_the_beaten_and_half_the_ties() -> None:
    r = torch.tensor([0.9, 0.1, 0.5, 0.5], dtype=torch.float64)
    assert win_rate(r.numpy()).tolist() == pytest.approx([1.0, 0.0, 0.5, 0.5])
    assert win_rate(torch.ones(5).numpy()).tolist() == [0.5] * 5
    for r in groups():
        assert float(win_rate(r.numpy()).mean()) == pytest.approx(0.5)


def test_win_rates_see_the_order_only() -> None:
    """Any increasing map of the rewards gives the same advantages; here a minute difference counts like a large one."""
    for a, b in zip(
        advantages(groups(), "win_rate"), advantages([r.exp() * 1e-6 for r in groups()], "win_rate"), strict=True
    ):
        torch.testing.assert_close(a, b)
    for r, a in zip(groups(), advantages(groups(), "win_rate"), strict=True):
        torch.testing.assert_close(a, advantages([torch.from_numpy(win_rate(r.numpy()))], "group")[0])


@pytest.mark.parametrize(("kind", "exponent"), KINDS)
def test_invariances(kind: str, exponent: float) -> None:
    """A constant of a group's own falls out; a permutation permutes; the best image has the largest advantage."""
    r = groups()[1]
    (a,) = advantages([r], kind, exponent)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(advantages([r[order]], kind, exponent)[0], a[order])
    torch.testing.assert_close(advantages([r + 3.0], kind, exponent)[0], a, rtol=1e-9, atol=1e-12)
    assert int(a.argmax()) == int(r.argmax())
    assert a.dtype == r.dtype


@pytest.mark.parametrize(("kind", "exponent"), KINDS)
def test_equal_rewards_give_none_and_outliers_are_limited(kind: str, exponent: float) -> None:
    assert all((a == 0).all() for a in advantages([torch.full((4,), 0.5), torch.zeros(6)], kind, exponent))
    outlier = torch.zeros(1000, dtype=torch.float64)
    outlier[0] = 1.0
    assert float(advantages([outlier], kind, exponent)[0].max()) == 5.0


def test_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="expected group, batch"):
        advantages(groups(), "median")
