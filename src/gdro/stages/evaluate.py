"""Stage 4: evaluate base and tuned on the same held-out prompts and seeds; writes `evaluation.json`."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from gdro.common import distributed
from gdro.common.prompts import Prompt
from gdro.common.sealed import write_record
from gdro.evaluation.image_stats import compare_image_stats, verdict
from gdro.evaluation.measure import EvaluateConfig, Measured, make_scored, measure
from gdro.evaluation.statistics import Comparison, compare, corrected_score, pair_means, text_numbers
from gdro.groups.sampling import Generation
from gdro.groups.scoring import MAX_MISSING
from gdro.models.base import FlowModel
from gdro.rewards.base import AXES, Judge
from gdro.rewards.derived import Scorer
from gdro.rewards.geneval.rules import summary
from gdro.rewards.registry import load_judge

AXIS_FALL = 0.25  # a judge axis (1 to 5) counts as worse if it falls by more and its interval is below zero


def evaluate(
    config: EvaluateConfig,
    model: FlowModel,
    prompts: Sequence[Prompt],
    reward: Scorer,
    out: str | Path,
    generation: Generation,
    *,
    judge: Judge | None = None,
    seed: int = 0,
    score_workers: int = 0,
    score_batch_size: int = 64,
    max_missing: float = MAX_MISSING,
    standard: Path | None = None,
    alarm: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Measure the adapter in `model` against the model without it; returns the contents of `out`/evaluation.json.

    Images go to the stores `out`/evaluation/base and /tuned, where an interrupted evaluation resumes. The two sides
    share their noise. Means are over images within a prompt, then over prompts; intervals by `statistics.compare`.
    `generation` is how the groups were sampled; `judge` defaults to the one that `config.judge` names.
    `alarm` is the training's, which the verdict considers. Raises UserError before any sampling if the reward or the
    judge cannot use the prompts.
    """
    out = Path(out)
    if judge is None and config.judge is not None:
        judge = load_judge(config.judge)
    reward.check(prompts)
    if judge is not None:
        judge.check(prompts)
    if distributed.is_first():
        (out / "evaluation.json").unlink(missing_ok=True)  # the images of any older one are about to be replaced
    rewards = {}
    for side in ("base", "tuned"):
        with model.adapter_disabled() if side == "base" else nullcontext():
            rewards[side] = make_scored(
                config,
                model,
                prompts,
                reward,
                out / "evaluation" / side,
                seed=seed,
                generation=generation,
                score_workers=score_workers,
                score_batch_size=score_batch_size,
                max_missing=max_missing,
                standard=standard,
                label=f"evaluate {side}",
            )

    about = {
        "model": model.name,
        "revision": model.revision,
        "fingerprint": model.fingerprint,
        "reward": reward.name,
        "reward_version": reward.version,
        "judge": None if judge is None else judge.name,
        "judge_version": None if judge is None else judge.version,
        "seed": seed,
        "images_per_prompt": config.images_per_prompt,
        "num_inference_steps": config.num_inference_steps,
        "guidance_scale": generation.guidance_scale,
        "scheduler": generation.scheduler,
        "bootstrap_samples": config.bootstrap_samples,
    }

    def compared() -> dict[str, Any]:
        sides = {
            side: measure(
                config,
                prompts,
                reward,
                judge,
                path,
                score_batch_size=score_batch_size,
                max_missing=max_missing,
                label=f"evaluate {side}",
            )
            for side, path in rewards.items()
        }
        evaluation = about | compare_measured(
            sides["base"], sides["tuned"], samples=config.bootstrap_samples, seed=seed, alarm=alarm
        )
        if sides["base"].verdicts:
            evaluation["geneval"] = geneval_section(prompts, sides)
        write_record(out / "evaluation.json", evaluation)
        return evaluation

    return distributed.first(compared)


def compare_measured(
    base: Measured, tuned: Measured, *, samples: int, seed: int, alarm: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The parts of evaluation.json that follow from the two measurements and the state of training.

    `alarm`: `training.log.DriftAlarm.state` at the measured checkpoint. JSON-able, null for missing values.
    """
    results = compare(
        {name: pair_means(base.scores()[name], tuned.scores()[name]) for name in ("reward", "corrected", *AXES)},
        base.texts,
        samples=samples,
        seed=seed,
    )
    per_prompt = {name: pair_means(base.image_stats[name], tuned.image_stats[name]) for name in base.image_stats}
    image_stats = compare_image_stats(
        {name: pair[0] for name, pair in per_prompt.items()},
        {name: pair[1] for name, pair in per_prompt.items()},
        base.texts,
        samples=samples,
        seed=seed,
    )
    texts = len(set(text_numbers(base.texts)))
    same = all(
        np.array_equal(base.image_stats[name], tuned.image_stats[name], equal_nan=True) for name in base.image_stats
    )
    return {
        "corrected_axes": list(base.corrected_axes),
        "alarm": alarm,
        "results": {name: result.to_json() for name, result in results.items()},
        # r_mean (u_mean - 3) + 0.2, comparable to papers that publish only means; `results` averages per image
        "corrected_of_means": {"base": _of_means(base), "tuned": _of_means(tuned)},
        "image_stats": image_stats,
        "text_share_from": base.text_share_from,
        "verdict": judge_verdict(results, verdict(image_stats), alarm=alarm, texts=texts, same_images=same),
        "missing": {"base": base.missing, "tuned": tuned.missing},
        "unscored": {"base": base.unscored, "tuned": tuned.unscored},
        "prompt_ids": base.prompt_ids,
        "distinct_texts": texts,
        "base": {name: _json(values) for name, values in (base.scores() | base.image_stats).items()},
        "tuned": {name: _json(values) for name, values in (tuned.scores() | tuned.image_stats).items()},
    }


def geneval_section(prompts: Sequence[Prompt], sides: Mapping[str, Measured]) -> dict[str, Any]:
    """GenEval's official summary of each side (each tag's mean, and `overall`, the mean of the six): `base` and `tuned`
    for the strict verdict, and the same for the soft score under `soft`."""
    tags = [prompt.fields["tag"] for prompt in prompts]
    strict, soft = (
        {side: summary(measured.verdicts[kind], tags) for side, measured in sides.items()}
        for kind in ("strict", "soft")
    )
    return {**strict, "soft": soft}


def judge_verdict(
    results: Mapping[str, Comparison],
    image_stats: Sequence[str],
    *,
    same_images: bool,
    alarm: Mapping[str, Any] | None = None,
    texts: int,
) -> dict[str, Any]:
    """`outcome` (improved, hacked, suspect, damaged, unchanged), a `headline`, and the `lines` that support it.

    *hacked*: the reward rose while the judge saw the images get worse. *suspect*: only image statistics moved, or the
    training alarm was on and no judge was asked (a judge would have seen the harm the alarm warns of). Worse means the
    corrected score's interval is below zero, or that of an axis that fell by more than AXIS_FALL.
    """
    worse = []
    for name in ("corrected", *AXES):
        result = results[name]
        if result.ci95[1] < 0 and (name == "corrected" or result.gain < -AXIS_FALL):
            words = "corrected score" if name == "corrected" else f"judged {name}"
            worse.append(f"{words} fell by {-result.gain:.3f} ({result.base:.3f} to {result.tuned:.3f})")
    rung = alarm is not None and alarm["on"]
    rose, judged = results["reward"].ci95[0] > 0, np.isfinite(results["corrected"].base)
    if same_images:
        outcome, headline = "unchanged", "The adapter changes no image: it is untrained or not active."
    elif worse:
        outcome = "hacked" if rose else "damaged"
        headline = (
            "It hacked the reward: the reward rose while the pictures got worse."
            if rose
            else "The pictures got worse, and the reward did not rise."
        )
    elif image_stats or (rung and rose and not judged):
        outcome = "suspect"
        headline = (
            f"The reward rose and {'the judge saw no loss' if judged else 'no judge was asked'}, "
            f"but {'the pictures changed in ways worth a look' if image_stats else 'the training alarm was on'}."
            if rose
            else "The reward did not rise, and the pictures changed in ways worth a look."
        )
    elif rose:
        outcome = "improved"
        headline = (
            "It got better: the reward rose and the pictures held, although the training alarm was on."
            if judged and rung
            else "It got better without hacking: the reward rose and the pictures held."
            if judged
            else "The reward rose and the image statistics held; no judge was asked whether the pictures got worse."
        )
    else:
        outcome, headline = (
            "unchanged",
            (f"No certain change in the reward, and the {'pictures held' if judged else 'image statistics held'}."),
        )
    lines = [*worse, *image_stats]
    if rung and alarm is not None:
        lines.append(
            f"training alarm on at step {alarm['step']}: velocity error of the best images "
            f"{100 * alarm['excess']:.1f} % above the base's, so they became less likely"
        )
    if texts < 2:
        lines.append("only one distinct text: no interval, so no change is certain")
    return {"outcome": outcome, "headline": headline, "lines": lines}


def summary_section(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of summary.json that come from an evaluation: `verdict`, `alarm`, `reward`, `corrected`, `judge`."""
    results = evaluation["results"]
    return {
        "verdict": evaluation["verdict"],
        "alarm": evaluation["alarm"],
        "reward": results["reward"],
        "corrected": results["corrected"],
        "judge": {side: {axis: results[axis][side] for axis in AXES} for side in ("base", "tuned")},
    }


def _of_means(measured: Measured) -> float | None:
    values = [measured.axes[axis] for axis in measured.corrected_axes]
    if not all(np.isfinite(v).any() for v in values):
        return None
    means = {axis: np.nanmean(measured.axes[axis]) for axis in measured.corrected_axes}
    return float(corrected_score(np.nanmean(measured.reward), means, measured.corrected_axes))


def _json(values: np.ndarray) -> list[list[float | None]]:
    return [[float(v) if np.isfinite(v) else None for v in row] for row in values]
