"""Group-wise Direct Reward Optimization: pure functions on (..., k) tensors, one row per group, best image first.

All three objectives are cross-entropies of the policy's Plackett-Luce factors
p_i(j) = e^{s_j} / sum_{m>=i} e^{s_m}, j >= i, against targets q_i (docs/design.md; the GDRO paper):
soft targets give GDRO, one-hot targets the rank-only loss, and the first row alone the top-1 cross-entropy.
Rewards must be in descending order; `order_by_reward` sorts them and breaks ties at random.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gdro.objectives.base import ForwardObjective, Loss, Noised, Use
from gdro.objectives.flow import implicit_reward
from gdro.objectives.hyperparameters import Beta, Gamma, Reference, Tau


@dataclass(frozen=True)
class Gdro(ForwardObjective):
    """L_GDRO + gamma d_top-1. Defaults: the paper's for OCR."""

    beta: Beta = 12.0
    tau: Tau = 0.05
    gamma: Gamma = 0.5
    reference: Reference = "base"
    name: ClassVar[str] = "gdro"
    uses_reference: ClassVar[Use] = "error"

    def loss(self, batch: Noised) -> Loss:
        s, top1 = implicit_reward(batch.d, batch.d_ref, self.beta), batch.d[:, 0]
        ranking = gdro_loss(s, batch.rewards, self.tau)
        return ranking + self.gamma * top1, _figures(ranking, top1, s, soft_targets(batch.rewards, self.tau))

    def start_loss(self, k: int) -> float | None:
        return math.lgamma(k + 1)


@dataclass(frozen=True)
class Rank(ForwardObjective):
    """GDRO with hard targets: the Plackett-Luce likelihood of the order (Diffusion-LPO, 2510.01540) + gamma d_top-1."""

    beta: Beta = 12.0
    gamma: Gamma = 0.5
    reference: Reference = "base"
    name: ClassVar[str] = "rank"
    uses_reference: ClassVar[Use] = "error"

    def loss(self, batch: Noised) -> Loss:
        s, top1 = implicit_reward(batch.d, batch.d_ref, self.beta), batch.d[:, 0]
        ranking = rank_loss(s)
        return ranking + self.gamma * top1, _figures(ranking, top1, s, rank_targets(batch.rewards))

    def start_loss(self, k: int) -> float | None:
        return math.lgamma(k + 1)


@dataclass(frozen=True)
class Top1(ForwardObjective):
    """The top-1 cross-entropy, GDRO's first row alone, + gamma d_top-1."""

    beta: Beta = 12.0
    tau: Tau = 0.05
    gamma: Gamma = 0.5
    reference: Reference = "base"
    name: ClassVar[str] = "top1"
    uses_reference: ClassVar[Use] = "error"

    def loss(self, batch: Noised) -> Loss:
        s, top1 = implicit_reward(batch.d, batch.d_ref, self.beta), batch.d[:, 0]
        ranking = top1_loss(s, batch.rewards, self.tau)
        return ranking + self.gamma * top1, _figures(ranking, top1, s, top1_targets(batch.rewards, self.tau))

    def start_loss(self, k: int) -> float | None:
        return math.log(k)


def order_by_reward(r: Tensor, generator: torch.Generator) -> Tensor:
    """Indices (..., k) that sort rewards r (..., k) in descending order, equal rewards in random order."""
    shuffle = torch.rand(r.shape, generator=generator).argsort(-1).to(r.device)
    order = r.gather(-1, shuffle).argsort(dim=-1, descending=True, stable=True)
    return shuffle.gather(-1, order)


def soft_targets(r: Tensor, tau: float) -> Tensor:
    """q_i(j) = softmax of r / tau over {i..k}, 0 for j < i; descending r (..., k) -> (..., k - 1, k) float64.

    Subtracting r_i, the largest in its row, keeps every exponent <= 0 no matter how small tau > 0 is.
    """
    r = r.double()
    gap = (r.unsqueeze(-2) - r[..., :-1, None]) / tau
    return gap.masked_fill(_before(r.shape[-1], r.device), -math.inf).softmax(-1)


def rank_targets(r: Tensor) -> Tensor:
    """q_i = one-hot at i, the limit tau -> 0 of `soft_targets` for distinct rewards; (..., k) -> (..., k - 1, k)."""
    k = r.shape[-1]
    return torch.eye(k, dtype=torch.float64, device=r.device)[:-1].expand(*r.shape[:-1], k - 1, k)


def top1_targets(r: Tensor, tau: float) -> Tensor:
    """q_1 alone, softmax of r / tau over the whole group; descending r (..., k) -> (..., 1, k) float64."""
    return soft_targets(r, tau)[..., :1, :]


def listwise_loss(s: Tensor, q: Tensor) -> Tensor:
    """sum_i [log sum_{m>=i} e^{s_m} - sum_j q_i(j) s_j]; s (..., k), q (..., rows, k) -> (...)."""
    rows = q.shape[-2]
    linear = (q.to(s) * s.unsqueeze(-2)).sum(-1)
    return (_suffixes(s)[..., :rows, :].logsumexp(-1) - linear).sum(-1)


def gdro_loss(s: Tensor, r: Tensor, tau: float) -> Tensor:
    """L_GDRO per group: `listwise_loss` with soft targets; s, r (..., k) -> (...).

    At s = 0 it is ln k!; its optimum is finite, s_i - s_j = (r_i - r_j) / tau.
    """
    return listwise_loss(s, soft_targets(r, tau))


def rank_loss(s: Tensor) -> Tensor:
    """Plackett-Luce negative log-likelihood of the reward order; s (..., k) -> (...). For k = 2 it is DPO.

    At s = 0 it is ln k!.
    """
    return listwise_loss(s, rank_targets(s))


def top1_loss(s: Tensor, r: Tensor, tau: float) -> Tensor:
    """Cross-entropy of softmax s against softmax r / tau over the whole group; s, r (..., k) -> (...).

    At s = 0 it is ln k.
    """
    return listwise_loss(s, top1_targets(r, tau))


def loss_weights(s: Tensor, q: Tensor) -> Tensor:
    """Detached w_j = sum_i (q_i(j) - p_i(j)); s (..., k), q (..., rows, k) -> (..., k).

    dL/ds = -w, so the gradient of a group's loss is beta sum_j w_j grad d_j.
    """
    rows = q.shape[-2]
    p = _suffixes(s.detach())[..., :rows, :].softmax(-1)
    return (q.to(s.dtype) - p).sum(-2)


def gdro_weights(s: Tensor, r: Tensor, tau: float) -> Tensor:
    """`loss_weights` of the GDRO loss; s, r (..., k) -> (..., k)."""
    return loss_weights(s, soft_targets(r, tau))


def diagnostics(s: Tensor, q: Tensor) -> dict[str, Tensor]:
    """Per-group metrics, in nats, detached; s (..., k), q (..., rows, k) -> each (...).

    entropy_p, entropy_q: summed over the rows i, so ln k! when uniform; kl: sum_i KL(q_i || p_i), the loss minus
    its floor entropy_q; spread_s: standard deviation of s within the group.
    """
    s, q = s.detach(), q.to(s)
    p = _suffixes(s)[..., : q.shape[-2], :].softmax(-1)
    entropy_q = torch.special.entr(q).sum((-2, -1))
    return {
        "entropy_p": torch.special.entr(p).sum((-2, -1)),
        "entropy_q": entropy_q,
        "kl": listwise_loss(s, q) - entropy_q,
        "spread_s": s.std(-1, correction=0),
    }


def _figures(ranking: Tensor, top1: Tensor, s: Tensor, q: Tensor) -> dict[str, Tensor]:
    return {"loss_rank": ranking.detach(), "loss_top1": top1.detach(), **diagnostics(s, q)}


def _before(k: int, device: torch.device) -> Tensor:
    """(k - 1, k) mask of the entries j < i."""
    return torch.ones(k - 1, k, dtype=torch.bool, device=device).tril(-1)


def _suffixes(s: Tensor) -> Tensor:
    """Row i holds s over {i..k} and -inf before it; (..., k) -> (..., k - 1, k). k is small, so k^2 is cheap."""
    k = s.shape[-1]
    return s.unsqueeze(-2).expand(*s.shape[:-1], k - 1, k).masked_fill(_before(k, s.device), -math.inf)
