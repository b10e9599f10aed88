"""The path from image to noise, in float64, and how often each part of it is visited."""

import math

import pytest
import torch

from gdro.objectives.flow import implicit_reward, interpolate, sample_timesteps, velocity_error, velocity_target

X0, EPS = torch.randn(2, 3, 5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()


def test_the_path_is_straight_from_image_to_noise() -> None:
    assert torch.equal(interpolate(X0, EPS, torch.zeros(())), X0)
    assert torch.equal(interpolate(X0, EPS, torch.ones(())), EPS)
    t, h = torch.tensor(0.3, dtype=torch.float64), 1e-6
    slope = (interpolate(X0, EPS, t + h) - interpolate(X0, EPS, t - h)) / (2 * h)
    torch.testing.assert_close(slope, velocity_target(X0, EPS), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(interpolate(X0, EPS, t) - t * velocity_target(X0, EPS), X0)


def test_times_are_one_an_image_and_noise_may_be_shared() -> None:
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)[:, None, None]
    shared = interpolate(X0, EPS[:1], t)
    for i in range(3):
        assert torch.equal(shared[i], (1 - t[i]) * X0[i] + t[i] * EPS[0])


def test_the_error_is_a_mean_and_the_reward_its_fall() -> None:
    v = velocity_target(X0, EPS)
    assert torch.equal(velocity_error(v, v), torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(velocity_error(v, v + 2), torch.full((3,), 4.0, dtype=torch.float64))
    s = implicit_reward(velocity_error(v, v + 1), velocity_error(v, v + 2), beta=5.0)
    torch.testing.assert_close(s, torch.full((3,), 15.0, dtype=torch.float64))


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5)])
def test_logit_normal_times(mean: float, std: float) -> None:
    t = sample_timesteps(40_000, torch.Generator().manual_seed(0), distribution="logit_normal", mean=mean, std=std)
    assert 0 < float(t.min()) < float(t.max()) < 1
    logits = torch.logit(t.double())
    assert float(logits.mean()) == pytest.approx(mean, abs=4 * std / math.sqrt(40_000))
    assert float(logits.std()) == pytest.approx(std, rel=0.02)


def test_uniform_times_and_the_same_draw_from_the_same_generator() -> None:
    t = sample_timesteps(40_000, torch.Generator().manual_seed(0), distribution="uniform")
    assert float(t.mean()) == pytest.approx(0.5, abs=4 / math.sqrt(12 * 40_000))
    assert torch.equal(t, sample_timesteps(40_000, torch.Generator().manual_seed(0), distribution="uniform"))
