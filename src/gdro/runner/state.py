"""A run's state: its configuration and directory, what its stages share, and how far it is. It writes nothing.

Everything is loaded on first use.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.common.rng import torch_rng
from gdro.groups.sampling import group_id
from gdro.groups.store import GroupStore
from gdro.models import FlowModel, load_model, passes
from gdro.models.replica import Replica
from gdro.rewards.base import Judge
from gdro.rewards.derived import Scorer
from gdro.rewards.registry import load_judge, load_reward
from gdro.runner.config import RunConfig
from gdro.runner.directory import Clock
from gdro.runner.prompt_sets import load_prompts
from gdro.stages.score import STANDARD
from gdro.stages.train import Round, behavior_weights
from gdro.training.checkpoint import steps_saved, stopped_at

ROUND = ("sample", "score", "train")
STAGES = (*ROUND, "evaluate", "export", "report")


class RunState:
    """A run directory and what its stages share."""

    def __init__(self, config: RunConfig, out: Path, stages: Sequence[str] = STAGES) -> None:
        self.config, self.out, self.stages = config, out, list(stages)
        self.adapter, self.checkpoints = out / "adapter", out / "checkpoints"
        self.evaluation, self.imported = out / "evaluation.json", out / "rewards" / "imported.parquet"
        self.clock = Clock(out / "seconds.json")

    @cached_property
    def device(self) -> torch.device:
        """The device of this process; UserError if cuda is requested but unavailable."""
        gpus, local = torch.cuda.device_count(), distributed.local_size()
        if self.config.device == "cuda" and not gpus:
            raise UserError('device is "cuda", but torch finds no GPU; expected "auto" or "cpu"')
        if not gpus or self.config.device == "cpu":
            return torch.device("cpu")
        if local > gpus:
            raise UserError(
                f"LOCAL_WORLD_SIZE is {local}, but torch finds {gpus} GPUs; expected at most one process per GPU"
            )
        return torch.device("cuda", torch.cuda.current_device()) if local > 1 else torch.device("cuda")

    @cached_property
    def model(self) -> FlowModel:
        """The model, loaded on the device."""
        config = self.config
        model = load_model(
            config.model,
            device=self.device,
            dtype=self._dtype,
            quantization=config.quantization,
            sharded=config.distributed == "fsdp" and distributed.size() > 1,
        )
        if config.compile:
            model.compile()
        return model

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.config.mixed_precision == "bf16" else torch.float32

    @cached_property
    def reward(self) -> Scorer:
        """The training reward."""
        return load_reward(self.config.score.reward)

    @cached_property
    def metric(self) -> Scorer:
        """The reward for validation and evaluation."""
        other = self.config.evaluate.reward
        return self.reward if other is None else load_reward(other, "evaluate.reward")

    @cached_property
    def judge(self) -> Judge | None:
        """The judge of the evaluation; None without one."""
        return None if self.config.evaluate.judge is None else load_judge(self.config.evaluate.judge)

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """The prompts of each split that the configuration names."""
        config = self.config
        named = {
            "train": ("sample.prompts", config.sample.prompts),
            "validation": (
                "train.validation_prompts",
                config.train.validation_prompts if config.train.validates else None,
            ),
            "test": ("evaluate.prompts", config.evaluate.prompts),
        }
        return {split: load_prompts(spec, field) for split, (field, spec) in named.items() if spec is not None}

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings that generation and training must share."""
        shared = {"guidance_scale", "max_sequence_length", "height", "width", "buckets", "sampler", "noise_level"}
        return self.config.sample.model_dump(include=shared)

    @property
    def scoring(self) -> dict[str, Any]:
        """How the reward is run in validation and evaluation."""
        score = self.config.score
        return {
            "score_workers": score.workers,
            "score_batch_size": score.batch_size,
            "max_missing": score.max_missing,
            "standard": self.standard,
        }

    @property
    def standard(self) -> Path:
        """The file of a derived reward's constants."""
        return self.out / "rewards" / STANDARD

    @property
    def round(self) -> int:
        """The run's current round (from 0): that of the next step, or of the last one if training is over."""
        done = max(steps_saved(self.checkpoints), default=0)
        return self.config.rounds.of_step(max(1, done if self.is_trained() else done + 1))

    @property
    def groups(self) -> Path:
        """The groups of the current round."""
        return self._folder(self.round) / "groups"

    @property
    def scores(self) -> Path:
        """The file of rewards to train on in the current round."""
        return self._scores(self.round)

    def scored(self) -> Path | None:
        """The latest existing file of rewards."""
        files = (self._scores(number) for number in range(self.round, -1, -1))
        return next((file for file in files if file.exists()), None)

    def _folder(self, round: int) -> Path:
        return self.out / "rounds" / f"{round:04d}" if round else self.out

    def _scores(self, round: int) -> Path:
        """A round's rewards; for round 0 the imported ones, unless the reward has scored its groups itself."""
        own = self._folder(round) / "rewards" / f"{self.reward.name}.parquet"
        return self.imported if not round and self.imported.exists() and not own.exists() else own

    def due(self, round: int) -> list[Prompt]:
        """The prompts of a round: all, or the next `rounds.prompts` of an epoch; each epoch has a new order.

        Imported groups are all in round 0.
        """
        prompts, count = self.prompts["train"], self.config.rounds.prompts
        if count is None or (not round and self.imported.exists()):
            return prompts
        epoch, place = divmod(round, len(prompts) // count)
        order = torch.randperm(len(prompts), generator=torch_rng(self.config.seed, "round/prompts", epoch)).tolist()
        return [prompts[i] for i in order[place * count : (place + 1) * count]]

    def place(self, number: int) -> Round:
        """What training needs to know about a round."""
        rounds, train, sample = self.config.rounds, self.config.train, self.config.sample
        done, last = rounds.steps(number, train.max_train_steps)
        calls = sample.calls * passes(self.config.model, sample.guidance_scale)
        calls *= sample.images_per_prompt * (rounds.prompts or len(self.prompts["train"]))
        return Round(
            number=number,
            done=done,
            last=last if rounds.train_steps else None,
            kept=[
                (self._folder(old) / "groups", self._scores(old))
                for old in range(max(0, number - rounds.keep + 1), number)
            ],
            behavior_policy=rounds.behavior_policy,
            sampled=calls * (number + (not self.imported.exists())),  # an imported round 0 cost none
            ahead=calls if rounds.train_steps else 0,
            seconds=lambda: {stage: self.clock.seconds.get(stage, 0.0) for stage in ROUND},
        )

    def _replica(self, number: int) -> Replica:
        """The model that samples round `number`, for other processes."""
        config = self.config
        replica = Replica(
            name=config.model,
            dtype=self._dtype,
            quantization=config.quantization,
            compile=config.compile,
            device=config.device,
        )
        if not number:
            return replica
        state = behavior_weights(self.checkpoints, self.place(number))
        return replace(replica, lora=self._lora, state={name: tensor.cpu() for name, tensor in state.items()})

    @property
    def _lora(self) -> dict[str, Any]:
        """Arguments for a fresh adapter."""
        train = self.config.train
        return {
            "rank": train.rank,
            "alpha": train.lora_alpha,
            "targets": train.target_modules,
            "seed": self.config.seed,
        }

    def begun(self) -> set[str]:
        """The stages with results that the configuration must stay consistent with."""
        groups = self._folder(0) / "groups"
        left = {
            "sample": groups.is_dir() and any(groups.glob("*.parquet")),
            "train": bool(steps_saved(self.checkpoints)),
            "evaluate": (self.out / "evaluation").is_dir(),
        }
        return {stage for stage, there in left.items() if there}

    def _lacks_trajectories(self) -> bool:
        """Whether the objective needs the round's trajectories, but only the images are left."""
        wanted = "trajectories" in self.config.train.objective.needs and self.config.rounds.train_steps is not None
        return wanted and any(self.groups.glob("*.parquet")) and not GroupStore(self.groups).has_trajectories

    def is_sampled(self) -> bool:
        """Whether the round's groups are complete and belong to its prompts."""
        number, groups = self.round, self.groups
        expected = {group_id(prompt, number) for prompt in self.due(number)}
        return any(groups.glob("*.parquet")) and not self.has_gap() and set(GroupStore(groups).group_ids) == expected

    def has_gap(self) -> bool:
        """Whether a file of groups is missing among the others."""
        names = sorted(path.name for path in self.groups.glob("groups-*.parquet"))
        return names != [f"groups-{i:05d}.parquet" for i in range(len(names))]

    def is_trained(self) -> bool:
        """Whether training has reached its end: the last step, the target, or the budget."""
        return stopped_at(self.checkpoints, self.config.train) is not None
