"""What raters see: the models' images of the same prompts and seeds, paired and shown blind to each rater."""

import hashlib
import hmac
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError
from gdro.common.rng import numpy_rng
from gdro.groups.shard import read_rows
from gdro.groups.store import GroupStore


@dataclass(frozen=True)
class Model:
    """A model, by its images; `name` appears in the table and in the database, never on the page."""

    name: str
    store: GroupStore


@dataclass(frozen=True)
class Pair:
    """The `index`-th images of one prompt by two models, named in the order of the command line."""

    group: str
    prompt: str
    index: int
    first: str
    second: str


@dataclass(frozen=True)
class Shown:
    """A pair as one rater sees it. The page only gets the tokens; `images` are A's and B's."""

    number: int
    token: str
    images: tuple[str, str]
    models: tuple[str, str]


def open_models(paths: Sequence[Path]) -> list[Model]:
    """Base and tuned model of a single run's evaluation; for several runs (or stores of groups), the tuned ones.

    Raises UserError if a run's evaluation is not finished, or if prompts, seeds or image sizes differ.
    """
    if len({path.resolve() for path in paths}) < len(paths):
        raise UserError(f"{' '.join(map(str, paths))} names a folder twice; expected every run once")
    if len(paths) == 1:
        if not _is_run(paths[0]):
            raise UserError(f"{paths[0]} is one store of groups; expected a run, or at least two stores")
        models = [Model(side, GroupStore(paths[0] / "evaluation" / side)) for side in ("base", "tuned")]
    else:
        stores = [GroupStore(path / "evaluation" / "tuned" if _is_run(path) else path) for path in paths]
        models = [Model(name, store) for name, store in zip(_names(paths), stores, strict=True)]
    for model in models[1:]:
        _check_alike(models[0].store, model.store)
    return models


def _is_run(path: Path) -> bool:
    """Whether it is a run with a finished evaluation; False for a store. UserError for anything else."""
    if any(path.glob("groups-*.parquet")):
        return False
    if not os.path.isfile(path / "evaluation.json"):
        raise UserError(
            f"{path} has neither evaluation.json nor groups-*.parquet; expected a run whose evaluation is finished "
            "(`gdro evaluate`), or a store of groups"
        )
    return True


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as few as distinguish them."""
    parts = [path.resolve().parts for path in paths]
    depth = 1
    while len({p[-depth:] for p in parts}) < len(parts):
        depth += 1
    return ["/".join(p[-depth:]) for p in parts]


def _check_alike(one: GroupStore, other: GroupStore) -> None:
    """Raise UserError unless both stores have images of the same prompts, from the same seeds, of the same size."""
    for group in [*one.group_ids, *other.group_ids]:
        if group not in one.group_ids or group not in other.group_ids:
            has, lacks = (one, other) if group in one.group_ids else (other, one)
            raise UserError(f'{lacks.folder} has no prompt "{group}", {has.folder} has; expected the same prompts')
    for group in one.group_ids:
        if one.prompt(group) != other.prompt(group):
            raise UserError(f'{other.folder} has another prompt "{group}" than {one.folder}; expected the same prompts')
        if one.size(group) != other.size(group):
            raise UserError(
                f'{other.folder} has {other.size(group)} images of prompt "{group}", {one.folder} has '
                f"{one.size(group)}; expected equally many"
            )
        if one.image_size(group) != other.image_size(group):
            (height, width), (own_height, own_width) = other.image_size(group), one.image_size(group)
            raise UserError(
                f'{other.folder} has images of {width}x{height} of prompt "{group}", {one.folder} of '
                f"{own_width}x{own_height}; expected the same size, as a different one would give the models away"
            )
    seeds, found = _seeds(one), _seeds(other)
    for group, expected in seeds.items():
        if found[group] != expected:
            raise UserError(
                f'{other.folder} has images of prompt "{group}" from the seeds {found[group]}, {one.folder} from '
                f"{expected}; expected the same seeds"
            )


def _seeds(store: GroupStore) -> dict[str, list[int | None]]:
    return {
        group: read_rows(shard.path, place, ["seed"])["seed"].to_pylist()
        for shard in store.shards
        for place, group in enumerate(shard.groups)
    }


def draw_pairs(models: Sequence[Model], count: int | None, *, seed: int) -> list[Pair]:
    """The first `count` of all pairs, ordered so any prefix is balanced; by default every prompt once for every two
    models.

    The order goes through all (shuffled) prompts and pairs of models before it takes a prompt's next image. A larger
    count adds pairs and changes none. Raises UserError if there are fewer.
    """
    store = models[0].store
    rivals = [(a.name, b.name) for a, b in combinations(models, 2)]
    groups = [store.group_ids[i] for i in numpy_rng(seed, "arena prompts").permutation(len(store.group_ids))]
    images = {g: numpy_rng(seed, "arena images", g).permutation(store.size(g)).tolist() for g in groups}
    pairs = [
        Pair(group, store.prompt(group).text, images[group][turn], *rivals[(place + shift) % len(rivals)])
        for turn in range(max(map(len, images.values())))
        for shift in range(len(rivals))
        for place, group in enumerate(groups)
        if turn < len(images[group])
    ]
    if count is None:
        count = len(groups) * len(rivals)
    if not 1 <= count <= len(pairs):
        raise UserError(f"--pairs is {count}; expected 1 to {len(pairs)}, the number the images allow")
    return pairs[:count]


def deal(pairs: Mapping[int, Pair], rater: str, *, seed: int, secret: bytes) -> list[Shown]:
    """The pairs in this rater's order, each with its sides drawn from (seed, rater, pair).

    Tokens are keyed hashes: they reveal nothing without `secret`, and a page survives a restart of the server.
    """
    dealt = []
    for number, pair in pairs.items():
        rng = numpy_rng(seed, "arena deal", rater, pair.group, pair.index, pair.first, pair.second)
        models = (pair.second, pair.first) if rng.integers(2) else (pair.first, pair.second)
        token, *images = (_token(secret, what, rater, number) for what in ("pair", "a", "b"))
        dealt.append((rng.random(), Shown(number, token, (images[0], images[1]), models)))
    return [shown for _, shown in sorted(dealt, key=lambda item: item[0])]


def _token(secret: bytes, *parts: Any) -> str:
    return hmac.new(secret, "\x1f".join(map(str, parts)).encode(), hashlib.sha256).hexdigest()[:32]
