"""Sections `train` and `rounds` of the configuration."""

from dataclasses import fields
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from gdro.objectives.registry import OBJECTIVES, make_objective, own_hyperparameters

Advantage = Literal["group", "batch", "slas", "win_rate"]


class TrainConfig(BaseModel):
    """Section `train`. The defaults are the paper's OCR run where it states a value, the likely ones elsewhere.

    A hyperparameter of the objective that is null gets the objective's published value; one that the objective does not
    have must stay null.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    objective: str = Field("gdro", description="The loss by name; gdro/objectives has one file for each.")
    k: int = Field(6, ge=2, le=10_000, description="Images of a group seen at each visit, of the K sampled.")
    tau: float | None = Field(
        None,
        ge=1e-6,
        le=1e6,
        description="Temperature of soft targets, in units of reward; smaller is harder.",
    )
    beta: float | None = Field(
        None, ge=1e-6, le=1e6, description="s = -beta (d - d_ref), d the mean squared velocity error."
    )
    gamma: float | None = Field(
        None, ge=0, le=1e6, description="Weight of the velocity error of the group's best image."
    )
    kl_weight: float | None = Field(None, ge=0, le=1e6, description="Weight of the divergence from the frozen base.")
    clip_range: float | None = Field(None, ge=1e-7, le=100, description="The policy ratio is clipped to 1 +- this.")
    advantage: Advantage | None = Field(
        None, description="Rewards centered in the group, over the group's or the batch's deviation; SLAS; win rates."
    )
    advantage_exponent: float | None = Field(
        None, ge=0, le=10, description="SLAS: |r - mean| to the power of 1 + this."
    )
    reference: Literal["base", "round", "ema"] | None = Field(
        None, description="Reference: the frozen base, the policy that sampled the round, or the moving average."
    )
    reference_draws: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="t and eps come from a fixed pool of so many draws a group, on which the frozen base is asked once "
        "and never again: a quarter less computation, with less variety of noise; null: new ones at each visit.",
    )
    mix: float | None = Field(None, le=1, ge=1e-3, description="DiffusionNFT: b of v+- = (1 -+ b) v_old +- b v.")
    regularizer: float | None = Field(None, ge=1e-6, le=1e6, description="LAIR: weight of mean s^2.")
    low_weight: float | None = Field(None, ge=0, le=1e6, description="TabGRAA: weight of the low half.")
    learning_rate: float = Field(3e-4, ge=1e-8, le=1, description="AdamW's learning rate, constant.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW's beta 1.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW's beta 2.")
    weight_decay: float = Field(1e-4, ge=0, le=1, description="AdamW's weight decay.")
    max_grad_norm: float = Field(1.0, ge=1e-4, le=1e6, description="The gradient's norm is clipped to this.")
    max_train_steps: int = Field(300, ge=1, le=10**7, description="Optimizer steps of the whole run.")
    max_nfe: int | None = Field(
        None, ge=1, le=10**15, description="Stop once sampling and training have cost this many model evaluations."
    )
    target_reward: float | None = Field(
        None, ge=-1e6, le=1e6, description="Stop at the first validation whose reward reaches this."
    )
    groups_per_step: int = Field(16, ge=1, le=10_000, description="Groups an optimizer step; times k: images a step.")
    micro_batch_groups: int | None = Field(
        None,
        ge=1,
        le=10_000,
        description="Groups a forward pass; null: all. Fewer need less memory for the same gradient but for rounding.",
    )
    group_gradient: Literal["auto", "one_pass", "two_pass"] = Field(
        "auto",
        description="two_pass: the same gradient but for rounding, a few images at a time, in memory that does not "
        "grow with k, for one forward pass an image more; auto: where a forward pass's groups do not fit in memory.",
    )
    images_per_pass: int | None = Field(None, ge=1, le=10**6, description="Images at a time in two_pass; null: one.")
    gradient_checkpointing: bool = Field(
        False,
        description="Keep little of a forward pass and compute it again in the backward: slower, smaller, same bits.",
    )
    timestep_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the stochastic steps trained on, drawn each visit (trajectories).",
    )
    rank: int = Field(32, ge=1, le=2048, description="Rank of the LoRA.")
    lora_alpha: int = Field(64, ge=1, le=16_384, description="The LoRA is scaled by lora_alpha / rank.")
    target_modules: str | list[str] = Field(
        "attention+ff", description="Layers that get a LoRA: attention, attention+ff, all-linear, or name endings."
    )
    ema_decay: float = Field(0.5, ge=0, lt=1, description="The EMA's decay at step i is min(ema_warmup i, ema_decay).")
    ema_warmup: float = Field(0.001, ge=0, le=1, description="Growth of the EMA's decay a step.")
    timestep: Literal["logit_normal", "uniform"] = Field(
        "logit_normal", description="Distribution of t, in (0, 1): 0 is the image, 1 noise."
    )
    logit_mean: float = Field(
        0.0, ge=-10, le=10, description="Mean of logit t: above 0, t nearer to the noise, where content is set."
    )
    logit_std: float = Field(1.0, ge=1e-3, le=5, description="Standard deviation of logit t.")
    timestep_scope: Literal["group", "image"] = Field("group", description="Who shares a draw of t.")
    noise_scope: Literal["group", "image"] = Field("group", description="Who shares a draw of eps.")
    subset: Literal["spread", "random", "extremes"] = Field(
        "spread", description="The k of K: one from each of k slices of the reward ranking; any k; the best and worst."
    )
    min_spread: float = Field(
        0.0, ge=0, le=1e6, description="Groups whose rewards' standard deviation is below: left out."
    )
    max_mean: float | None = Field(
        None,
        ge=-1e6,
        le=1e6,
        description="Groups whose mean reward is above are left out, as already solved; null: none.",
    )
    memory_gigabytes: float = Field(
        4.0, ge=0, le=1e6, description="Latents and text embeddings kept in memory; the rest is read at each visit."
    )
    checkpointing_steps: int = Field(
        50, ge=1, le=10**7, description="Steps between checkpoints; a round's last step always has one."
    )
    checkpoints_total_limit: int | None = Field(
        3, ge=1, le=10**7, description="Older checkpoints are deleted, never one that is needed; null: keep all."
    )
    resume_from_checkpoint: str | None = Field(
        "latest", description="latest (from the start if there is none), a checkpoint's folder, or null: start anew."
    )
    validation_steps: int = Field(50, ge=0, le=10**7, description="Steps between validations; 0: none.")
    validation_prompts: str | None = Field(None, description="As sample.prompts; null: no validation.")
    export: Literal["best", "last"] = Field("best", description="The checkpoint handed on: the best or last.")
    alarm_drift: float = Field(
        0.02,
        ge=1e-6,
        le=1e6,
        description="Alarm when the best images' error exceeds the reference's by this share for 20 steps.",
    )
    report_to: list[Literal["tensorboard"]] = Field([], description="Trackers beside metrics.jsonl.")

    @property
    def validates(self) -> bool:
        return self.validation_prompts is not None and self.validation_steps > 0

    @property
    def loss(self) -> Any:
        """The objective with its hyperparameters: a ForwardObjective or a TrajectoryObjective."""
        names = {field.name for field in fields(OBJECTIVES[self.objective])}
        return make_objective(self.objective, {name: getattr(self, name) for name in names})

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Give the objective's own hyperparameters their published values; refuse those it does not have."""
        if not isinstance(data, dict) or not isinstance(data.get("objective", "gdro"), str):
            return data
        name = data.get("objective", "gdro")
        own = own_hyperparameters(name, {field: data.get(field) for field in HYPERPARAMETERS})
        return data | {field: default if data.get(field) is None else data[field] for field, default in own.items()}

    @field_validator("tau", mode="before")
    @classmethod
    def _tau(cls, tau: Any) -> Any:
        if isinstance(tau, int | float) and tau < 1e-6:
            raise ValueError("a number greater than or equal to 0.000001 (for the limit 0 set objective: rank)")
        return tau


# Hyperparameters of objectives, by the names the objectives share.
HYPERPARAMETERS = sorted({field.name for kind in OBJECTIVES.values() for field in fields(kind)})

# Fields that change how a run is recorded, how long it goes on, or by what computation of the same gradient.
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
    """Section `rounds`: how often new groups are sampled, by the policy as it then is.

    One round is offline training; several refresh the groups; many short ones, with k = all images, are online RL.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    train_steps: int | None = Field(
        None, ge=1, le=10**7, description="Optimizer steps of each round; null: one round of all train.max_train_steps."
    )
    prompts: int | None = Field(
        None, ge=1, le=10**7, description="Prompts sampled in each round, by epochs; null: all."
    )
    keep: int = Field(
        1, ge=1, le=10**6, description="The latest rounds whose groups are trained on; older ones stay on disk."
    )
    behavior_policy: Literal["policy", "ema"] = Field(
        "policy", description="The weights that sample the rounds after the first: as trained, or averaged."
    )

    def of_step(self, step: int) -> int:
        """The round (from 0) that holds optimizer step `step` (from 1)."""
        return (step - 1) // self.train_steps if self.train_steps else 0

    def count(self, max_train_steps: int) -> int:
        """Rounds of a run of so many optimizer steps."""
        return self.of_step(max_train_steps) + 1

    def steps(self, round: int, max_train_steps: int) -> tuple[int, int]:
        """(steps done before the round, its last step)."""
        if self.train_steps is None:
            return 0, max_train_steps
        return round * self.train_steps, min((round + 1) * self.train_steps, max_train_steps)
