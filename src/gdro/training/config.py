"""Sections `train` and `rounds` of the configuration."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_serializer, model_validator

from gdro.common.errors import UserError
from gdro.common.validation import show
from gdro.objectives.base import Objective
from gdro.objectives.flow import TimestepDistribution
from gdro.objectives.registry import (
    ALL_HYPERPARAMETERS,
    KINDS,
    hyperparameters,
    make_objective,
    objective_class,
    spec_of,
)


class TrainConfig(BaseModel):
    """Section `train`. Defaults follow the paper's OCR run where it states a value, and best guesses elsewhere.

    `objective` is built from its name and hyperparameters; any left out, or null, get their published values.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    objective: Any = Field(
        "gdro",
        description="The loss: a name, your own module:Class, or {name: ..., hyperparameters}; hyperparameters may "
        "also stand beside it.",
    )
    k: int = Field(6, ge=2, le=10_000, description="Images per group and visit, out of the K sampled.")
    reference_draws: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="t and eps come from a fixed pool of this many draws per group, and the frozen base is evaluated "
        "once per draw: a quarter less computation, less variety of noise; null: new t and eps at each visit.",
    )
    learning_rate: float = Field(3e-4, ge=1e-8, le=1, description="AdamW's learning rate, constant.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta 1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta 2.")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, ge=1e-4, le=1e6, description="The gradient norm is clipped to this value.")
    max_train_steps: int = Field(300, ge=1, le=10**7, description="Optimizer steps of the whole run.")
    max_nfe: int | None = Field(
        None, ge=1, le=10**15, description="Stop once sampling and training have cost this many model evaluations."
    )
    target_reward: float | None = Field(
        None, ge=-1e6, le=1e6, description="Stop at the first validation whose reward reaches this."
    )
    groups_per_step: int = Field(16, ge=1, le=10_000, description="Groups per optimizer step; images: times k.")
    micro_batch_groups: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Groups per forward pass; null: all. Fewer need less memory; the gradient is equal up to rounding.",
    )
    group_gradient: Literal["auto", "one_pass", "two_pass"] = Field(
        "auto",
        description="two_pass: the same gradient up to rounding, a few images at a time, in memory that does not grow "
        "with k, for one more forward pass per image; auto: used if a forward pass's groups do not fit in memory.",
    )
    images_per_pass: int | None = Field(None, ge=1, le=10**6, description="Images at a time with two_pass; null: one.")
    gradient_checkpointing: bool = Field(
        False,
        description="Keep little of a forward pass and recompute it in the backward: slower, less memory, same bits.",
    )
    timestep_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the stochastic steps trained on, drawn at each visit (trajectories).",
    )
    rank: int = Field(32, ge=1, le=2048, description="Rank of the LoRA.")
    lora_alpha: int = Field(64, ge=1, le=16_384, description="The LoRA is scaled by lora_alpha / rank.")
    target_modules: str | list[str] = Field(
        "attention+ff", description="Layers that get a LoRA: attention, attention+ff, all-linear, or name endings."
    )
    ema_decay: float = Field(0.5, ge=0, lt=1, description="The EMA's decay at step i is min(ema_warmup i, ema_decay).")
    ema_warmup: float = Field(0.001, ge=0, le=1, description="Growth of the EMA's decay per step.")
    timestep: TimestepDistribution = Field(
        "logit_normal", description="Distribution of t in (0, 1); 0 is the image, 1 is noise."
    )
    logit_mean: float = Field(
        0.0, ge=-10, le=10, description="Mean of logit t; above 0, t is closer to the noise, where content is decided."
    )
    logit_std: float = Field(1.0, ge=1e-3, le=5, description="Standard deviation of logit t.")
    timestep_scope: Literal["group", "image"] = Field("group", description="Draw one t per group or per image.")
    noise_scope: Literal["group", "image"] = Field("group", description="Draw one eps per group or per image.")
    subset: Literal["spread", "random", "extremes"] = Field(
        "spread", description="The k of K: one from each of k slices of the reward ranking, any k, or best and worst."
    )
    min_spread: float = Field(
        0.0, ge=0, le=1e6, description="Groups whose rewards have a smaller standard deviation are left out."
    )
    max_mean: float | None = Field(
        None,
        ge=-1e6,
        le=1e6,
        description="Groups whose mean reward is higher are left out as already solved; null: none.",
    )
    memory_gigabytes: float = Field(
        4.0, ge=0, le=1e6, description="Latents and text embeddings kept in memory; others are read at each visit."
    )
    checkpointing_steps: int = Field(
        50, ge=1, le=10**7, description="Steps between checkpoints; a round's last step always has one."
    )
    checkpoints_total_limit: int | None = Field(
        3, ge=1, le=10**7, description="Older checkpoints are deleted unless still needed; null: keep all."
    )
    resume_from_checkpoint: str | None = Field(
        "latest", description="latest (from scratch if there is none), a checkpoint folder, or null: start over."
    )
    validation_steps: int = Field(50, ge=0, le=10**7, description="Steps between validations; 0: none.")
    validation_prompts: str | None = Field(None, description="Like sample.prompts; null: no validation.")
    export: Literal["best", "last"] = Field("best", description="The checkpoint to export: best or last.")
    alarm_drift: float = Field(
        0.02,
        ge=1e-6,
        le=1e6,
        description="Alarm if the best images' error exceeds the reference's by this share over 20 steps.",
    )
    report_to: list[Literal["tensorboard"]] = Field([], description="Trackers in addition to metrics.jsonl.")

    @property
    def validates(self) -> bool:
        """Whether training measures the model now and then."""
        return self.validation_prompts is not None and self.validation_steps > 0

    @model_validator(mode="before")
    @classmethod
    def _make_objective(cls, data: Any) -> Any:
        """Collect the objective's hyperparameters, which may stand beside it, and build it."""
        spec = data.get("objective", "gdro") if isinstance(data, dict) else None
        if isinstance(spec, KINDS) or not isinstance(data, dict):
            return data
        name = spec.get("name") if isinstance(spec, dict) else spec
        if not isinstance(name, str):
            raise UserError(f"train.objective is {show(spec)}; expected a string or a section with a name")
        known = ALL_HYPERPARAMETERS.union(hyperparameters(objective_class(name))) - set(cls.model_fields)
        beside = {field: value for field, value in data.items() if field in known}
        inside = {field: value for field, value in spec.items() if field != "name"} if isinstance(spec, dict) else {}
        rest = {field: value for field, value in data.items() if field not in known}
        return rest | {"objective": make_objective(name, inside | beside)}

    @field_serializer("objective")
    def _spec(self, objective: Objective) -> dict[str, Any]:
        return spec_of(objective)

    def flat(self) -> dict[str, Any]:
        """Every field by its dotted name below `train`, including the objective's hyperparameters; JSON-able."""
        values = self.model_dump(mode="json")
        spec = values.pop("objective")
        return {"objective": spec.pop("name"), **spec, **values}


# Fields that only change how a run is recorded, how long it is, or how it computes the same gradient.
MAY_CHANGE = frozenset(
    f"train.{name}"
    for name in (
        "max_train_steps",
        "max_nfe",
        "target_reward",
        "memory_gigabytes",
        "group_gradient",
        "images_per_pass",
        "gradient_checkpointing",
        "checkpointing_steps",
        "checkpoints_total_limit",
        "resume_from_checkpoint",
        "export",
        "report_to",
    )
)


class RoundsConfig(BaseModel):
    """Section `rounds`: how often the current policy samples new groups.

    One round is offline training; several refresh the groups; many short ones, with k = all images, are online RL.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train_steps: int | None = Field(
        None, ge=1, le=10**7, description="Optimizer steps per round; null: one round of train.max_train_steps."
    )
    prompts: int | None = Field(None, ge=1, le=10**7, description="Prompts sampled per round, in epochs; null: all.")
    keep: int = Field(
        1, ge=1, le=10**6, description="Train on the groups of this many latest rounds; older ones stay on disk."
    )
    behavior_policy: Literal["policy", "ema"] = Field(
        "policy", description="The weights that sample the rounds after the first: the policy or its average."
    )

    def of_step(self, step: int) -> int:
        """The round (from 0) that holds optimizer step `step` (from 1)."""
        return (step - 1) // self.train_steps if self.train_steps else 0

    def count(self, max_train_steps: int) -> int:
        """Rounds in a run of `max_train_steps` optimizer steps."""
        return self.of_step(max_train_steps) + 1

    def steps(self, round: int, max_train_steps: int) -> tuple[int, int]:
        """(steps done before the round, its last step)."""
        if self.train_steps is None:
            return 0, max_train_steps
        return round * self.train_steps, min((round + 1) * self.train_steps, max_train_steps)
