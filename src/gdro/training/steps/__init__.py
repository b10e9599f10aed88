"""One file a kind of objective: what a step of it costs, and its gradient."""

from types import ModuleType

from gdro.objectives.base import ForwardObjective, Objective
from gdro.training.steps import forward, trajectory


def step_of(objective: Objective) -> ModuleType:
    """The step of the objective's kind: a module with `calls(learner, draws)`, `backward(learner, draws, ranked)`."""
    return forward if isinstance(objective, ForwardObjective) else trajectory
