"""Scoring every image in a store of groups; shared by the score stage and the evaluation.

Scores of finished files of groups are kept in `.<reward>/` until the last is done, then merged into `<reward>.parquet`.
A derived reward is computed from the files of its terms.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from gdro.common import distributed
from gdro.common.errors import UserError
from gdro.common.progress import Progress, say
from gdro.common.reading import parse_json
from gdro.common.sealed import find_record, write_record
from gdro.groups.scores import Header, read_header, read_rewards, read_scored, rewards_table, write_rewards
from gdro.groups.shard import Shard, pieces
from gdro.groups.store import GroupStore
from gdro.groups.workers import score_all
from gdro.rewards.base import Reward, Scores
from gdro.rewards.derived import DerivedReward, Scorer

MAX_MISSING = 0.1
PER_PROCESS = 128  # images that make starting a process worthwhile

ScoreFiles = Callable[..., None]
"""`score_files`, or a function that does the same on other machines."""


def score_groups(
    reward: Scorer,
    groups: str | Path,
    out: str | Path | None = None,
    *,
    workers: int = 0,
    batch_size: int = 64,
    standard: Path | None = None,
    fit: bool = False,
    max_missing: float = MAX_MISSING,
    score: ScoreFiles | None = None,
) -> Path:
    """Score the store in `groups`, `batch_size` images at once; returns `out/<reward.name>.parquet`.

    `out` defaults to the folder `rewards` beside the groups' folder.

    `standard` is the file of a derived reward's constants; with `fit` they are computed from these images and written.

    `workers` 0 means a process per core, fewer for few images, if the reward allows it (`parallel`), otherwise one.
    `score` scores the files on other machines.

    Several processes share the files of groups; the first one merges the results.

    A rerun scores what is missing: unfinished files of groups after an interruption, new ones after an extension,
    everything for a new version of the reward. Raises UserError if the store is damaged, a prompt does not suit the
    reward, an image cannot be scored, or more than the share `max_missing` has no score; the next run then rescores the
    files that lack scores.
    """
    groups = Path(groups)
    out = groups.parent / "rewards" if out is None else Path(out)
    if isinstance(reward, DerivedReward):
        paths = [
            score_groups(
                term.reward,
                groups,
                out,
                workers=workers,
                batch_size=batch_size,
                max_missing=max_missing,
                score=score,
            )
            for term in reward.terms
        ]
        return _derive(reward, GroupStore(groups), paths, out, standard, fit=fit)
    store = GroupStore(groups)
    reward.check([store.prompt(group) for group in store.group_ids])
    path, parts = out / f"{reward.name}.parquet", out / f".{reward.name}"
    header = Header(reward.name, reward.version, store.contents)
    before = read_header(path) if path.exists() else Header(reward.name, "", {})
    if before == header:
        if distributed.is_first():
            shutil.rmtree(parts, ignore_errors=True)
        return path

    old_places = {}
    if before.version == header.version:
        for place, (name, content) in enumerate(before.contents.items()):
            if header.contents.get(name) == content:
                old_places[name] = place

    def missing() -> list[str]:
        done = old_places.keys() | {s.path.name for s in store.shards if _is_done(parts, reward, s)}
        return [shard.path.name for shard in store.shards if shard.path.name not in done]

    names = distributed.first(missing)
    images = {shard.path.name: sum(shard.groups.values()) for shard in store.shards}
    own = [shard for shard in store.shards if shard.path.name in distributed.mine(names)]
    total = sum(images[shard.path.name] for shard in own)
    done = sum(images.values()) - sum(images[name] for name in names)
    with Progress(distributed.of_first(f"score {reward.name}"), done + total, "img", done) as progress:

        def scored(values: np.ndarray) -> None:
            progress.advance(len(values), **_mean(values))

        if own:
            (score or score_files)(reward, own, parts, scored, workers=workers, batch_size=batch_size)
    distributed.wait()

    def tables() -> Iterator[pa.Table]:
        for shard in store.shards:
            name = shard.path.name
            yield read_scored(path, old_places[name]) if name in old_places else read_scored(parts / name, 0)

    if distributed.is_first():
        lacking = _check_missing(reward.name, tables(), parts, max_missing)
        write_rewards(path, header, tables())
        shutil.rmtree(parts, ignore_errors=True)
        if lacking:
            say(f"score: {lacking} of {sum(images.values())} images have no score (evidence in {path})")
    distributed.wait()
    return path


def score_files(
    reward: Reward,
    shards: Sequence[Shard],
    parts: Path,
    scored: Callable[[np.ndarray], None],
    *,
    workers: int,
    batch_size: int,
) -> None:
    """Score files of groups; each one's scores appear atomically in the folder `parts` when it is done.

    `scored` receives scores as they come, in any order. `workers` is as in `score_groups`.
    """
    images = sum(sum(shard.groups.values()) for shard in shards)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = workers or (min(cores // distributed.local_size(), images // PER_PROCESS) if reward.parallel else 1)
    jobs = [job for shard in shards for job in pieces(shard, batch_size)]
    unfinished: dict[str, dict[str, tuple[float, dict]]] = {shard.path.name: {} for shard in shards}
    by_name = {shard.path.name: shard for shard in shards}
    for job, ids, scores in score_all(reward, jobs, batch_size, max(1, min(workers, len(jobs)))):
        name = job.shard.name
        unfinished[name] |= zip(ids, zip(scores.values.tolist(), scores.evidence, strict=True), strict=True)
        scored(scores.values)
        if len(unfinished[name]) == sum(by_name[name].groups.values()):
            _write_part(parts, reward, by_name[name], unfinished.pop(name))


def _derive(
    reward: DerivedReward, store: GroupStore, paths: list[Path], out: Path, standard: Path | None, *, fit: bool
) -> Path:
    """Combine the terms' files; an image's evidence is the scores of its terms."""
    scores = [{group: r.numpy() for group, r in read_rewards(path, store).items()} for path in paths]
    constants = reward.constants(scores) if fit or not reward.standardizes else _read_constants(reward, standard)
    if fit and standard is not None and distributed.is_first():
        write_record(standard, {**(find_record(standard) or {}), reward.version: constants})  # others keep theirs
    combined = reward.combined(scores, constants)
    header = Header(reward.name, reward.version, store.contents)

    def tables() -> Iterator[pa.Table]:
        for shard in store.shards:
            ids = [f"{group}/{i}" for group, size in shard.groups.items() for i in range(size)]
            places = [(group, i) for group, size in shard.groups.items() for i in range(size)]
            evidence = [
                {"terms": {t.reward.name: _number(s[group][i]) for t, s in zip(reward.terms, scores, strict=True)}}
                for group, i in places
            ]
            values = np.array([combined[group][i] for group, i in places])
            yield rewards_table(_part_header(reward, shard), ids, Scores(values, evidence))

    path = out / f"{reward.name}.parquet"
    if distributed.is_first():
        write_rewards(path, header, tables())
    distributed.wait()
    return path


def _read_constants(reward: DerivedReward, standard: Path | None) -> list[tuple[float, float]]:
    saved = None if standard is None else find_record(standard)
    if saved is None or reward.version not in saved:
        raise UserError(
            f'{standard} has no constants for the reward "{reward.name}"; expected those from scoring the first '
            'round\'s images ("gdro score")'
        )
    return [(mean, std) for mean, std in saved[reward.version]]


def _mean(values: np.ndarray) -> dict[str, float]:
    present = values[np.isfinite(values)]
    return {"reward": float(present.mean())} if len(present) else {}


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _check_missing(name: str, tables: Iterable[pa.Table], parts: Path, most: float) -> int:
    """How many images have no score. If too many, `parts` that lack scores are removed, so a rerun asks again.

    A win rate with missing comparisons counts as missing by their share.
    """
    lost, lacking, total, why, unfinished = 0.0, 0, 0, "", []
    for table in tables:
        total += len(table)
        before = lost
        for score, text in zip(table["score"].to_pylist(), table["evidence"].to_pylist(), strict=True):
            wins = [] if score is None else parse_json(text, f"{name}: evidence").get("wins", [])
            share = 1.0 if score is None else wins.count(None) / max(1, len(wins))
            why = text if share and not why else why
            lost, lacking = lost + share, lacking + (score is None)
        if lost > before:
            unfinished.append(str(table["image_id"][0]))
    try:
        check_missing(f'reward "{name}"', lost, total, most, why)
    except UserError:
        for part in parts.glob("*.parquet"):
            if str(read_scored(part, 0)["image_id"][0]) in unfinished:
                part.unlink()
        raise
    return lacking


def check_missing(who: str, lost: float, total: int, most: float, why: str = "") -> None:
    """Raise UserError if `lost` of `total` answers exceed the share `most`, or are all; a single one is tolerated."""
    allowed = max(1.0, most * total) if most else 0.0
    if not lost or (lost <= allowed and lost < total):
        return
    first = f"; for the first it says {why:.300}" if why else ""
    raise UserError(
        f"{who} gave {lost:.0f} of {total} images no score{first}; expected at most {100 * most:g} % "
        "(score.max_missing); the next run asks again for those missing"
    )


def _is_done(parts: Path, reward: Reward, shard: Shard) -> bool:
    part = parts / shard.path.name
    return part.exists() and read_header(part) == _part_header(reward, shard)


def _part_header(reward: Scorer, shard: Shard) -> Header:
    return Header(reward.name, reward.version, {shard.path.name: shard.content})


def _write_part(parts: Path, reward: Reward, shard: Shard, found: dict[str, tuple[float, dict]]) -> None:
    ids = [f"{group}/{i}" for group, size in shard.groups.items() for i in range(size)]
    scores = Scores(np.array([found[i][0] for i in ids]), [found[i][1] for i in ids])
    one = _part_header(reward, shard)
    write_rewards(parts / shard.path.name, one, [rewards_table(one, ids, scores)])
