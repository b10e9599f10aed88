"""What all runs of a comparison must share: by name the same base model, reward and judge, down to the version."""

from collections.abc import Iterable, Mapping
from pathlib import Path

from gdro.common.errors import UserError
from gdro.common.sealed import find_record
from gdro.models import model_revision
from gdro.rewards.registry import Spec, load_judge, load_reward, title
from gdro.runner.config import RunConfig, saved_config

MADE_WITH = "made_with.json"  # in a run directory: what it was begun with
Versions = dict[str, str]


def made_with(config: RunConfig, known: Versions) -> Versions:
    """The version in this process of everything the configuration names: what a run begun now is made with.

    `known` keeps what was found, as the digest of a large model takes a while.
    """
    model, reward, judge = _names(config)
    if model not in known:
        known[model] = model_revision(config.model)
    if reward not in known:
        known[reward] = load_reward(measured_by(config)).version
    if judge not in known and config.evaluate.judge is not None:
        known[judge] = load_judge(config.evaluate.judge).version
    return {name: known[name] for name in (model, reward, judge) if name in known}


def recorded(run: Path) -> list[Versions]:
    """What the run directory was begun with and, where it is there, what its evaluation was made with."""
    begun, evaluation, saved = find_record(run / MADE_WITH), find_record(run / "evaluation.json"), saved_config(run)
    found: list[Versions] = [] if begun is None else [begun]
    if evaluation is not None and saved is not None:
        versions = (evaluation["revision"], evaluation["reward_version"], evaluation["judge_version"])
        found.append({k: v for k, v in zip(_names(saved), versions, strict=True) if v is not None})
    return found


def check_agreement(records: Iterable[tuple[str, Mapping[str, str]]]) -> None:
    """Raise UserError if two records (place, versions) have the same thing in different versions."""
    seen: dict[str, dict[str, dict[str, None]]] = {}
    for place, versions in records:
        for name, version in versions.items():
            seen.setdefault(name, {}).setdefault(version, {})[place] = None
    for name, found in seen.items():
        if len(found) > 1:
            (one, here), (other, there) = list(found.items())[:2]
            raise UserError(
                f"{name} is {one} in {_places(list(here))}, but {other} in {_places(list(there))}; expected one "
                "version for the whole spec: delete the folders of the one that is not meant, or take another --out"
            )


def _names(config: RunConfig) -> tuple[str, str, str]:
    return f"model {config.model}", f"reward {title(measured_by(config))}", f"judge {config.evaluate.judge}"


def measured_by(config: RunConfig) -> Spec | list[Spec]:
    """The reward that validation and evaluation measure."""
    return config.score.reward if config.evaluate.reward is None else config.evaluate.reward


def _places(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
