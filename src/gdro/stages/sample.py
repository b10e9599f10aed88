"""Stage 1: the model's own images of the prompts, in groups, with everything needed to make them again."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from gdro.models.base import FlowModel
from gdro.prompts import Prompt
from gdro.samplers.generate import Generation, sample_groups


class SampleConfig(Generation):
    """Section `sample`."""

    prompts: str = Field(
        min_length=1, description="A .txt or .jsonl file, or tiny:TASK:SPLIT:COUNT[:SEED] for the tiny world's own."
    )


def sample(
    config: Generation, model: FlowModel, prompts: Sequence[Prompt], out: Path, *, seed: int, round: int = 0
) -> None:
    """Write the groups of `prompts` to the store in `out`; a rerun goes on where it stopped, or appends new prompts.

    Raises UserError if `out` was begun with other settings.
    """
    sample_groups(config, model, prompts, out, seed=seed, round=round)
