"""The comparison's results as data: what each run's files say, and what follows over seeds."""

import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from gdro.common.errors import UserError
from gdro.common.sealed import read_record
from gdro.evaluation.statistics import AXES
from gdro.tools.comparison.choice import validations
from gdro.tools.comparison.spec import ComparisonSpec, run_name

COSTS = ("nfe", "seconds")
SCORES = ("reward", "corrected", *AXES)
LIBRARIES = ("gdro", "torch", "diffusers", "transformers", "peft", "numpy", "rapidocr", "onnxruntime")
# 97.5 % points of Student's t for 1 to 5 degrees of freedom; beyond, the expansion below is good to .0005
_T = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706)


def t_quantile(degrees: int) -> float:
    """The 97.5 % point of Student's t: tabled up to 5 degrees of freedom, then Cornish-Fisher."""
    if degrees <= len(_T):
        return _T[degrees - 1]
    return 1.959964 + 2.372271 / degrees + 2.822499 / degrees**2 + 2.555849 / degrees**3 + 1.589534 / degrees**4


def over_seeds(values: Sequence[float | None]) -> dict[str, Any]:
    """{mean, ci95, n} of one value a seed: Student's t interval of the mean, null for fewer than two values."""
    found = np.array([value for value in values if value is not None], dtype=np.float64)
    if not len(found):
        return {"mean": None, "ci95": None, "n": 0}
    mean = float(found.mean())
    half = t_quantile(len(found) - 1) * float(found.std(ddof=1)) / len(found) ** 0.5 if len(found) > 1 else None
    return {"mean": mean, "ci95": None if half is None else [mean - half, mean + half], "n": len(found)}


def curve(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The validation curve: step, reward, corrected score, and the cost so far (generation, scoring and training)."""
    return [
        {
            "step": row["step"],
            **{cost: sum(row[cost].values()) for cost in COSTS},
            "reward": row["reward"],
            "corrected": row.get("corrected"),
        }
        for row in rows
    ]


def cost_to_reach(points: Sequence[Mapping[str, Any]], target: float, cost: str) -> float | None:
    """The cost at which the reward first reaches `target`, linear between validations; None if it never does."""
    for place, point in enumerate(points):
        if point["reward"] < target:
            continue
        if place == 0:
            return float(point[cost])
        before = points[place - 1]
        share = (target - before["reward"]) / (point["reward"] - before["reward"])
        return float(before[cost] + share * (point[cost] - before[cost]))
    return None


def run_results(run: Path, target: float) -> dict[str, Any]:
    """Everything the table and the page need of one finished run directory."""
    evaluation, summary = read_record(run / "evaluation.json"), read_record(run / "summary.json")
    points = curve(validations(run))
    if not points:
        raise UserError(f"{run / 'metrics.jsonl'} holds no validation; expected one at least")
    last = points[-1]
    found = {
        "results": {name: evaluation["results"][name] for name in SCORES},
        "image_stats": evaluation["image_stats"],
        "verdict": evaluation["verdict"],
        "alarm": evaluation["alarm"],
        "nfe": summary["nfe"],
        "seconds": summary["seconds"],
        "stopped": read_record(run / "checkpoints" / "stopped.json"),
        "curve": points,
        "to_target": {cost: cost_to_reach(points, target, cost) for cost in COSTS},
        "spent": {cost: last[cost] for cost in COSTS},
    }
    if "geneval" in evaluation:
        found["geneval"] = evaluation["geneval"]
    return found


def summarize(seeds: Mapping[str, Mapping[str, Any]], side: str = "tuned") -> dict[str, Any]:
    """Over the finished seeds of one method: means with intervals. `side` base leaves the cost out."""
    runs = list(seeds.values())
    out: dict[str, Any] = {name: over_seeds([run["results"][name][side] for run in runs]) for name in SCORES}
    if all("geneval" in run for run in runs):
        names = runs[0]["geneval"][side]
        out["geneval"] = {name: over_seeds([run["geneval"][side][name] for run in runs]) for name in names}
    if side == "base":
        return out
    names = runs[0]["image_stats"]
    out["image_stats"] = {name: over_seeds([run["image_stats"][name]["relative"] for run in runs]) for name in names}
    outcomes = [run["verdict"]["outcome"] for run in runs]
    out["verdicts"] = {outcome: outcomes.count(outcome) for outcome in dict.fromkeys(outcomes)}
    out["alarms"] = sum(run["alarm"] is not None and run["alarm"]["on"] for run in runs)
    out["seconds"] = {
        stage: over_seeds([run["seconds"][stage] for run in runs]) for stage in ("sample", "score", "train")
    }
    out["nfe"] = {stage: over_seeds([run["nfe"][stage] for run in runs]) for stage in ("sample", "train")}
    out["to_target"] = {cost: _to_target(runs, cost) for cost in COSTS}
    return out


def _to_target(runs: Sequence[Mapping[str, Any]], cost: str) -> dict[str, Any]:
    """Mean cost to the target; a run that never reached it counts with all it spent, so the mean is a lower bound,
    which has no interval."""
    reached = sum(run["to_target"][cost] is not None for run in runs)
    found = over_seeds([_cost(run, cost) for run in runs])
    return {**_bounded(found, reached < len(runs)), "reached": reached}


def _cost(run: Mapping[str, Any], cost: str) -> float:
    reached = run["to_target"][cost]
    return float(run["spent"][cost] if reached is None else reached)


def _bounded(found: Mapping[str, Any], lower_bound: bool) -> dict[str, Any]:
    return {**found, "ci95": None if lower_bound else found["ci95"], "lower_bound": lower_bound}


def cost_ratio(
    seeds: Mapping[str, Mapping[str, Any]], first: Mapping[str, Mapping[str, Any]], cost: str
) -> dict[str, Any] | None:
    """How many times the first method's cost to the target, paired: {mean, ci95, n, lower_bound}.

    The geometric mean over the seeds both have, Student's interval on the logarithm; null without such seeds, and where
    the first method has no cost but a bound.
    """
    pairs = [(run, first[seed]) for seed, run in seeds.items() if seed in first]
    if not pairs or any(other["to_target"][cost] is None for _, other in pairs):
        return None
    costs = [(_cost(run, cost), _cost(other, cost)) for run, other in pairs]
    if min(map(min, costs)) <= 0:
        return None
    found = over_seeds([math.log(own / other) for own, other in costs])
    ends = None if found["ci95"] is None else [math.exp(end) for end in found["ci95"]]
    ratio = {"mean": math.exp(found["mean"]), "ci95": ends, "n": found["n"]}
    return _bounded(ratio, any(run["to_target"][cost] is None for run, _ in pairs))


def compare_to_first(methods: Mapping[str, dict[str, Any]]) -> None:
    """Give every finished method's `over_seeds` its `to_first`: cost -> `cost_ratio`."""
    first = next(iter(methods.values()))["seeds"]
    for method in methods.values():
        if method["seeds"]:
            method["over_seeds"]["to_first"] = {cost: cost_ratio(method["seeds"], first, cost) for cost in COSTS}


def collect(
    spec: ComparisonSpec,
    out: Path,
    is_done: Callable[[str], bool],
    *,
    choices: Mapping[str, Any],
    failed: Mapping[str, str],
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """The results of every finished run below `out`; `failed` maps names of jobs to their error."""
    tasks = {}
    for task, section in spec.tasks.items():
        methods: dict[str, Any] = {}
        for name, method in spec.methods.items():
            seeds: dict[str, Any] = {}
            errors = {}
            for seed in spec.seeds:
                job = run_name(task, name, seed)
                if job in failed:
                    errors[str(seed)] = failed[job]
                elif is_done(job):
                    seeds[str(seed)] = {"folder": job, **run_results(out / job, section.target_reward)}
            methods[name] = {
                "title": method.title,
                "continues": method.continues,
                "budget": spec.budget(task, name),
                "choice": choices.get(task, {}).get(method.continues or name),
                "seeds": seeds,
                "over_seeds": summarize(seeds) if seeds else None,
                "failed": errors,
            }
        compare_to_first(methods)
        bases = {seed: run for m in reversed(methods.values()) for seed, run in m["seeds"].items()}
        tasks[task] = {
            "target_reward": section.target_reward,
            "budget": spec.budget(task),
            "searched_on": spec.searched(task),
            "base": summarize(bases, "base") if bases else None,
            "methods": methods,
        }
    return {
        "tasks": tasks,
        "seeds": spec.seeds,
        "quick": spec.quick is not None,
        **settings,
        "machine": {"cores": os.cpu_count(), "system": platform.system(), "processor": platform.machine()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}},
    }
