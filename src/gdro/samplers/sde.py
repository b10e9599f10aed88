"""Stochastic steps for policy gradients, and their log-probabilities.

x_t = (1 - t) x0 + t eps, v = eps - x0, so x0_hat = x - t v and eps_hat = x + (1 - t) v; the score is -eps_hat / t.
Time decreases: t_next < t, dt = t_next - t < 0. Every step is the ODE's Euler step plus a correction along eps_hat that
makes room for the new noise, x' = mean + std n with n ~ N(0, I):

    mean = x + v dt + c eps_hat,    c depends on dt and is 0 without noise

so a noise level of 0 gives exactly the Euler step, to the last bit. x and v are (n, tokens, channels), float32 (or
float64, for tests); t and t_next are floats, 0-dimensional or (n,). `std` is the full standard deviation of the step,
including sqrt(-dt), 0-dimensional or (n, 1, 1).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, float | Tensor, float | Tensor, float], tuple[Tensor, Tensor]]


def flow_grpo_step(
    x: Tensor, v: Tensor, t: float | Tensor, t_next: float | Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """(mean, std) of Flow-GRPO (2505.05470): dx = [v + s^2 / (2 t) eps_hat] dt + s dw, s = a sqrt(t / (1 - t)).

    `noise_level` is a. Preserves the ODE's marginals as steps shrink. s is infinite at t = 1; there, as in the authors'
    code, t_next replaces t in 1 - t.
    """
    t, t_next = _column(t, x), _column(t_next, x)
    dt = t_next - t
    variance = noise_level**2 * t / (1 - torch.where(t < 1, t, t_next))
    return x + v * dt + variance * dt / (2 * t) * (x + (1 - t) * v), torch.sqrt(variance * -dt)


def dance_grpo_step(
    x: Tensor, v: Tensor, t: float | Tensor, t_next: float | Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """(mean, std) of DanceGRPO (2505.07818): dx = [v - eta^2 / 2 score] dt + eta dw.

    `noise_level` is the constant eta; score = -(x - (1 - t) x0_hat) / t^2 = -eps_hat / t. Preserves the ODE's marginals
    as steps shrink.
    """
    t, t_next = _column(t, x), _column(t_next, x)
    dt = t_next - t
    return x + v * dt + noise_level**2 * dt / (2 * t) * (x + (1 - t) * v), noise_level * torch.sqrt(-dt)


def flow_cps_step(
    x: Tensor, v: Tensor, t: float | Tensor, t_next: float | Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """(mean, std) of Flow-CPS (2509.05952): mean = (1 - t') x0_hat + sqrt(t'^2 - std^2) eps_hat, std = t' sin(a pi/2).

    `noise_level` is a, in [0, 1]. Preserves the coefficients of the interpolation (1 - t' of signal, t'^2 of old plus
    new noise) rather than the marginals: no step leaves noise behind, however long it is. Where x0_hat equals the
    image, the marginals are exact too.
    """
    t, t_next = _column(t, x), _column(t_next, x)
    angle = noise_level * math.pi / 2
    # sqrt(t'^2 - std^2) = t' cos(angle), minus the t' already in Euler's step; 1 - cos a = 2 sin^2(a / 2)
    correction = -2 * math.sin(angle / 2) ** 2 * t_next
    return x + v * (t_next - t) + correction * (x + (1 - t) * v), math.sin(angle) * t_next


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """log N(x_next; mean, std^2) averaged over elements, as in Flow-GRPO's code; (n,). Not finite if std is 0."""
    density = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def ratio_scale(sampler: str, std: Tensor) -> Tensor:
    """The sampler's authors' factor on a difference of two `log_prob`; () or (n,).

    Flow-CPS's code drops the constants and the division by 2 std^2, so its log-ratio is the difference of mean
    squares; densities would weight the ninth of ten steps 10,000 times as much as the first.
    """
    return (2 * std.square() if sampler == "flow_cps" else torch.ones_like(std)).flatten().squeeze()


def kl_scale(sampler: str, dt: float | Tensor) -> float | Tensor:
    """The sampler's authors' factor on the KL of two steps of equal std: -dt, because their std excludes sqrt(-dt);
    1 for Flow-CPS, whose std is the full one."""
    return 1.0 if sampler == "flow_cps" else -dt


STEPS: dict[str, Step] = {"flow_grpo": flow_grpo_step, "dance_grpo": dance_grpo_step, "flow_cps": flow_cps_step}

PUBLISHED_NOISE = {"flow_grpo": 0.7, "dance_grpo": 0.3, "flow_cps": 0.7}


def _column(t: float | Tensor, x: Tensor) -> Tensor:
    """`t` in x's precision and broadcastable to x: 0-dimensional, or (n, 1, 1) for one time per image."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t if t.ndim == 0 else t[:, None, None]
