"""Every number of a configuration and of the command line has bounds, and one outside is refused in one line."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from toy_groups import SAMPLING, write_toy

from gdro.cli import parsers
from gdro.common.errors import UserError
from gdro.common.validation import MAX_SEED, integer, number
from gdro.models import load_model
from gdro.objectives.registry import OBJECTIVES, hyperparameter_model
from gdro.runner.config import RunConfig, validate
from gdro.stages.train import train
from gdro.tools.comparison import spec
from gdro.training.config import TrainConfig

BASE: dict[str, Any] = {
    "sample": {"prompts": "tiny:ocr:train:4"},
    "evaluate": {"prompts": "tiny:ocr:test:4"},
}
# what else a field needs for its own value to be looked at
WITH: dict[str, dict[str, Any]] = {
    "sample.noise_level": {"sampler": "flow_grpo"},
    "sample.window_size": {"sampler": "flow_grpo", "window": "fixed"},
    "sample.window_start": {"sampler": "flow_grpo", "window": "fixed", "window_size": 1},
    "sample.window_interval": {"sampler": "flow_grpo", "window": "sliding", "window_size": 1},
    "train.kl_weight": {"objective": "nft"},
    "train.mix": {"objective": "nft"},
    "train.clip_range": {"objective": "awm"},
    "train.advantage_exponent": {"objective": "awm", "advantage": "slas"},
    "train.regularizer": {"objective": "lair"},
    "train.low_weight": {"objective": "tabgraa"},
}


def numbers(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Dotted name and description of every field that takes a number."""
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from numbers(field.annotation, f"{prefix}{name}.")
        elif {int, float} & {field.annotation, *get_args(field.annotation)}:
            yield prefix + name, field


FIELDS = dict(numbers(RunConfig))
for objective in OBJECTIVES.values():
    FIELDS |= numbers(hyperparameter_model(objective), "train.")


def test_there_are_numbers_to_look_at() -> None:
    assert len(FIELDS) > 55
    assert {"seed", "sample.height", "train.learning_rate", "evaluate.bootstrap_samples", "rounds.keep"} <= set(FIELDS)


@pytest.mark.parametrize("kind", [RunConfig, spec.Task, spec.Method, spec.Search, spec.Quick])
def test_every_number_has_both_bounds(kind: type[BaseModel]) -> None:
    for name, field in numbers(kind):
        bounds = {type(one) for one in field.metadata}
        assert bounds & {Ge, Gt}, f"{name} has no lower bound"
        assert bounds & {Le, Lt}, f"{name} has no upper bound"


@pytest.mark.parametrize("name", FIELDS)
def test_an_absurd_number_is_refused_by_the_fields_name(name: str) -> None:
    section, _, field = name.rpartition(".")
    for value in (-(2**63), 2**63, -1e300, 1e300):
        if isinstance(value, float) and float not in {
            FIELDS[name].annotation,
            *get_args(FIELDS[name].annotation),
        }:
            continue
        data = {key: dict(own) for key, own in BASE.items()}
        part = data.setdefault(section, {}) if section else data
        part |= WITH.get(name, {}) | {field: value}
        with pytest.raises(UserError, match=rf"^{name.replace('.', '[.]')} is [^\n]*; expected [^\n]*$"):
            validate(data)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("seed", MAX_SEED + 1),
        ("evaluate.bootstrap_samples", 2**63),
        ("train.reference_draws", 2**63),
        ("train.rank", 10**6),
        ("sample.guidance_scale", 1e300),
        ("train.max_grad_norm", 1e-300),
        ("train.learning_rate", 1e-300),
        ("train.tau", 1e-300),
        ("sample.height", 10**9),
    ],
)
def test_what_ended_in_a_traceback_is_refused(name: str, value: float) -> None:
    section, _, field = name.rpartition(".")
    data = {key: dict(own) for key, own in BASE.items()}
    (data.setdefault(section, {}) if section else data)[field] = value
    with pytest.raises(UserError, match=rf"^{name} is "):
        validate(data)


def test_sizes_of_buckets_have_bounds() -> None:
    with pytest.raises(UserError, match=r"^sample\.buckets is "):
        validate(BASE | {"sample": {"prompts": "x.txt", "buckets": [[10**9, 64]]}})


def test_every_number_of_the_command_line_has_bounds() -> None:
    found = 0
    for command in parsers()[1].values():
        for action in command._actions:
            assert action.type not in (int, float), f"{action.option_strings} has no bounds"
            found += getattr(action.type, "__qualname__", "").startswith("_between")
    assert found >= 15
    assert integer(0, 9)("7") == 7
    assert number(0, 9)("0.5") == 0.5
    for kind in (integer(0, 9), number(0, 9)):
        for text in ("-1", "10", "1e300", "nan", "x", "9" * 5000):
            with pytest.raises(argparse.ArgumentTypeError, match=r"^it is .{1,80}; expected an? .* from 0 to 9$"):
                kind(text)


def test_the_smallest_learning_rate_trains_in_bfloat16(flux_folder: Path, tmp_path: Path) -> None:
    """Its first update is lost in bfloat16's rounding, which is no sign of an adapter without effect."""
    model = load_model(str(flux_folder), device=torch.device("cpu"), dtype=torch.bfloat16)
    toy = write_toy(tmp_path, model, groups=2, images=3)
    config = TrainConfig(k=2, rank=2, groups_per_step=1, max_train_steps=2, validation_steps=0, learning_rate=1e-8)
    train(config, model, *toy, tmp_path / "run", seed=0, sampling=SAMPLING)
    assert (tmp_path / "run" / "checkpoints" / "step-000002").is_dir()
