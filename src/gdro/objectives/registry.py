"""Objectives by name."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gdro.common.errors import UserError, did_you_mean
from gdro.objectives.base import Objective
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


def own_hyperparameters(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The hyperparameters of the objective `name`, each with its published default.

    UserError for an unknown name, and for a given value (other than None) of a hyperparameter that it lacks.
    """
    if name not in OBJECTIVES:
        raise UserError(f'train.objective: "{name}" is no objective{did_you_mean(name, OBJECTIVES)}')
    own = {field.name: field.default for field in fields(OBJECTIVES[name])}
    for field, value in given.items():
        if value is not None and field not in own:
            raise UserError(
                f'train.{field} is {value}, which objective "{name}" does not have; '
                f"expected one of {', '.join(own) or 'none'}"
            )
    return own


def make_objective(name: str, hyperparameters: Mapping[str, Any]) -> Objective:
    """The objective `name`; a hyperparameter that is None or absent takes its published default.

    UserError for an unknown name, a value for a hyperparameter the objective lacks, or two that contradict each other.
    Ranges are the configuration's to check.
    """
    own = own_hyperparameters(name, hyperparameters)
    values = {field: value for field, value in hyperparameters.items() if value is not None}
    objective: Any = OBJECTIVES[name](**values)
    if "advantage_exponent" in own and (objective.advantage == "slas") != (objective.advantage_exponent > 0):
        raise UserError(
            f"train.advantage_exponent is {objective.advantage_exponent} and train.advantage {objective.advantage}; "
            "expected more than 0 with slas, and 0 with any other"
        )
    return objective
