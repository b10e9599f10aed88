"""One measurement of a model on a set of prompts: images, reward, judge axes and image statistics.

Used for the test prompts (base and tuned) and for validation during training.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.common.files import discard
from gdro.common.progress import Progress
from gdro.common.prompts import Prompt
from gdro.common.reading import parse_json
from gdro.evaluation.image_stats import measure_image_stats
from gdro.evaluation.statistics import corrected_axes, corrected_score
from gdro.groups.sampling import STARTED, Generation, read_begun, sample_groups
from gdro.groups.scores import read_header, read_rewards, read_scored
from gdro.groups.scoring import MAX_MISSING, check_missing, score_groups
from gdro.groups.store import GroupStore
from gdro.models.base import FlowModel
from gdro.rewards.base import AXES, ImageFailure, Judge
from gdro.rewards.derived import Scorer


class EvaluateConfig(BaseModel):
    """Section `evaluate`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    prompts: str = Field(min_length=1, description="Held-out prompts, like sample.prompts.")
    images_per_prompt: int = Field(
        4, ge=1, le=10_000, description="Images per prompt, from the same noise for both models."
    )
    num_inference_steps: int = Field(
        28, ge=1, le=1000, description="Solver steps; everything else is as in section sample."
    )
    judge: str | dict[str, Any] | None = Field(
        "tiny", description="A judge's name, module:function or {name: ...}; null: no judge and no corrected score."
    )
    reward: str | dict[str, Any] | list[str | dict[str, Any]] | None = Field(
        None, description="The reward for validation and evaluation; null: score.reward."
    )
    corrected_axes: list[Literal["alignment", "coherence", "style"]] | None = Field(
        None, min_length=1, description="Axes of the corrected score; null: all, without alignment for GenEval."
    )
    bootstrap_samples: int = Field(
        10_000, ge=100, le=100_000, description="Resamples of the prompts' distinct texts for the 95 % intervals."
    )
    batch_size: int = Field(16, ge=1, le=10**6, description="Images generated at once; changes rounding.")

    def generation(self, sample: Generation) -> Generation:
        """Settings for the images to measure: the ODE, otherwise as in section `sample`."""
        return sample.deterministic(
            images_per_prompt=self.images_per_prompt,
            num_inference_steps=self.num_inference_steps,
            batch_size=self.batch_size,
        )


@dataclass(frozen=True)
class Measured:
    """P prompts x n images, in order; arrays are (P, n), the two diversities in `image_stats` (P, 1); NaN is missing.

    `verdicts`: GenEval's `strict` and `soft` if either is the reward, otherwise empty.
    """

    prompt_ids: list[str]
    texts: list[str]  # of the prompts
    reward: np.ndarray
    axes: dict[str, np.ndarray]
    corrected_axes: Sequence[str]
    image_stats: dict[str, np.ndarray]
    text_share_from: Literal["boxes", "strokes"]
    verdicts: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def corrected(self) -> np.ndarray:
        """Corrected scores (P, n), NaN where a grade is missing."""
        return corrected_score(self.reward, self.axes, self.corrected_axes)

    @property
    def missing(self) -> int:
        """Number of images that the judge did not score completely."""
        return int(np.isnan(np.sum(list(self.axes.values()), axis=0)).sum())

    def scores(self) -> dict[str, np.ndarray]:
        """`reward`, `corrected` and the judge's axes."""
        return {"reward": self.reward, "corrected": self.corrected, **self.axes}

    @property
    def unscored(self) -> int:
        """Number of images without a reward."""
        return int(np.isnan(self.reward).sum())

    def means(self) -> dict[str, float]:
        """Mean of each score and statistic over the images that have it; one that no image has is left out."""
        values = self.scores() | self.image_stats
        return {name: float(np.nanmean(v)) for name, v in values.items() if np.isfinite(v).any()}


def make_scored(
    config: EvaluateConfig,
    model: FlowModel,
    prompts: Sequence[Prompt],
    reward: Scorer,
    folder: Path,
    *,
    seed: int,
    generation: Generation,
    score_workers: int = 0,
    score_batch_size: int = 64,
    max_missing: float = MAX_MISSING,
    standard: Path | None = None,
    label: str = "evaluate",
) -> Path:
    """Generate (with the ODE) and score images of `prompts` with the current model; returns the file of rewards.

    Several processes share the work; resumable, images are kept in `folder`. The noise depends only on (seed, prompt
    id, image index), so any two models are measured on the same seeds. Images by other weights are removed first.
    Raises UserError for invalid output of the reward.
    """
    if distributed.is_first():
        _discard_other_weights(folder, model)
    settings = config.generation(generation)
    sample_groups(settings, model, prompts, folder, seed=seed, purpose="evaluation", label=label)
    return score_groups(
        reward,
        folder,
        folder / "rewards",
        workers=score_workers,
        batch_size=score_batch_size,
        standard=standard,
        max_missing=max_missing,
    )


def measure(
    config: EvaluateConfig,
    prompts: Sequence[Prompt],
    reward: Scorer,
    judge: Judge | None,
    rewards: Path,
    *,
    score_batch_size: int = 64,
    max_missing: float = MAX_MISSING,
    label: str = "evaluate",
) -> Measured:
    """Judge the images from `make_scored`, which returned the file `rewards`, and collect all results.

    Runs in one process. Raises UserError for invalid output of the judge, or if it leaves more than the share
    `max_missing` of images without scores.
    """
    store = GroupStore(rewards.parent.parent)
    scores, evidence = read_rewards(rewards, store), read_evidence(rewards)
    axes = {axis: np.full((len(prompts), config.images_per_prompt), np.nan) for axis in AXES}
    image_stats: dict[str, list[np.ndarray]] = {}
    boxed = all("lines" in found for found in evidence.values())
    at_once = max(1, score_batch_size // config.images_per_prompt)  # prompts, so a remote judge is kept busy
    with Progress(f"{label}: {'image statistics' if judge is None else 'judge'}", len(prompts), "prompt") as progress:
        for start in range(0, len(prompts), at_once):
            some = prompts[start : start + at_once]
            images = [store.images(prompt.id) for prompt in some]
            if judge is not None:
                for axis, grades in _judged(judge, images, some).items():
                    axes[axis][start : start + len(some)] = grades
            for prompt, own in zip(some, images, strict=True):
                ids = store.image_ids(prompt.id)
                boxes = [[box for *_, box in evidence[i]["lines"]] for i in ids] if boxed else None
                for name, values in measure_image_stats(own, boxes).items():
                    image_stats.setdefault(name, []).append(values)
            progress.advance(len(some))
    used = config.corrected_axes or corrected_axes(reward.name)
    if judge is not None:
        lost = np.isnan(np.sum([axes[axis] for axis in used], axis=0))
        check_missing(f'judge "{judge.name}"', int(lost.sum()), lost.size, max_missing)
    return Measured(
        prompt_ids=[prompt.id for prompt in prompts],
        texts=[prompt.text for prompt in prompts],
        reward=np.stack([scores[prompt.id].numpy() for prompt in prompts]),
        axes=axes,
        corrected_axes=used,
        image_stats={name: np.stack(values) for name, values in image_stats.items()},
        text_share_from="boxes" if boxed else "strokes",
        verdicts=_verdicts(store, evidence, prompts),
    )


def _verdicts(
    store: GroupStore, evidence: Mapping[str, Mapping[str, Any]], prompts: Sequence[Prompt]
) -> dict[str, np.ndarray]:
    if not all({"correct", "soft"} <= found.keys() for found in evidence.values()):
        return {}
    ids = [store.image_ids(prompt.id) for prompt in prompts]
    return {
        name: np.array([[float(evidence[i][key]) for i in group] for group in ids])
        for name, key in (("strict", "correct"), ("soft", "soft"))
    }


def read_evidence(path: Path) -> dict[str, dict[str, Any]]:
    """Image id -> the evidence for its score in the file of rewards."""
    evidence: dict[str, dict[str, Any]] = {}
    for place in range(len(read_header(path).contents)):
        table = read_scored(path, place).select(["image_id", "evidence"])
        for row in table.to_pylist():
            evidence[row["image_id"]] = parse_json(row["evidence"], f'{path}: image "{row["image_id"]}"')
    return evidence


def _judged(judge: Judge, images: Sequence[Sequence[Image.Image]], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
    """The judge's axes (P, n) for n images of each of P prompts; UserError naming the image it failed on."""
    count = len(images[0])
    try:
        found = judge([image for own in images for image in own], [p for p in prompts for _ in range(count)])
    except ImageFailure as failure:
        place, index = divmod(failure.index, count)
        raise UserError(f'judge "{judge.name}": image "{prompts[place].id}/{index}": {failure.reason}') from None
    return {axis: np.asarray(grades).reshape(len(prompts), count) for axis, grades in found.items()}


def _discard_other_weights(folder: Path, model: FlowModel) -> None:
    """Remove images by other weights from `folder`: an evaluation is of the current model and easily repeated."""
    begun = read_begun(folder / STARTED) if folder.is_dir() else None
    if begun is not None and begun[0].get("fingerprint") != model.fingerprint:
        discard(folder)
