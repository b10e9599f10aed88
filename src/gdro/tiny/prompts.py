"""Prompts of the tiny world, named `tiny:TASK:SPLIT:COUNT[:SEED]`, e.g. `tiny:ocr:test:128`.

The splits share no words (ocr) and no captions (geneval); the base model only saw words of the train split. GenEval's
six tags take turns, since its summary weights them equally; a tag that runs out of captions repeats them.
"""

from functools import cache
from typing import Any

import numpy as np

from gdro.common.errors import UserError, did_you_mean
from gdro.common.prompts import Prompt
from gdro.common.rng import numpy_rng
from gdro.common.validation import MAX_SEED
from gdro.tiny import world

TASKS = ("ocr", "geneval")
LIMIT = 2000  # words a split can give
PATIENCE = 50  # draws of captions already used before one is repeated (geneval)


def tiny_prompts(spec: str) -> list[Prompt]:
    """The prompts for a spec, the same on every call; UserError names the part of the spec that is wrong."""
    parts = spec.split(":")
    if len(parts) not in (4, 5) or parts[0] != "tiny":
        raise UserError(
            f'prompts: "{spec}" is not a spec; expected tiny:TASK:SPLIT:COUNT[:SEED], e.g. tiny:ocr:train:256'
        )
    _, task, split, count_text, *rest = parts
    if task not in TASKS:
        raise UserError(f'prompts: "{spec}" names the task "{task}"{did_you_mean(task, TASKS)}')
    if split not in world.SPLITS:
        raise UserError(f'prompts: "{spec}" names the split "{split}"{did_you_mean(split, world.SPLITS)}')
    if not _is_integer(count_text, 1, LIMIT):
        raise UserError(f'prompts: "{spec}" asks for "{count_text}" prompts; expected 1 to {LIMIT}')
    if rest and not _is_integer(rest[0], 0, MAX_SEED):
        raise UserError(f'prompts: "{spec}" has the seed "{rest[0]}"; expected an integer from 0 to {MAX_SEED}')
    if task == "geneval" and int(count_text) > _captions(split):
        raise UserError(
            f'prompts: "{spec}" asks for {count_text} prompts, but the {split} split has {_captions(split)} captions; '
            "expected at most that many"
        )
    seed = int(rest[0]) if rest else 0
    make = _ocr_fields if task == "ocr" else _geneval_fields
    found: list[tuple[str, dict[str, Any]]] = []
    seen: set[str] = set()
    draw, again = 0, 0
    while len(found) < int(count_text):
        fields = make(numpy_rng(seed, f"prompts-{task}-{split}", draw), split, len(found))
        text = world.caption(fields["scene"])
        draw += 1
        if task == "geneval" and world.word_split(f"caption:{text}") != split:
            continue
        if text in seen and (task == "ocr" or again < PATIENCE):
            again += 1
            continue
        found.append((text, fields))
        seen.add(text)
        again = 0
    return [Prompt(f"{task}-{split}-{seed}-{i:04d}", text, fields) for i, (text, fields) in enumerate(found)]


def _is_integer(text: str, least: int, most: int) -> bool:
    """Whether `text` is an integer in range; checks the length first, because Python refuses thousands of digits."""
    return text.isdecimal() and len(text) <= len(str(most)) and least <= int(text) <= most


@cache
def _captions(split: str) -> int:
    """How many captions of shapes the split has."""
    captions = {world.caption(scene) for scene in world.shape_scenes()}
    return sum(world.word_split(f"caption:{text}") == split for text in captions)


def _ocr_fields(rng: np.random.Generator, split: str, index: int) -> dict[str, Any]:
    scene = world.random_sign_scene(rng, split, objects=index % 3 == 2)
    return {"task": "ocr", "target": scene["word"], "scene": scene}


def _geneval_fields(rng: np.random.Generator, split: str, index: int) -> dict[str, Any]:
    """GenEval's record: tag, include (class, count, color, position relative to an earlier entry), exclude."""
    tag = world.TAGS[index % len(world.TAGS)]
    scene = world.random_shape_scene(rng, tag)
    include = []
    for item in scene["objects"]:
        entry: dict[str, Any] = {"class": item["shape"], "count": item["count"]}
        if item["color"]:
            entry["color"] = item["color"]
        include.append(entry)
    if scene["position"]:
        # "a A left of a B": the checked entry is A, placed relative to B, as GenEval lists the reference first
        include = [include[1], {**include[0], "position": [scene["position"], 0]}]
    record: dict[str, Any] = {"task": "geneval", "tag": tag, "include": include, "scene": scene}
    if tag == "counting":
        record["exclude"] = [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
    return record
