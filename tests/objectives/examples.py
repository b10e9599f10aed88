"""Small random inputs of objectives, float64."""

import torch
from torch import Tensor

from gdro.objectives.base import Noised, Transition


def noised(k: int = 4, groups: int = 3, *, policy: Tensor | None = None, distance: float = 0.3) -> Noised:
    """Groups whose reference and base lie `distance` from the policy; the policy requires a gradient."""
    generator = torch.Generator().manual_seed(k)
    shape = (groups, k, 3, 2)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x0, eps, own, reference, base = (normal() for _ in range(5))
    t = torch.rand(groups, k, generator=generator, dtype=torch.float64) * 0.9 + 0.05
    rewards = torch.rand(groups, k, generator=generator, dtype=torch.float64).sort(-1, descending=True).values
    advantages = (rewards - rewards.mean(-1, keepdim=True)) / rewards.std(-1, correction=0, keepdim=True)
    theta = own if policy is None else policy
    time = t[..., None, None]
    return Noised(
        rewards=rewards,
        advantages=advantages,
        t=t,
        x_t=(1 - time) * x0 + time * eps,
        v=eps - x0,
        policy=theta.clone().requires_grad_(),
        reference=own + distance * reference,
        base=own + distance * base,
    )


def transition(n: int = 5, *, moved: float = 0.1, noise: float = 0.3, dt: float = -0.2) -> Transition:
    """A step of n images sampled under `old_mean`, seen by a policy whose mean is `moved` std away and a leaf."""
    generator = torch.Generator().manual_seed(n)
    shape = (n, 3, 2)
    eps, shift, base = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    old_mean = torch.randn(shape, generator=generator, dtype=torch.float64)
    std = torch.tensor(noise, dtype=torch.float64)
    mean = (old_mean + moved * std * shift).requires_grad_()
    x_next = old_mean + std * eps

    def log_prob(mu: Tensor) -> Tensor:
        return torch.distributions.Normal(mu, std).log_prob(x_next).flatten(1).mean(1)

    advantage = torch.randn(n, generator=generator, dtype=torch.float64)
    return Transition(
        log_prob=log_prob(mean),
        old_log_prob=log_prob(old_mean),
        advantage=advantage,
        mean=mean,
        std=std,
        dt=dt,
        ratio_scale=1.0,
        kl_scale=-dt,
        base_mean=old_mean + std * base,
        old_mean=old_mean,
    )


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    """d (sum of `loss`) / d leaf."""
    (found,) = torch.autograd.grad(loss.sum(), leaf, retain_graph=True)
    return found
