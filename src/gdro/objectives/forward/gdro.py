"""Group-wise Direct Reward Optimization: pure functions on (..., k) tensors, one row a group, best image first.

All three objectives are cross-entropies of the policy's Plackett-Luce factors
p_i(j) = e^{s_j} / sum_{m>=i} e^{s_m}, j >= i, against targets q_i (docs/design.md; the GDRO paper):
soft targets give GDRO, one-hot targets the rank-only loss, the first row alone the top-1 cross-entropy.
Rewards must come in descending order; `order_by_reward` gives it, ties broken at random.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from gdro.objectives.base import Loss, Noised, Reference, Use, implicit_reward

NAMES = ("gdro", "rank", "top1")


@dataclass(frozen=True)
class Gdro:
    """L_GDRO + gamma d_top-1; defaults: the paper's for OCR."""

    beta: float = 12.0
    tau: float = 0.05
    gamma: float = 0.5
    reference: Reference = "base"
    name: ClassVar[str] = "gdro"
    kind: ClassVar[Literal["forward"]] = "forward"
    uses_reference: ClassVar[Use] = "error"
    uses_base: ClassVar[bool] = False
    fixed_k: ClassVar[int | None] = None

    def loss(self, seen: Noised) -> Loss:
        return _regularized(seen, soft_targets(seen.rewards, self.tau), self.beta, self.gamma)

    def start_loss(self, k: int) -> float | None:
        return start_loss(self.name, k)


@dataclass(frozen=True)
class Rank:
    """GDRO with hard targets: the Plackett-Luce likelihood of the order (Diffusion-LPO, 2510.01540) + gamma d_top-1."""

    beta: float = 12.0
    gamma: float = 0.5
    reference: Reference = "base"
    name: ClassVar[str] = "rank"
    kind: ClassVar[Literal["forward"]] = "forward"
    uses_reference: ClassVar[Use] = "error"
    uses_base: ClassVar[bool] = False
    fixed_k: ClassVar[int | None] = None

    def loss(self, seen: Noised) -> Loss:
        return _regularized(seen, rank_targets(seen.rewards), self.beta, self.gamma)

    def start_loss(self, k: int) -> float | None:
        return start_loss(self.name, k)


@dataclass(frozen=True)
class Top1:
    """The top-1 cross-entropy, GDRO's first row alone, + gamma d_top-1."""

    beta: float = 12.0
    tau: float = 0.05
    gamma: float = 0.5
    reference: Reference = "base"
    name: ClassVar[str] = "top1"
    kind: ClassVar[Literal["forward"]] = "forward"
    uses_reference: ClassVar[Use] = "error"
    uses_base: ClassVar[bool] = False
    fixed_k: ClassVar[int | None] = None

    def loss(self, seen: Noised) -> Loss:
        return _regularized(seen, targets(self.name, seen.rewards, self.tau), self.beta, self.gamma)

    def start_loss(self, k: int) -> float | None:
        return start_loss(self.name, k)


def order_by_reward(r: Tensor, generator: torch.Generator) -> Tensor:
    """Indices (..., k) that put rewards r (..., k) in descending order, equal rewards in random order."""
    shuffle = torch.rand(r.shape, generator=generator).argsort(-1).to(r.device)
    order = r.gather(-1, shuffle).argsort(dim=-1, descending=True, stable=True)
    return shuffle.gather(-1, order)


def soft_targets(r: Tensor, tau: float) -> Tensor:
    """q_i(j) = softmax of r / tau over {i..k}, 0 for j < i; descending r (..., k) -> (..., k - 1, k) float64.

    Subtracting r_i, the largest of its row, keeps every exponent <= 0 however small tau > 0 is.
    """
    r = r.double()
    gap = (r.unsqueeze(-2) - r[..., :-1, None]) / tau
    return gap.masked_fill(_before(r.shape[-1], r.device), -math.inf).softmax(-1)


def rank_targets(r: Tensor) -> Tensor:
    """q_i = one-hot at i, the limit tau -> 0 of `soft_targets` for distinct rewards; (..., k) -> (..., k - 1, k)."""
    k = r.shape[-1]
    return torch.eye(k, dtype=torch.float64, device=r.device)[:-1].expand(*r.shape[:-1], k - 1, k)


def targets(objective: str, r: Tensor, tau: float) -> Tensor:
    """Targets q (..., rows, k) of an objective for descending rewards r (..., k); one row for top1, else k - 1."""
    if objective == "gdro":
        return soft_targets(r, tau)
    if objective == "rank":
        return rank_targets(r)
    if objective == "top1":
        return soft_targets(r, tau)[..., :1, :]
    raise ValueError(f"objective: {objective!r}, expected one of {', '.join(NAMES)}")


def listwise_loss(s: Tensor, q: Tensor) -> Tensor:
    """sum_i [log sum_{m>=i} e^{s_m} - sum_j q_i(j) s_j]; s (..., k), q (..., rows, k) -> (...)."""
    rows = q.shape[-2]
    linear = (q.to(s.dtype) * s.unsqueeze(-2)).sum(-1)
    return (_suffixes(s)[..., :rows, :].logsumexp(-1) - linear).sum(-1)


def gdro_loss(s: Tensor, r: Tensor, tau: float) -> Tensor:
    """L_GDRO per group: `listwise_loss` with soft targets; s, r (..., k) -> (...).

    At s = 0 it is ln k!; its optimum is finite, s_i - s_j = (r_i - r_j) / tau.
    """
    return listwise_loss(s, soft_targets(r, tau))


def rank_loss(s: Tensor) -> Tensor:
    """Plackett-Luce negative log-likelihood of the reward order; s (..., k) -> (...). For k = 2 it is DPO."""
    return listwise_loss(s, rank_targets(s))


def top1_loss(s: Tensor, r: Tensor, tau: float) -> Tensor:
    """Cross-entropy of softmax s against softmax r / tau over the whole group; s, r (..., k) -> (...)."""
    return listwise_loss(s, targets("top1", r, tau))


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


def start_loss(objective: str, k: int) -> float:
    """The loss of any group when policy = reference (s = 0): ln k! for gdro and rank, ln k for top1."""
    return math.log(k) if objective == "top1" else math.lgamma(k + 1)


def diagnostics(s: Tensor, q: Tensor) -> dict[str, Tensor]:
    """Per-group figures, in nats, detached; s (..., k), q (..., rows, k) -> each (...).

    entropy_p, entropy_q: summed over the rows i, so ln k! when uniform; kl: sum_i KL(q_i || p_i), the loss above
    its floor entropy_q; spread_s: standard deviation of s in the group.
    """
    s, q = s.detach(), q.to(s.dtype)
    p = _suffixes(s)[..., : q.shape[-2], :].softmax(-1)
    entropy_q = torch.special.entr(q).sum((-2, -1))
    return {
        "entropy_p": torch.special.entr(p).sum((-2, -1)),
        "entropy_q": entropy_q,
        "kl": listwise_loss(s, q) - entropy_q,
        "spread_s": s.std(-1, correction=0),
    }


def _regularized(seen: Noised, q: Tensor, beta: float, gamma: float) -> Loss:
    """listwise loss + gamma d_top-1 per group, and the figures of both."""
    s = implicit_reward(seen.d, seen.d_ref, beta)
    q = q.to(s)
    ranking, top1 = listwise_loss(s, q), seen.d[:, 0]
    return ranking + gamma * top1, {
        "loss_rank": ranking.detach(),
        "loss_top1": top1.detach(),
        **diagnostics(s, q),
    }


def _before(k: int, device: torch.device) -> Tensor:
    """(k - 1, k) mask of the entries j < i."""
    return torch.ones(k - 1, k, dtype=torch.bool, device=device).tril(-1)


def _suffixes(s: Tensor) -> Tensor:
    """Row i holds s over {i..k} and -inf before; (..., k) -> (..., k - 1, k). k is small, so k^2 costs nothing."""
    k = s.shape[-1]
    return s.unsqueeze(-2).expand(*s.shape[:-1], k - 1, k).masked_fill(_before(k, s.device), -math.inf)
