"""Forward objectives against their closed forms, written out again here, in float64."""

import dataclasses
import math
from typing import Any

import pytest
import torch
from examples import gradient, noised
from torch import Tensor

from gdro.objectives.base import Noised
from gdro.objectives.forward.awm import Awm
from gdro.objectives.forward.dgpo import Dgpo
from gdro.objectives.forward.dpo import Dpo, dpo_loss
from gdro.objectives.forward.gdro import Gdro, Rank, Top1, gdro_loss, rank_loss, top1_loss
from gdro.objectives.forward.lair import Lair, lair_loss, lair_weights
from gdro.objectives.forward.nft import Nft, nft_loss, optimality
from gdro.objectives.forward.rwr import Rwr
from gdro.objectives.forward.sft import Sft
from gdro.objectives.forward.tabgraa import Tabgraa, tabgraa_loss
from gdro.objectives.registry import FORWARD

ALL = [kind() for kind in FORWARD]
NAMES = [objective.name for objective in ALL]


def size(objective: Any) -> int:
    return objective.fixed_k or 4


def at_reference(k: int) -> Noised:
    """Policy, reference and base all the same model."""
    seen = noised(k)
    same = seen.policy.detach()
    return dataclasses.replace(seen, reference=same, base=same)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_one_loss_a_group_with_detached_figures(objective: Any) -> None:
    seen = noised(size(objective))
    loss, figures = objective.loss(seen)
    assert loss.shape == (3,)
    assert loss.requires_grad
    assert "loss_rank" in figures
    for value in figures.values():
        assert value.shape == (3,)
        assert not value.requires_grad


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_only_what_is_declared_is_needed(objective: Any) -> None:
    """Without base, and without reference where the objective says so, the loss is the same."""
    seen = noised(size(objective))
    needed = dataclasses.replace(
        seen,
        reference=seen.reference if objective.uses_reference else None,
        base=seen.base if objective.uses_base else None,
    )
    assert torch.equal(objective.loss(seen)[0], objective.loss(needed)[0])
    assert bool(objective.uses_reference) == hasattr(objective, "reference")
    if objective.uses_reference:
        with pytest.raises(ValueError, match="was not given"):
            objective.loss(dataclasses.replace(seen, reference=None))


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_groups_do_not_mix(objective: Any) -> None:
    """Each group's loss is what it would be alone."""
    seen = noised(size(objective))
    loss, _ = objective.loss(seen)
    for i in range(3):
        whole = {field.name: getattr(seen, field.name) for field in dataclasses.fields(seen)}
        fields = {name: value[i : i + 1] for name, value in whole.items() if value is not None}
        close(objective.loss(Noised(**fields))[0], loss[i : i + 1], 1e-14)


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_a_constant_added_to_the_rewards_changes_nothing(objective: Any) -> None:
    seen = noised(size(objective))
    close(objective.loss(dataclasses.replace(seen, rewards=seen.rewards + 7.0))[0], objective.loss(seen)[0])


@pytest.mark.parametrize("objective", ALL, ids=NAMES)
def test_loss_where_policy_equals_reference(objective: Any) -> None:
    k = size(objective)
    found = objective.loss(at_reference(k))[1]["loss_rank"]
    expected = objective.start_loss(k)
    stated = {"gdro": math.lgamma(k + 1), "rank": math.lgamma(k + 1), "top1": math.log(k)}
    stated |= {"dpo": math.log(2), "lair": 0.0, "tabgraa": 0.5}
    assert expected == stated.get(objective.name)
    if expected is not None:
        close(found, torch.full((3,), expected, dtype=torch.float64), 1e-12)
    else:
        assert found.unique().numel() == 3  # it depends on the images


@pytest.mark.parametrize(
    "objective",
    [Gdro(), Rank(), Top1(), Dpo(beta=3.0), Lair(), Rwr(), Sft(), Tabgraa(beta=2.0)],
    ids=lambda objective: objective.name,
)
def test_gradient_against_finite_differences(objective: Any) -> None:
    seen = noised(size(objective), groups=2)
    loss = lambda policy: objective.loss(dataclasses.replace(seen, policy=policy))[0]  # noqa: E731
    assert torch.autograd.gradcheck(loss, (seen.policy,), eps=1e-6, atol=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_listwise_classes_are_loss_plus_the_regularizer(gamma: float) -> None:
    seen = noised(4)
    s = -3.0 * (seen.d - seen.d_ref)
    top1 = gamma * (seen.policy - seen.v)[:, 0].square().mean((-2, -1))
    close(Gdro(3.0, 0.2, gamma).loss(seen)[0], gdro_loss(s, seen.rewards, 0.2) + top1)
    close(Rank(3.0, gamma).loss(seen)[0], rank_loss(s) + top1)
    close(Top1(3.0, 0.2, gamma).loss(seen)[0], top1_loss(s, seen.rewards, 0.2) + top1)


def test_rank_is_gdro_with_vanishing_tau() -> None:
    seen = noised(4)
    close(Gdro(tau=1e-9).loss(seen)[0], Rank().loss(seen)[0])


def test_dpo_is_rank_on_pairs_at_half_the_beta() -> None:
    seen = noised(2)
    close(Dpo(beta=10.0).loss(seen)[0], Rank(beta=5.0, gamma=0.0).loss(seen)[0])


def test_dpo_as_the_paper_writes_it() -> None:
    seen = noised(2)
    d, d_ref = seen.d, seen.d_ref
    inside = -(10.0 / 2) * ((d[:, 0] - d_ref[:, 0]) - (d[:, 1] - d_ref[:, 1]))
    close(Dpo(beta=10.0).loss(seen)[0], -torch.log(1 / (1 + torch.exp(-inside))))
    assert torch.isfinite(dpo_loss(torch.tensor([[-1e6, 1e6]]))).all()


def test_lair_as_the_paper_writes_it() -> None:
    seen = noised(4)
    s = -12.0 * (seen.d - seen.d_ref)
    total = (seen.rewards / 0.1).exp().sum(-1, keepdim=True)
    expected = sum(
        -((seen.rewards[:, j] / 0.1).exp() / total[:, 0] - 1 / 4) * s[:, j] + 0.7 / 4 * s[:, j] ** 2 for j in range(4)
    )
    close(Lair(tau=0.1, regularizer=0.7).loss(seen)[0], expected)


def test_lair_has_a_bounded_optimum() -> None:
    """The gradient vanishes at s_j = k w_j / (2 lam), of size (k - 1) / (2 lam) at most, and the loss rises around."""
    w = lair_weights(noised(6).rewards, 1e-6)
    s = (6 * w / (2 * 0.5)).requires_grad_()
    close(gradient(lair_loss(s, w, 0.5), s), torch.zeros_like(s))
    close(s.detach().max(), torch.tensor(5.0).double())
    for direction in torch.randn(10, *s.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)):
        assert (lair_loss(s + direction, w, 0.5) > lair_loss(s, w, 0.5)).all()


def test_lair_does_not_care_for_the_order_of_a_group() -> None:
    seen = noised(5)
    s, shuffled = seen.d - seen.d_ref, torch.tensor([3, 0, 4, 1, 2])
    w = lair_weights(seen.rewards, 0.1)
    close(lair_loss(s[:, shuffled], lair_weights(seen.rewards[:, shuffled], 0.1), 0.5), lair_loss(s, w, 0.5))


def test_dgpo_as_the_paper_writes_it() -> None:
    seen = noised(4)
    a, d, d_ref = seen.advantages, seen.d, seen.d_ref
    loss, figures = Dgpo(beta=20.0).loss(seen)
    weight = 1 / (1 + torch.exp(-(20.0 / 4) * (a * (d - d_ref)).sum(-1)))
    close(loss, weight * (a * d).sum(-1) / 4)
    close(figures["weight"], weight.detach())


def test_dgpo_gradient_is_that_of_a_group_preference() -> None:
    """The detached weight makes it the gradient of softplus(beta mean A (d - d_ref)) / beta, 1/2 mean A d at the start.

    The better half is drawn in, the worse pushed off; a group that already prefers so is left alone.
    """
    seen = noised(4)
    found = gradient(Dgpo(beta=20.0).loss(seen)[0], seen.policy)
    preference = 20.0 * (seen.advantages * (seen.d - seen.d_ref)).mean(-1)
    close(found, gradient(torch.nn.functional.softplus(preference) / 20.0, seen.policy))
    start = at_reference(4)
    expected = gradient((start.advantages * start.d).mean(-1) / 2, start.policy)
    close(gradient(Dgpo().loss(start)[0], start.policy), expected)
    learned = torch.where(seen.advantages[..., None, None] > 0, seen.v, seen.v + 5)
    weight = Dgpo().loss(dataclasses.replace(seen, policy=learned.requires_grad_()))[1]["weight"]
    assert (weight < 1e-6).all()


@pytest.mark.parametrize("mix", [1.0, 0.1])
def test_nft_as_the_paper_writes_it(mix: float) -> None:
    """In x0 space, image by image, from x_t and the clean latent."""
    seen = noised(3)
    expected = torch.zeros(3, dtype=torch.float64)
    assert seen.reference is not None
    assert seen.base is not None
    for g in range(3):
        for i in range(3):
            t, x_t, old, theta = seen.t[g, i], seen.x_t[g, i], seen.reference[g, i], seen.policy[g, i]
            x0 = x_t - t * seen.v[g, i]
            r = min(max(float(seen.advantages[g, i]) / 5, -1), 1) / 2 + 0.5
            for share, v in ((r, (1 - mix) * old + mix * theta), (1 - r, (1 + mix) * old - mix * theta)):
                x0_hat = x_t - t * v
                expected[g] += share * ((x0_hat - x0) ** 2).mean() / (x0_hat - x0).abs().mean() / 3
            expected[g] += 1e-4 * ((theta - seen.base[g, i]) ** 2).mean() / 3
    close(Nft(mix=mix).loss(seen)[0], expected)


@pytest.mark.parametrize("mix", [1.0, 0.1])
def test_nft_starts_along_the_advantage_weighted_regression(mix: float) -> None:
    """At policy = old: b (2 r - 1) = b A / 5 times the gradient of the self-normalized error; r = 1/2 gives none."""
    seen = at_reference(4)
    seen = dataclasses.replace(seen, advantages=torch.linspace(3, -3, 4).double().expand(3, 4))
    error = seen.t[..., None, None] * (seen.policy - seen.v)
    normalized = error.square().mean((-2, -1)) / error.detach().abs().mean((-2, -1))
    expected = gradient((mix * seen.advantages / 5 * normalized).mean(-1), seen.policy)
    close(gradient(Nft(mix=mix).loss(seen)[0], seen.policy), expected)
    neutral = dataclasses.replace(seen, advantages=torch.zeros(3, 4))
    close(gradient(Nft(mix=mix).loss(neutral)[0], seen.policy), torch.zeros_like(seen.policy))


def test_nft_gradient_with_its_weights_held_against_finite_differences() -> None:
    seen = noised(2, groups=1)
    assert seen.reference is not None
    v, t, old, r, b = seen.v, seen.t, seen.reference, optimality(seen.advantages), 0.7
    at = seen.policy.detach().clone()  # gradcheck moves the leaf in place

    def held(policy: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for share, sign in ((r, 1), (1 - r, -1)):
            error = t[..., None, None] * (old + sign * b * (policy - old) - v)
            fixed = t[..., None, None] * (old + sign * b * (at - old) - v)
            total = total + (share * error.square().mean((-2, -1)) / fixed.abs().mean((-2, -1))).sum()
        return total

    assert torch.autograd.gradcheck(held, (seen.policy,))
    close(gradient(nft_loss(seen.policy, old, v, t, r, b), seen.policy), gradient(held(seen.policy), seen.policy))


def test_nft_optimality_and_the_kl_to_a_base_that_is_the_reference() -> None:
    a = torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 50.0])
    assert optimality(a).tolist() == [0.0, 0.0, 0.5, 0.75, 1.0, 1.0]
    assert Nft().uses_base
    assert not Nft(kl_weight=0.0).uses_base
    assert not Nft(reference="base").uses_base
    seen = noised(3)
    assert seen.reference is not None
    kl = (seen.policy - seen.reference).square().mean((-3, -2, -1))
    difference = Nft(reference="base", kl_weight=0.5).loss(seen)[0] - Nft(reference="base", kl_weight=0.0).loss(seen)[0]
    close(difference, 0.5 * kl)


def test_nft_of_a_perfect_policy_is_finite() -> None:
    seen = noised(3)
    perfect = dataclasses.replace(seen, policy=seen.v.clone().requires_grad_(), reference=seen.v, base=seen.v)
    loss, _ = Nft().loss(perfect)
    assert (loss == 0).all()
    assert torch.isfinite(gradient(loss, perfect.policy)).all()


def test_awm_as_the_paper_writes_it() -> None:
    seen = noised(4)
    loss, figures = Awm(clip_range=0.1).loss(seen)
    d, d_ref = seen.d.tolist(), seen.d_ref.tolist()
    expected = torch.zeros(3, dtype=torch.float64)
    clipped = torch.zeros(3, dtype=torch.float64)
    for g in range(3):
        for i in range(4):
            a, rho = float(seen.advantages[g, i]), math.exp(d_ref[g][i] - d[g][i])
            bound = min(max(rho, 0.9), 1.1)
            expected[g] += max(-a * rho, -a * bound) / 4
            clipped[g] += (rho > 1.1 if a > 0 else rho < 0.9) / 4
    close(loss, expected)
    close(figures["clipped"], clipped)
    assert 0 < clipped.mean() < 1


def test_awm_starts_as_advantage_weighted_flow_matching() -> None:
    """At policy = old: loss -mean A, gradient mean A grad d; no image that is clipped has any."""
    seen = at_reference(4)
    loss, figures = Awm().loss(seen)
    close(loss, -seen.advantages.mean(-1))
    assert (figures["ratio"] == 1).all()
    close(gradient(loss, seen.policy), gradient((seen.advantages * seen.d).mean(-1), seen.policy))
    seen = noised(4)
    tight = gradient(Awm(clip_range=1e-9).loss(seen)[0], seen.policy)
    beyond = torch.where(seen.advantages > 0, seen.d < seen.d_ref, seen.d > seen.d_ref)
    assert (tight[beyond] == 0).all()
    assert (tight[~beyond].abs().amax((-2, -1)) > 0).all()


def test_rwr_as_written_and_its_limits() -> None:
    seen = noised(4)
    weights = (seen.rewards / 0.1).exp()
    close(Rwr(tau=0.1).loss(seen)[0], (weights * seen.d).sum(-1) / weights.sum(-1))
    close(Rwr(tau=1e-9).loss(seen)[0], Sft().loss(seen)[0])
    close(Rwr(tau=1e9).loss(seen)[0], seen.d.mean(-1), 1e-8)


def test_sft_sees_the_best_image_only() -> None:
    seen = noised(4)
    loss, _ = Sft().loss(seen)
    close(loss, (seen.v[:, 0] - seen.policy[:, 0]).square().mean((-2, -1)))
    assert (gradient(loss, seen.policy)[:, 1:] == 0).all()


@pytest.mark.parametrize("k", [2, 4, 5])
def test_tabgraa_sets_one_half_against_the_other(k: int) -> None:
    seen = noised(k)
    half = k // 2
    s = -2.0 * (seen.d - seen.d_ref)
    margin = s[:, :half].sum(-1) / half - 0.3 * s[:, k - half :].sum(-1) / half
    close(Tabgraa(beta=2.0, low_weight=0.3).loss(seen)[0], 1 - 1 / (1 + torch.exp(-margin)))
    s = s.detach().requires_grad_()
    slope = gradient(tabgraa_loss(s, 1.0), s)
    assert (slope[:, :half] < 0).all()
    assert (slope[:, half : k - half] == 0).all()
    assert (slope[:, k - half :] > 0).all()
