"""Objectives by name; a user's own by `module:Class`."""

import hashlib
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields, is_dataclass
from inspect import isabstract
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from gdro.common.errors import UserError, did_you_mean
from gdro.common.plugins import load_own
from gdro.common.validation import expected, show
from gdro.objectives.base import ForwardObjective, Objective, TrajectoryObjective
from gdro.objectives.forward.awm import Awm
from gdro.objectives.forward.dgpo import Dgpo
from gdro.objectives.forward.dpo import Dpo
from gdro.objectives.forward.gdro import Gdro, Rank, Top1
from gdro.objectives.forward.lair import Lair
from gdro.objectives.forward.nft import Nft
from gdro.objectives.forward.rwr import Rwr
from gdro.objectives.forward.sft import Sft
from gdro.objectives.forward.tabgraa import Tabgraa
from gdro.objectives.trajectory.dance_grpo import DanceGrpo
from gdro.objectives.trajectory.ddpo import Ddpo
from gdro.objectives.trajectory.flow_grpo import FlowGrpo
from gdro.objectives.trajectory.grpo_guard import GrpoGuard

FORWARD = (Gdro, Rank, Top1, Dpo, Lair, Dgpo, Nft, Awm, Rwr, Sft, Tabgraa)
TRAJECTORY = (FlowGrpo, GrpoGuard, DanceGrpo, Ddpo)
OBJECTIVES: dict[str, type[Any]] = {kind.name: kind for kind in (*FORWARD, *TRAJECTORY)}
FIELD = "train.objective"
KINDS = (ForwardObjective, TrajectoryObjective)


def objective_class(name: str) -> type[Any]:
    """The class named by `name` or `module:Class`; UserError if there is none or it is not an objective."""
    if ":" not in name:
        if name not in OBJECTIVES:
            raise UserError(
                f'{FIELD}: "{name}" is neither an objective nor a module:Class{did_you_mean(name, OBJECTIVES)}'
            )
        return OBJECTIVES[name]
    found, _ = load_own(name, FIELD, "class")
    if not (isinstance(found, type) and issubclass(found, KINDS) and is_dataclass(found)):
        raise UserError(
            f'{FIELD}: "{name}" is not an objective; expected a frozen dataclass that extends ForwardObjective or '
            "TrajectoryObjective from gdro.objectives.base"
        )
    if isabstract(found):
        raise UserError(f'{FIELD}: "{name}" has no loss; expected a method loss(self, batch)')
    return found


def hyperparameters(kind: type[Any]) -> list[str]:
    """The names of an objective's hyperparameters."""
    return [field.name for field in fields(kind)]


ALL_HYPERPARAMETERS = frozenset(name for kind in OBJECTIVES.values() for name in hyperparameters(kind))


def make_objective(name: str, given: Mapping[str, Any]) -> Objective:
    """The objective `name` with the hyperparameters `given`; any that is absent or None gets its published default.

    Raises UserError for an unknown name, a value out of range or of the wrong type, a hyperparameter the objective
    lacks, or values that contradict each other.
    """
    kind = objective_class(name)
    own = hyperparameters(kind)
    values = {field: value for field, value in given.items() if value is not None}
    for field, value in values.items():
        if field not in own:
            raise UserError(
                f'train.{field} is {show(value)}, which objective "{name}" does not have; '
                f"expected one of {', '.join(own) or 'none'}"
            )
    try:
        checked = hyperparameter_model(kind).model_validate(values, strict=True)
        objective: Any = kind(**{field: getattr(checked, field) for field in own})
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        wanted = dict.fromkeys(expected(one) for one in error.errors(include_url=False) if one["loc"] == problem["loc"])
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"train.{where} is {show(problem['input'])}; expected {' or '.join(wanted)}") from None
    if "advantage_exponent" in own and (objective.advantage == "slas") != (objective.advantage_exponent > 0):
        raise UserError(
            f"train.advantage_exponent is {objective.advantage_exponent} and train.advantage {objective.advantage}; "
            "expected more than 0 with slas, and 0 with any other"
        )
    return objective


def hyperparameter_model(kind: type[Any]) -> type[BaseModel]:
    """The hyperparameters of an objective as pydantic fields, with their ranges, descriptions and defaults."""
    hints = get_type_hints(kind, include_extras=True)
    defaults = {field.name: ... if field.default is MISSING else field.default for field in fields(kind)}
    own: dict[str, Any] = {name: (hints[name], default) for name, default in defaults.items()}
    return create_model(kind.__name__, __config__=ConfigDict(extra="forbid", allow_inf_nan=False), **own)


def name_of(objective: Objective) -> str:
    """Its name in `train.objective`: a built-in name or, for a user's own, module:Class."""
    kind = type(objective)
    return kind.name if OBJECTIVES.get(getattr(kind, "name", "")) is kind else f"{kind.__module__}:{kind.__qualname__}"


def spec_of(objective: Objective) -> dict[str, Any]:
    """The objective as the configuration stores it: its name and every hyperparameter."""
    return {"name": name_of(objective), **asdict(objective)}


def source_version(objective: Objective) -> str | None:
    """A digest of the source file of a user's own objective; None for gdro's."""
    name = name_of(objective)
    if ":" not in name:
        return None
    return hashlib.sha256(Path(load_own(name, FIELD, "class")[1]).read_bytes()).hexdigest()[:12]
