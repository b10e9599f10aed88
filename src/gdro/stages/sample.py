"""Stage 1: the model's own images of the prompts, in groups, with everything needed to make them again."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import Field

from gdro.models.base import FlowModel
from gdro.models.replica import Replica
from gdro.prompts import Prompt
from gdro.samplers.generate import Generation, sample_groups


class SampleConfig(Generation):
    """Section `sample`."""

    prompts: str = Field(
        min_length=1, description="A .txt or .jsonl file, gdro:TASK:SPLIT[:COUNT] or tiny:TASK:SPLIT:COUNT[:SEED]."
    )


def sample(
    config: Generation,
    model: FlowModel,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    seed: int,
    round: int = 0,
    replica: Replica | None = None,
) -> None:
    """Write the groups of `prompts` to the store in `out`; a rerun goes on where it stopped, or appends new prompts.

    `replica` is `model` for the workers of a Ray cluster, which then make the groups. Raises UserError if `out` was
    begun with other settings.
    """
    make = None
    if replica is not None:
        from gdro.ray_engine import make_shards

        make = partial(make_shards, replica)
    sample_groups(config, model, prompts, out, seed=seed, round=round, make=make)
