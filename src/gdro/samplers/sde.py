"""Stochastic steps of the samplers that policy gradients need, and their log-probabilities.

x_t = (1 - t) x0 + t eps, v = eps - x0, so x0_hat = x - t v and eps_hat = x + (1 - t) v; the score is -eps_hat / t.
Time falls: t_next < t, dt = t_next - t < 0. Every step is the ODE's Euler step and a correction along eps_hat that
makes room for the new noise, x' = mean + std n with n ~ N(0, I):

    mean = x + v dt + c eps_hat,    c dt-dependent and 0 without noise

so that a noise level of 0 gives the Euler step to the last bit. x and v are (n, tokens, channels), float32 (or float64,
for tests); t and t_next are floats, 0-dimensional or (n,). `std` is the step's whole standard deviation, sqrt(-dt)
included, 0-dimensional or (n, 1, 1).
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

    `noise_level` is a. Keeps the ODE's marginals as steps shrink. s is infinite at t = 1; there, as in the authors'
    code, the next time stands in for t in 1 - t.
    """
    t, t_next = _column(t, x), _column(t_next, x)
    dt = t_next - t
    variance = noise_level**2 * t / (1 - torch.where(t < 1, t, t_next))
    return x + v * dt + variance * dt / (2 * t) * (x + (1 - t) * v), torch.sqrt(variance * -dt)


def dance_grpo_step(
    x: Tensor, v: Tensor, t: float | Tensor, t_next: float | Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """(mean, std) of DanceGRPO (2505.07818): dx = [v - eta^2 / 2 score] dt + eta dw.

    `noise_level` is the constant eta; score = -(x - (1 - t) x0_hat) / t^2 = -eps_hat / t. Keeps the ODE's marginals as
    steps shrink.
    """
    t, t_next = _column(t, x), _column(t_next, x)
    dt = t_next - t
    return x + v * dt + noise_level**2 * dt / (2 * t) * (x + (1 - t) * v), noise_level * torch.sqrt(-dt)


def flow_cps_step(
    x: Tensor, v: Tensor, t: float | Tensor, t_next: float | Tensor, noise_level: float
) -> tuple[Tensor, Tensor]:
    """(mean, std) of Flow-CPS (2509.05952): mean = (1 - t') x0_hat + sqrt(t'^2 - std^2) eps_hat, std = t' sin(a pi/2).

    `noise_level` is a, in [0, 1]. Keeps the coefficients of the interpolation, 1 - t' of signal and t'^2 of old and new
    noise together, not the marginals: no step leaves noise behind, however long it is, and where x0_hat is the image
    itself the marginals are exact too.
    """
    t, t_next = _column(t, x), _column(t_next, x)
    angle = noise_level * math.pi / 2
    # sqrt(t'^2 - std^2) = t' cos(angle), less the t' that Euler's step holds already; 1 - cos = 2 sin^2 of the half
    correction = -2 * math.sin(angle / 2) ** 2 * t_next
    return x + v * (t_next - t) + correction * (x + (1 - t) * v), math.sin(angle) * t_next


def log_prob(x_next: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(n,): mean over elements, as in Flow-GRPO's code, of log N(x_next; mean, std^2); not finite if std is 0."""
    density = -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
    return density.flatten(1).mean(1)


def ratio_scale(sampler: str, std: Tensor) -> Tensor:
    """() or (n,): what the sampler's authors multiply a difference of two `log_prob` by.

    Flow-CPS's code leaves out the constants and the division by 2 std^2, so its log-ratio is the difference of mean
    squares; densities would weigh the ninth of ten steps 10,000 times the first.
    """
    return (2 * std.square() if sampler == "flow_cps" else torch.ones_like(std)).flatten().squeeze()


def kl_scale(sampler: str, dt: float | Tensor) -> float | Tensor:
    """What the sampler's authors multiply the KL of two steps of equal std by: -dt, for their std leaves sqrt(-dt) out;
    Flow-CPS's is the whole."""
    return 1.0 if sampler == "flow_cps" else -dt


STEPS: dict[str, Step] = {"flow_grpo": flow_grpo_step, "dance_grpo": dance_grpo_step, "flow_cps": flow_cps_step}

PUBLISHED_NOISE = {"flow_grpo": 0.7, "dance_grpo": 0.3, "flow_cps": 0.7}


def _column(t: float | Tensor, x: Tensor) -> Tensor:
    """`t` in x's precision, so that it multiplies x: 0-dimensional, or (n, 1, 1) for a time an image."""
    t = torch.as_tensor(t, dtype=x.dtype, device=x.device)
    return t if t.ndim == 0 else t[:, None, None]
