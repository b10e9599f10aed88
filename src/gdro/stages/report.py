"""The report stage: one self-contained HTML page about a run, from whatever files the run has so far."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gdro.common.errors import UserError
from gdro.common.files import write_bytes
from gdro.common.progress import duration
from gdro.common.reading import read_text
from gdro.common.sealed import find_record
from gdro.evaluation import plots
from gdro.evaluation.gallery import choose_groups, choose_prompts, figure, is_pixel_art, mark_ends
from gdro.evaluation.image_stats import THRESHOLDS
from gdro.evaluation.measure import read_evidence
from gdro.evaluation.statistics import pair_means
from gdro.groups.scores import read_rewards
from gdro.groups.store import GroupStore
from gdro.rewards.base import AXES
from gdro.rewards.ocr.reward import target_of
from gdro.training.log import read_metrics

SIDES = ("base", "tuned")
OCR = ("ocr", "ocr_strict")  # rewards whose prompts name a target
CURVES: dict[str, dict[str, str]] = {
    "Loss": {"loss": "total", "loss_rank": "ranking", "loss_policy": "policy gradient"},
    "Velocity error of the best image (top-1 regularizer)": {"loss_top1": "top-1"},
    "Drift d − d_ref: below 0 means more likely than under the base": {
        "drift_best": "best image",
        "drift_worst": "worst image",
    },
    "Entropy of the policy's ranking p against the target's q": {"entropy_p": "p (policy)", "entropy_q": "q (target)"},
    "Spread of the implicit rewards s": {"spread_s": "s"},
    "Ratio of likelihoods, new over old": {"ratio": "mean", "clipped": "share clipped"},
    "Gradient norm before clipping": {"grad_norm": "norm"},
}
VALIDATION_CURVES: dict[str, dict[str, str]] = {
    "Validation: reward and corrected score": {"reward": "reward", "corrected": "corrected"},
    "Validation: judge axes": {"alignment": "alignment", "coherence": "coherence", "style": "style"},
}


def report(run_dir: Path, rewards: Path) -> Path:
    """Write `run_dir`/report.html and return its path. `rewards` is the file of its first groups' rewards.

    Parts whose files are missing become a note; damaged files raise UserError.
    """
    if not run_dir.is_dir():
        raise UserError(f"report: {run_dir} is not a folder; expected a run's folder")
    evaluation = find_record(run_dir / "evaluation.json")
    config = _text(run_dir / "config.yaml")
    seconds = find_record(run_dir / "seconds.json")
    rounds = 1 + len(list((run_dir / "rounds").glob("[0-9]*")))
    page: dict[str, Any] = {
        "evaluation": evaluation,
        "config": config,
        "cost": _cost(seconds) if seconds else None,
        "groups": _training_groups(run_dir / "groups", rewards, 0 if evaluation is None else evaluation["seed"]),
        "rounds": rounds,
        "sign_words": {name: threshold[0] for name, threshold in THRESHOLDS.items()},
        "axes": AXES,
        **_title(run_dir, evaluation),
        **_training(run_dir / "metrics.jsonl", rounds),
        **(_compared(run_dir, evaluation) if evaluation else {}),
    }
    page["sections"] = [
        (anchor, words)
        for anchor, words, there in (
            ("training", "Training", True),
            ("reward", "Reward and quality", evaluation),
            ("image_stats", "Signs of hacking", evaluation),
            ("images", "Images", evaluation),
            ("groups", "Training groups", page["groups"]),
            ("configuration", "Configuration", config),
        )
        if there
    ]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("gdro.evaluation") / "report.html").read_text(encoding="utf-8"))
    path = run_dir / "report.html"
    write_bytes(path, template.render(page).encode())
    return path


def _title(run_dir: Path, evaluation: Mapping[str, Any] | None) -> dict[str, str]:
    if evaluation is None:
        return {"title": f"gdro: {run_dir.resolve().name}", "subtitle": "A run in progress."}
    model = evaluation["model"]
    name = Path(model).name if Path(model).is_absolute() else model
    return {
        "title": f"{name} tuned on {evaluation['reward']}",
        "subtitle": f"Run {run_dir.resolve().name}, seed {evaluation['seed']}: "
        f"{evaluation['num_inference_steps']} steps of {evaluation['scheduler']}, "
        f"guidance {evaluation['guidance_scale']:g}, weights {evaluation['fingerprint']}.",
    }


def _cost(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Wall seconds of each stage as shares of a bar; their sum is the total."""
    stages = {name: value for name, value in seconds.items() if name != "total"}
    shades = np.linspace(1, 0.3, max(1, len(stages))).round(2)
    parts = [
        {"name": name, "seconds": round(value, 3), "shown": duration(value), "opacity": shade}
        for (name, value), shade in zip(stages.items(), shades, strict=True)
    ]
    return {"total": duration(sum(stages.values())), "parts": parts}


def _training(path: Path, rounds: int) -> dict[str, Any]:
    rows: dict[int, dict[str, Any]] = {}
    validations: dict[int, dict[str, Any]] = {}
    for row in read_metrics(path):
        step = row["step"]
        if "validation" in row:
            validations[step] = {"step": step, **row["validation"]}
        else:
            rows[step] = row  # a resumed run repeats the steps after its checkpoint
    svgs = [plots.curves(name, list(rows.values()), fields) for name, fields in CURVES.items()]
    svgs += [plots.curves(name, list(validations.values()), fields) for name, fields in VALIDATION_CURVES.items()]
    note = f"{len(rows)} steps{f' in {rounds} rounds' if rounds > 1 else ''}"
    if rows and "images_per_second" in (last := rows[max(rows)]):
        note += f", {last['images_per_second']:.3g} images/s at the last one"
    if rung := sum(row.get("alarm", False) for row in rows.values()):
        note += f"; the alarm was on in {rung} of them: the best images' error was above the reference's"
    return {"curves": [Markup(svg) for svg in svgs if svg is not None], "training_note": f"{note}."}


@dataclass(frozen=True)
class _Side:
    """One side's store of the evaluation, with what the reward recognized in its images."""

    name: str
    store: GroupStore
    evidence: dict[str, dict[str, Any]]  # image id -> evidence


def _compared(run_dir: Path, evaluation: Mapping[str, Any]) -> dict[str, Any]:
    arrays = {side: {k: np.array(v, dtype=np.float64) for k, v in evaluation[side].items()} for side in SIDES}
    base, tuned = (arrays[side]["reward"] for side in SIDES)
    paired = np.isfinite(base) & np.isfinite(tuned)
    means = pair_means(base, tuned)
    axes = evaluation["corrected_axes"]
    quality = {side: np.mean([arrays[side][axis] for axis in axes], axis=0) for side in SIDES}
    quality_plot = plots.reward_against_quality(
        {side: (arrays[side]["reward"][paired], quality[side][paired]) for side in SIDES}
    )
    sides = []
    for name in SIDES:
        folder = run_dir / "evaluation" / name
        if folder.is_dir():
            evidence = read_evidence(folder / "rewards" / f"{evaluation['reward']}.parquet")
            sides.append(_Side(name, GroupStore(folder), evidence))
    galleries: list[dict[str, Any]] = []
    for title, places in choose_prompts(*means, seed=evaluation["seed"]) if len(sides) == 2 else []:
        prompts = [_prompt_card(sides, evaluation, arrays, means, i) for i in places]
        if prompts:
            galleries.append({"title": title, "prompts": prompts})
    figures = [f for g in galleries for p in g["prompts"] for s in p["sides"] for f in s["images"]]
    return {
        "compared": int(paired.any(axis=1).sum()),
        "better": int(np.sum(means[1] > means[0])),
        "worse": int(np.sum(means[1] < means[0])),
        "reward_plots": [Markup(plots.reward_histogram(base, tuned)), Markup(plots.prompt_scatter(*means))],
        "quality_plot": None if quality_plot is None else Markup(quality_plot),
        "galleries": galleries,
        "recognized": any(f["text"] is not None for f in figures),
        "pixels": any("image/png" in f["uri"][:16] for f in figures),
        "selection_note": "Most improved and most worsened are by the mean reward of the prompt's images."
        if galleries
        else "The images of this evaluation are not in the run's folder.",
    }


def _prompt_card(
    sides: list[_Side],
    evaluation: Mapping[str, Any],
    arrays: Mapping[str, Any],
    means: tuple[np.ndarray, np.ndarray],
    place: int,
) -> dict[str, Any]:
    group = evaluation["prompt_ids"][place]
    prompt = sides[0].store.prompt(group)
    shown = []
    for side, mean in zip(sides, means, strict=True):
        rewards = arrays[side.name]["reward"][place]
        figures = []
        for image_id, image, value in zip(side.store.image_ids(group), side.store.images(group), rewards, strict=True):
            evidence = side.evidence.get(image_id, {})
            figures.append(figure(image, value, evidence, f"{side.name}: {prompt.text}"))
        reward = float(mean[place]) if np.isfinite(mean[place]) else None
        shown.append({"name": side.name, "reward": reward, "images": figures})
    target = target_of(prompt) if evaluation["reward"] in OCR else None
    return {"text": prompt.text, "target": target, "sides": shown}


def _training_groups(groups: Path, scores: Path, seed: int) -> list[dict[str, Any]]:
    """Cards for a few training groups, images by descending reward; empty until they are scored."""
    if not scores.exists() or not groups.is_dir():
        return []
    store = GroupStore(groups)
    rewards = {group: values.numpy() for group, values in read_rewards(scores, store).items()}
    evidence = read_evidence(scores)
    cards = []
    for group in choose_groups(rewards, seed=seed):
        prompt, images = store.prompt(group), store.images(group)
        figures = [
            figure(image, reward, evidence.get(image_id, {}), prompt.text)
            for image_id, image, reward in zip(store.image_ids(group), images, rewards[group], strict=True)
        ]
        low, high = float(np.nanmin(rewards[group])), float(np.nanmax(rewards[group]))
        pixels = is_pixel_art(images[0])
        cards.append({"text": prompt.text, "low": low, "high": high, "pixels": pixels, "images": mark_ends(figures)})
    return cards


def _text(path: Path) -> str | None:
    return read_text(path, "the run's configuration") if path.exists() else None
