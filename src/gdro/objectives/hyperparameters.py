"""Hyperparameters shared by the objectives: their types, ranges and meanings.

An objective declares the ones it has as fields of these types, with its own published defaults.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field


def _positive(tau: Any) -> Any:
    if isinstance(tau, int | float) and tau < 1e-6:
        raise ValueError("a number greater than or equal to 0.000001 (for the limit 0, set objective: rank)")
    return tau


def _not_round(reference: Any) -> Any:
    if reference == "round":
        raise ValueError('"base", "old" or "ema" (round is now called old)')
    return reference


Tau = Annotated[
    float,
    BeforeValidator(_positive),
    Field(ge=1e-6, le=1e6, description="Temperature of the soft targets, in units of reward; smaller is harder."),
]
Beta = Annotated[float, Field(ge=1e-6, le=1e6, description="s = -beta (d - d_ref), d the mean squared velocity error.")]
Gamma = Annotated[float, Field(ge=0, le=1e6, description="Weight of the velocity error of the group's best image.")]
KlWeight = Annotated[float, Field(ge=0, le=1e6, description="Weight of the divergence from the frozen base.")]
ClipRange = Annotated[float, Field(ge=1e-7, le=100, description="The policy ratio is clipped to 1 +- this value.")]
Advantage = Annotated[
    Literal["group", "batch", "slas", "win_rate"],
    Field(description="Rewards minus the group's mean, over the group's or the batch's deviation; SLAS; win rates."),
]
AdvantageExponent = Annotated[
    float, Field(ge=0, le=10, description="SLAS: |r - mean| to the power 1 + this; 0 with any other advantage.")
]
Reference = Annotated[
    Literal["base", "old", "ema"],
    BeforeValidator(_not_round),
    Field(description="The frozen base, the policy that sampled the round, or the moving average of the weights."),
]
Mix = Annotated[float, Field(ge=1e-3, le=1, description="DiffusionNFT: b of v+- = (1 -+ b) v_old +- b v.")]
Regularizer = Annotated[float, Field(ge=1e-6, le=1e6, description="LAIR: weight of the mean of s^2.")]
LowWeight = Annotated[float, Field(ge=0, le=1e6, description="TabGRAA: weight of the low half.")]
