"""Stage 2: a reward's score of every image of a store of groups, without touching the images."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gdro.groups.scoring import MAX_MISSING, ScoreFiles, score_groups
from gdro.rewards.derived import Scorer

STANDARD = "standard.json"  # beside the rewards of the first round: constants of a derived reward


class ScoreConfig(BaseModel):
    """Section `score`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    reward: str | dict[str, Any] | list[str | dict[str, Any]] = Field(
        "ocr", description="A name (`gdro rewards` lists them), module:function, {name: ..., option: ...}, or a list."
    )
    workers: int = Field(
        0,
        ge=0,
        le=1024,
        description="Processes, never changing a score; 0 is one a core for ocr and one in all for your own function.",
    )
    batch_size: int = Field(
        64, ge=1, le=10**6, description="Images given to the reward at once; never changes a score."
    )
    max_missing: float = Field(
        MAX_MISSING,
        ge=0,
        le=1,
        description="Share of images, one at least, that reward or judge may leave without a score.",
    )


def score(
    config: ScoreConfig,
    reward: Scorer,
    groups: Path,
    out: Path,
    *,
    standard: Path | None = None,
    fit: bool = False,
    score_files: ScoreFiles | None = None,
) -> Path:
    """Score the store in `groups`; returns `out/<reward.name>.parquet`. Resumes, and raises, as `score_groups` does.

    standard, fit: where a derived reward's constants lie, and whether they are to be those of these groups.
    score_files: scores elsewhere than on this machine.
    """
    return score_groups(
        reward,
        groups,
        out,
        workers=config.workers,
        batch_size=config.batch_size,
        standard=standard,
        fit=fit,
        max_missing=config.max_missing,
        score=score_files,
    )
