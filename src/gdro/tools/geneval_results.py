"""Recomputes GenEval's verdicts from stored detections, without pixels.

Reads the official evaluator's results (`results.jsonl` of its `evaluate_images.py`) and files of GenEval rewards.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from gdro.common.errors import UserError
from gdro.common.reading import parse_json, read_lines
from gdro.rewards.geneval.detection import Detection, Record
from gdro.rewards.geneval.rules import TAGS, Verdict, assess, kept, summary

_COLORED = re.compile(
    r"expected (\w+) (.+)>=\d+, found \d+ \w+; and (\d+ \w+(?:, \d+ \w+)*)"
)  # the official reason for a wrong color


@dataclass(frozen=True)
class Result:
    """One image. `strict`: the verdict, either an official file's own or recomputed; `soft`: recomputed, None if the
    file lacks what it needs; `differs`: whether the recomputed verdict differs from the file's."""

    where: str  # line of the file, or image id
    prompt: str  # the same for all images of one prompt
    tag: str
    strict: bool
    soft: float | None
    differs: bool


def results_table(path: Path, groups: Path | None = None) -> str:
    """The table of an official results file (.jsonl) or a file of GenEval rewards (.parquet), ready to print.

    `groups`: see `rescore`. Raises UserError naming file and line, or image.
    """
    if path.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{path} ends in {path.suffix!r}; expected GenEval's results (.jsonl) or rewards (.parquet)")
    return table(read_official(path) if path.suffix == ".jsonl" else rescore(path, groups))


def read_official(path: Path) -> list[Result]:
    """The images of an official results file; UserError naming the file and any line the script cannot have written.

    Verdicts are recomputed from its `details` (boxes and scores by class); colors, which it does not store, come from
    its reasons.
    """
    lines = read_lines(path, "the results of GenEval's evaluate_images.py")
    results = [_official(line, f"{path}:{number}") for number, line in lines]
    if not results:
        raise UserError(f"{path} is empty; expected one line per image")
    return results


def rescore(path: Path, groups: Path | None = None) -> list[Result]:
    """The images of a file of GenEval rewards, by today's rules.

    Files from before records were kept in the evidence need `groups`, the folder of the scored groups.
    """
    from gdro.groups.scores import read_header, read_scored
    from gdro.groups.store import GroupStore

    store = GroupStore(groups) if groups else None
    results = []
    for place in range(len(read_header(path).contents)):
        for row in read_scored(path, place).select(["image_id", "group_id", "evidence"]).to_pylist():
            where = f'{path}: image "{row["image_id"]}"'
            evidence = parse_json(row["evidence"], where)
            if "detections" not in evidence:
                raise UserError(f"{where} has no detections in its evidence; expected a file of GenEval rewards")
            asked = evidence.get("record")
            if asked is None and store is not None and row["group_id"] in store.group_ids:
                asked = store.prompt(row["group_id"]).fields
            if asked is None:
                raise UserError(f"{where} was stored without its prompt's record; expected the groups folder too")
            record = _record(asked, where)
            verdict = assess([Detection.from_json(d) for d in evidence["detections"]], record)
            differs = verdict.correct != evidence["correct"] or verdict.soft != evidence["soft"]
            results.append(Result(where, row["group_id"], record.tag, verdict.correct, verdict.soft, differs))
    return results


def table(results: Sequence[Result]) -> str:
    """Each tag's mean and images, and overall, the unweighted mean of the six tags, as in the official summary."""
    tags = [result.tag for result in results]
    strict = summary(np.asarray([float(r.strict) for r in results]), tags)
    # NaN if unknown, so no tag's mean covers only some of its images
    soft = summary(np.asarray([np.nan if r.soft is None else r.soft for r in results]), tags)
    counts = {tag: tags.count(tag) for tag in TAGS} | {"overall": len(results)}
    lines = [f"{'tag':<16}{'strict':>8}{'soft':>8}{'images':>8}"]
    for tag, count in counts.items():
        lines.append(f"{tag:<16}{_number(strict[tag]):>8}{_number(soft[tag]):>8}{count:>8}")
    prompts: dict[str, bool] = {}
    for result in results:
        prompts[result.prompt] = prompts.get(result.prompt, False) or result.strict
    lines.append(
        f"{np.mean([r.strict for r in results]):.2%} of the images are correct, "
        f"and at least one image of {np.mean(list(prompts.values())):.2%} of the {len(prompts)} prompts"
    )
    different = [result.where for result in results if result.differs]
    if different:
        lines.append(f"{len(different)} of the file's verdicts are not what its detections say, first {different[0]}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "-" if value is None or np.isnan(value) else f"{value:.4f}"


def _official(line: str, where: str) -> Result:
    row = parse_json(line, where, "a JSON object")
    if not isinstance(row, dict) or not isinstance(row.get("correct"), bool):
        found = row.get("correct") if isinstance(row, dict) else row
        raise UserError(f'{where} has {found!r} in "correct"; expected true or false')
    metadata = _nested(row, "metadata", where)
    record = _record(metadata, where)
    if row.get("tag") != record.tag:
        raise UserError(f'{where} has {row.get("tag")!r} in "tag"; expected "{record.tag}", as in its metadata')
    verdict = None
    if "details" in row:
        verdict = _again(list(_detections(_nested(row, "details", where), where)), record, str(row.get("reason") or ""))
    return Result(
        where,
        json.dumps(metadata, sort_keys=True),
        record.tag,
        row["correct"],
        None if verdict is None else verdict.soft,
        verdict is not None and verdict.correct != row["correct"],
    )


def _nested(row: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """The object under `key`, which the official script writes as a string of JSON."""
    value = row.get(key)
    if isinstance(value, str):
        value = parse_json(value, f'{where} in "{key}"', "a JSON object")
    if not isinstance(value, dict):
        raise UserError(f'{where} has {value!r} in "{key}"; expected an object')
    return value


def _record(value: Any, where: str) -> Record:
    try:
        return Record.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise UserError(f'{where} has no GenEval record: "{field}": {first["msg"]}') from None


def _detections(details: Mapping[str, Any], where: str) -> Iterator[Detection]:
    for label, boxes in details.items():
        for box in boxes if isinstance(boxes, list) else [boxes]:
            if not isinstance(box, list) or len(box) != 5 or not all(isinstance(v, int | float) for v in box):
                raise UserError(
                    f"{where} has {box!r} among the details of {label!r}; expected [left, top, right, bottom, score]"
                )
            left, top, right, bottom, score = box
            yield Detection(label, (left, top, right, bottom), score)


def _again(detections: Sequence[Detection], record: Record, reason: str) -> Verdict | None:
    """The verdict on detections without colors; None if the reasons lack the colors it needs.

    An entry with a color and enough objects either has the official reason for a wrong color, which counts the colors
    of the best `count` objects, or they all have the requested color. Which object has which color does not matter.
    """
    found = kept(detections, record.tag)
    told = {(m[1], m[2]): m[3] for m in map(_COLORED.fullmatch, reason.split("\n")) if m}
    colored: dict[str, list[str]] = {}
    for entry in record.include:
        if entry.color is None:
            continue
        there = len(found.get(entry.label, []))
        if entry.label in colored or 0 < there < entry.count:  # ambiguous, or never determined
            return None
        counts = told.get((entry.color, entry.label), f"{entry.count} {entry.color}")
        colored[entry.label] = list(_repeated(counts)) if there else []
    seen = [
        Detection(d.label, d.box, d.score, color)
        for label, objects in found.items()
        for d, color in zip(objects, [*colored.get(label, []), *[None] * len(objects)], strict=False)
    ]
    return assess(seen, record)


def _repeated(counts: str) -> Iterable[str]:
    """ "2 red, 1 blue" -> red, red, blue"""
    for part in counts.split(", "):
        number, _, color = part.partition(" ")
        yield from [color] * int(number)
