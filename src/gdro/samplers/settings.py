"""The settings for generating images."""

import json
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from gdro.models.schedulers import SchedulerName
from gdro.samplers.sde import PUBLISHED_NOISE
from gdro.samplers.windows import Window

EULER: Literal["FlowMatchEulerDiscreteScheduler"] = "FlowMatchEulerDiscreteScheduler"


class Generation(BaseModel):
    """How images are generated. Everything but `batch_size` is part of a group store's identity."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    images_per_prompt: int = Field(16, ge=1, le=10_000, description="Images per prompt: the group size K.")
    num_inference_steps: int = Field(28, ge=1, le=1000, description="Solver steps from noise to image.")
    guidance_scale: float = Field(3.5, ge=0, le=100, description="Guidance, as the model's own pipeline defines it.")
    max_sequence_length: int = Field(512, ge=1, le=512, description="Tokens in the text embedding.")
    height: int = Field(512, ge=1, le=8192, description="Height of the images in pixels.")
    width: int = Field(512, ge=1, le=8192, description="Width of the images in pixels.")
    buckets: list[Annotated[list[Annotated[int, Field(ge=1, le=8192)]], Field(min_length=2, max_length=2)]] = Field(
        [], description="More sizes [height, width]; each prompt is assigned one of these or height x width."
    )
    scheduler: SchedulerName = Field(EULER, description="A deterministic flow scheduler from diffusers.")
    sampler: Literal["ode", "flow_grpo", "dance_grpo", "flow_cps"] = Field(
        "ode", description="ode: the scheduler's own steps; the others add noise in a window of steps and record it."
    )
    noise_level: float | None = Field(
        None,
        validate_default=True,
        ge=1e-3,
        le=10,
        description="Noise of a stochastic step (at most 1 for flow_cps); null: the sampler's published value.",
    )
    window: Window = Field("all", description="The stochastic steps: all but the last, fixed, random, or sliding.")
    window_size: int | None = Field(
        None, ge=1, validate_default=True, le=1000, description="Steps in a window other than all."
    )
    window_start: int | None = Field(
        None, ge=0, validate_default=True, le=1000, description="First step of a fixed window; null: 0."
    )
    window_interval: int | None = Field(
        None,
        ge=1,
        validate_default=True,
        le=10**7,
        description="Rounds after which a sliding window advances one step; null: 1.",
    )
    shared_noise: bool = Field(False, description="One initial noise for the whole group; needs stochastic steps.")
    batch_size: int = Field(
        16,
        ge=1,
        le=10**6,
        description="Images generated at once; more is faster until memory runs out, and changes rounding.",
    )
    prompts_per_shard: int = Field(
        16,
        ge=1,
        le=10**6,
        description="Prompts per file; batches end there too (rounding). An interruption loses at most one file.",
    )

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """(height, width) of each size that prompts are assigned."""
        return [(self.height, self.width), *((height, width) for height, width in self.buckets)]

    @property
    def calls(self) -> int:
        """Velocity evaluations per image; a second-order solver needs a second one at each step but the last."""
        second_order = self.scheduler == "FlowMatchHeunDiscreteScheduler"
        return self.num_inference_steps + (self.num_inference_steps - 1) * second_order

    def deterministic(self, **update: Any) -> Self:
        """The same settings with the ODE, which models are always evaluated with. `update` replaces fields."""
        fields = ("sampler", "noise_level", "window", "window_size", "window_start", "window_interval", "shared_noise")
        return self.model_copy(update={name: type(self).model_fields[name].default for name in fields} | update)

    # Each field below is checked against those above it; invalid fields are missing from `info.data`.

    @field_validator("buckets")
    @classmethod
    def _buckets(cls, buckets: list[list[int]], info: ValidationInfo) -> list[list[int]]:
        sizes = [*buckets, [info.data.get("height"), info.data.get("width")]]
        if any(size in sizes[:i] for i, size in enumerate(sizes)):
            raise ValueError("each size once; height x width is already one of them")
        return buckets

    @field_validator("sampler")
    @classmethod
    def _sampler(cls, sampler: str, info: ValidationInfo) -> str:
        if sampler != "ode" and info.data.get("scheduler", EULER) != EULER:
            raise ValueError(f"ode with scheduler {info.data['scheduler']} (stochastic steps need {EULER})")
        if sampler != "ode" and info.data.get("num_inference_steps") == 1:
            raise ValueError("ode with num_inference_steps 1 (the last step is never stochastic)")
        return sampler

    @field_validator("noise_level", "window", "window_size", "window_start", "window_interval", "shared_noise")
    @classmethod
    def _with_ode(cls, value: Any, info: ValidationInfo) -> Any:
        default = cls.model_fields[str(info.field_name)].default
        if info.data.get("sampler") == "ode" and value != default:
            raise ValueError(f"{json.dumps(default)} with sampler ode, which has no stochastic steps")
        return value

    @field_validator("noise_level")
    @classmethod
    def _noise_level(cls, value: float | None, info: ValidationInfo) -> float | None:
        sampler = info.data.get("sampler")
        if sampler == "flow_cps" and value is not None and value > 1:
            raise ValueError("a number from 0 to 1 with sampler flow_cps")
        return PUBLISHED_NOISE.get(str(sampler)) if value is None else value

    @field_validator("window_size")
    @classmethod
    def _window_size(cls, value: int | None, info: ValidationInfo) -> int | None:
        window, steps = info.data.get("window"), info.data.get("num_inference_steps")
        if window == "all" and value is not None:
            raise ValueError("null with window all")
        if window not in (None, "all") and steps is not None and (value is None or value > steps - 1):
            raise ValueError(f"an integer from 1 to {steps - 1}: the last of {steps} steps is never stochastic")
        return value

    @field_validator("window_start")
    @classmethod
    def _window_start(cls, value: int | None, info: ValidationInfo) -> int | None:
        window, steps, size = (info.data.get(name) for name in ("window", "num_inference_steps", "window_size"))
        if window not in (None, "fixed") and value is not None:
            raise ValueError("null unless window is fixed")
        if window != "fixed" or value is None:
            return 0 if window == "fixed" else None
        if steps is not None and size is not None and value > steps - 1 - size:
            last = steps - 1 - size
            raise ValueError(f"an integer from 0 to {last}: the last of {steps} steps is never stochastic")
        return value

    @field_validator("window_interval")
    @classmethod
    def _window_interval(cls, value: int | None, info: ValidationInfo) -> int | None:
        window = info.data.get("window")
        if window not in (None, "sliding") and value is not None:
            raise ValueError("null unless window is sliding")
        return 1 if window == "sliding" and value is None else value
