"""Stochastic sampling as configured: published defaults made explicit, and no field that would be ignored."""

from typing import Any

import pytest

from gdro.common.errors import UserError
from gdro.runner.config import validate
from gdro.samplers.settings import Generation

WINDOWED = {"sampler": "flow_grpo", "num_inference_steps": 10}


def configured(**fields: Any) -> dict[str, Any]:
    return {"sample": {"prompts": "a.txt", **fields}, "evaluate": {"prompts": "b.txt"}}


@pytest.mark.parametrize(
    ("given", "resolved"),
    [
        ({}, {"sampler": "ode", "noise_level": None, "window": "all", "window_size": None, "shared_noise": False}),
        ({"sampler": "flow_grpo"}, {"noise_level": 0.7, "window": "all", "window_start": None}),
        ({"sampler": "dance_grpo", "shared_noise": True}, {"noise_level": 0.3, "shared_noise": True}),
        ({"sampler": "flow_cps", "noise_level": None}, {"noise_level": 0.7}),
        ({"sampler": "flow_cps", "noise_level": 1.0}, {"noise_level": 1.0}),
        ({**WINDOWED, "window": "fixed", "window_size": 4}, {"window_start": 0, "window_interval": None}),
        ({**WINDOWED, "window": "fixed", "window_size": 4, "window_start": 5}, {"window_start": 5}),
        ({**WINDOWED, "window": "random", "window_size": 9}, {"window_start": None, "window_interval": None}),
        ({**WINDOWED, "window": "sliding", "window_size": 4}, {"window_start": None, "window_interval": 1}),
    ],
)
def test_what_is_left_out_is_made_explicit_and_read_back(given: dict[str, Any], resolved: dict[str, Any]):
    config = validate(configured(**given) | {"rounds": {"train_steps": 1}})
    assert {name: getattr(config.sample, name) for name in resolved} == resolved
    assert validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"buckets": [[64]]}, "sample.buckets is [64]; expected "),
        ({"buckets": [[64, 0]]}, "sample.buckets is 0; expected "),
        ({"buckets": [[64, 64], [512, 512]]}, "sample.buckets is [[64, 64], [512, 512]]; expected each size once"),
        ({"noise_level": 0.5}, "sample.noise_level is 0.5; expected null with sampler ode"),
        ({"sampler": "ode", "window_size": 3}, "sample.window_size is 3; expected null with sampler ode"),
        ({"window": "random"}, 'sample.window is "random"; expected "all" with sampler ode'),
        ({"window_start": 0}, "sample.window_start is 0; expected null with sampler ode"),
        ({"window_interval": 1}, "sample.window_interval is 1; expected null with sampler ode"),
        ({"shared_noise": True}, "sample.shared_noise is true; expected false with sampler ode"),
        ({"sampler": "flow_gpro"}, 'sample.sampler is "flow_gpro"; expected "ode", "flow_grpo"'),
        (
            {**WINDOWED, "noise_level": 0.0},
            "sample.noise_level is 0.0; expected a number greater than or equal to 0.001",
        ),
        ({"sampler": "flow_cps", "noise_level": 1.2}, "sample.noise_level is 1.2; expected a number from 0 to 1"),
        ({**WINDOWED, "window_size": 4}, "sample.window_size is 4; expected null with window all"),
        ({**WINDOWED, "window": "fixed"}, "sample.window_size is null; expected an integer from 1 to 9"),
        (
            {**WINDOWED, "window": "random", "window_size": 10},
            "sample.window_size is 10; expected an integer from 1 to 9: the last of 10 steps is never stochastic",
        ),
        (
            {**WINDOWED, "window": "fixed", "window_size": 4, "window_start": 6},
            "sample.window_start is 6; expected an integer from 0 to 5",
        ),
        (
            {**WINDOWED, "window": "random", "window_size": 4, "window_start": 1},
            "sample.window_start is 1; expected null unless window is fixed",
        ),
        (
            {**WINDOWED, "window": "fixed", "window_size": 4, "window_interval": 1},
            "sample.window_interval is 1; expected null unless window is sliding",
        ),
        (
            {"sampler": "flow_grpo", "scheduler": "UniPCMultistepScheduler"},
            'sample.sampler is "flow_grpo"; expected ode with scheduler UniPCMultistepScheduler',
        ),
        (
            {"sampler": "flow_grpo", "num_inference_steps": 1},
            'sample.sampler is "flow_grpo"; expected ode with num_inference_steps 1',
        ),
        (
            {"sampler": "flow_grpo", "num_inference_steps": 0, "window": "fixed", "window_size": 4},
            "sample.num_inference_steps is 0; expected a number greater than or equal to 1",
        ),
    ],
)
def test_a_field_that_would_be_ignored_or_lies_outside_is_refused(given: dict[str, Any], message: str):
    with pytest.raises(UserError) as error:
        validate(configured(**given))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_deterministic_drops_all_that_is_stochastic():
    """As a configuration that never had it, which may also have steps too few for the window."""
    shared = {"guidance_scale": 2.0, "height": 64, "width": 32}
    settings = Generation(
        sampler="dance_grpo", shared_noise=True, window="sliding", window_size=4, window_interval=3, **shared
    )
    assert settings.deterministic(num_inference_steps=3, images_per_prompt=2) == Generation(
        num_inference_steps=3, images_per_prompt=2, **shared
    )
    plain = Generation(**shared)
    assert plain.deterministic() == plain
