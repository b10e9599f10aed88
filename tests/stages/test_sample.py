"""The section `sample` and its stage."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from gdro.common.prompts import Prompt
from gdro.groups.sampling import sample_groups
from gdro.groups.store import GroupStore
from gdro.models.flux import FluxModel
from gdro.runner.config import SampleConfig


def test_defaults_are_those_of_the_papers_setting():
    config = SampleConfig(prompts="prompts.txt")
    assert (config.images_per_prompt, config.num_inference_steps, config.guidance_scale) == (16, 28, 3.5)
    assert (config.height, config.width) == (512, 512)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("images_per_prompt", 0),
        ("num_inference_steps", "many"),
        ("guidance_scale", -1),
        ("guidance_scale", float("nan")),
        ("max_sequence_length", 513),
        ("scheduler", "DDPMScheduler"),
        ("batch_size", 0),
        ("prompts", ""),
        ("image_per_prompt", 4),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: object):
    with pytest.raises(ValidationError) as error:
        SampleConfig.model_validate({"prompts": "prompts.txt", field: value})
    assert [e["loc"] for e in error.value.errors()] == [(field,)]


def test_every_field_is_described():
    assert all(field.description for field in SampleConfig.model_fields.values())


def test_stage_writes_groups(flux: FluxModel, tmp_path: Path):
    config = SampleConfig(
        prompts="-", images_per_prompt=2, num_inference_steps=1, max_sequence_length=8, height=16, width=16
    )
    sample_groups(config, flux, [Prompt("a", "red"), Prompt("b", "blue")], tmp_path / "groups", seed=0)
    store = GroupStore(tmp_path / "groups")
    assert store.group_ids == ["a", "b"]
    assert store.image_ids("b") == ["b/0", "b/1"]
    assert store.images("a")[0].size == (16, 16)
