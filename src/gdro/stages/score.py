"""Stage 2: a reward's score of every image of a store of groups, without touching the images."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from gdro.rewards.base import Reward
from gdro.rewards.scoring import score_groups


class ScoreConfig(BaseModel):
    """Section `score`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    reward: str = Field("ocr", min_length=1, description="ocr, ocr_strict, or module:function, a function of your own.")
    workers: int = Field(
        0, ge=0, description="Processes; 0 is one a core for ocr and one in all for your own function."
    )
    batch_size: int = Field(64, ge=1, description="Images given to the reward at once; never changes a score.")


def score(config: ScoreConfig, reward: Reward, groups: Path, out: Path) -> Path:
    """Score the store in `groups`; returns `out/<reward.name>.parquet`. Resumes, and raises, as `score_groups` does."""
    return score_groups(reward, groups, out, workers=config.workers, batch_size=config.batch_size)
