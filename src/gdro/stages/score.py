"""Stage 2: score every image in a store of groups with a reward, without changing the images."""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from gdro.groups.scoring import MAX_MISSING, ScoreFiles, score_groups
from gdro.rewards.derived import Scorer

STANDARD = "standard.json"  # beside the first round's rewards: constants of a derived reward


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
        description="Processes; never changes a score. 0: one per core for ocr, a single one for your own function.",
    )
    batch_size: int = Field(
        64, ge=1, le=10**6, description="Images given to the reward at once; never changes a score."
    )
    max_missing: float = Field(
        MAX_MISSING,
        ge=0,
        le=1,
        description="Share of images, at least one, that reward or judge may leave without a score.",
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
    """Score the store in `groups`; returns `out/<reward.name>.parquet`. Resumes, and raises, like `score_groups`.

    standard, fit: the file of a derived reward's constants, and whether to compute them from these groups.
    score_files: scores on other machines.
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
