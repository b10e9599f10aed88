"""One file per kind of objective: the cost of a step and its gradient."""

from types import ModuleType

from gdro.objectives.base import ForwardObjective, Objective
from gdro.training.steps import forward, trajectory


def step_of(objective: Objective) -> ModuleType:
    """The module for the objective's kind, with `calls(learner, draws)` and `backward(learner, draws, ranked)`."""
    return forward if isinstance(objective, ForwardObjective) else trajectory
