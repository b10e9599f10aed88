"""gdro: post-train text-to-image flow models on rewards, offline, from groups of their own images.

A whole run, which checks everything first and resumes where it stopped:

    config = gdro.load_config("demo", {"train.k": 4})
    print(gdro.run(config, "runs/mine"))

Or stage by stage: `load_prompts`, `load_model`, `load_reward`, then `sample_groups`, `score_groups`, `train`, `export`,
`evaluate`. What they take and give is files: `GroupStore` reads the groups. A mistake in the input is a `UserError` of
one line. An objective, which is `train.objective` of a configuration, is one of the classes below, or a frozen
dataclass of your own that extends `ForwardObjective` or `TrajectoryObjective`.

Names are imported when first used, so that `import gdro` costs next to nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gdro.common.errors import UserError
    from gdro.common.prompts import Prompt
    from gdro.evaluation.measure import EvaluateConfig
    from gdro.groups.sampling import sample_groups
    from gdro.groups.scoring import score_groups
    from gdro.groups.store import GroupStore
    from gdro.models.base import FlowModel
    from gdro.models.loading import load_model
    from gdro.objectives.base import ForwardObjective, TrajectoryObjective
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
    from gdro.rewards.registry import load_judge, load_reward
    from gdro.runner.config import RunConfig, load_config
    from gdro.runner.pipeline import run
    from gdro.runner.prompt_sets import load_prompts
    from gdro.samplers.settings import Generation
    from gdro.stages.evaluate import evaluate
    from gdro.stages.export import export
    from gdro.stages.train import train
    from gdro.training.config import TrainConfig

__version__ = "0.1.0"

_HOMES = {
    "Awm": "gdro.objectives.forward.awm",
    "DanceGrpo": "gdro.objectives.trajectory.dance_grpo",
    "Ddpo": "gdro.objectives.trajectory.ddpo",
    "Dgpo": "gdro.objectives.forward.dgpo",
    "Dpo": "gdro.objectives.forward.dpo",
    "EvaluateConfig": "gdro.evaluation.measure",
    "FlowGrpo": "gdro.objectives.trajectory.flow_grpo",
    "FlowModel": "gdro.models.base",
    "ForwardObjective": "gdro.objectives.base",
    "Gdro": "gdro.objectives.forward.gdro",
    "Generation": "gdro.samplers.settings",
    "GroupStore": "gdro.groups.store",
    "GrpoGuard": "gdro.objectives.trajectory.grpo_guard",
    "Lair": "gdro.objectives.forward.lair",
    "Nft": "gdro.objectives.forward.nft",
    "Prompt": "gdro.common.prompts",
    "Rank": "gdro.objectives.forward.gdro",
    "RunConfig": "gdro.runner.config",
    "Rwr": "gdro.objectives.forward.rwr",
    "Sft": "gdro.objectives.forward.sft",
    "Tabgraa": "gdro.objectives.forward.tabgraa",
    "Top1": "gdro.objectives.forward.gdro",
    "TrainConfig": "gdro.training.config",
    "TrajectoryObjective": "gdro.objectives.base",
    "UserError": "gdro.common.errors",
    "evaluate": "gdro.stages.evaluate",
    "export": "gdro.stages.export",
    "load_config": "gdro.runner.config",
    "load_judge": "gdro.rewards.registry",
    "load_model": "gdro.models.loading",
    "load_prompts": "gdro.runner.prompt_sets",
    "load_reward": "gdro.rewards.registry",
    "run": "gdro.runner.pipeline",
    "sample_groups": "gdro.groups.sampling",
    "score_groups": "gdro.groups.scoring",
    "train": "gdro.stages.train",
}
__all__ = [
    "Awm",
    "DanceGrpo",
    "Ddpo",
    "Dgpo",
    "Dpo",
    "EvaluateConfig",
    "FlowGrpo",
    "FlowModel",
    "ForwardObjective",
    "Gdro",
    "Generation",
    "GroupStore",
    "GrpoGuard",
    "Lair",
    "Nft",
    "Prompt",
    "Rank",
    "RunConfig",
    "Rwr",
    "Sft",
    "Tabgraa",
    "Top1",
    "TrainConfig",
    "TrajectoryObjective",
    "UserError",
    "evaluate",
    "export",
    "load_config",
    "load_judge",
    "load_model",
    "load_prompts",
    "load_reward",
    "run",
    "sample_groups",
    "score_groups",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
