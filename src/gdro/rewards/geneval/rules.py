"""GenEval's rules: pure functions from detections to the official verdict and the soft score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gdro.rewards.geneval.detection import Detection, Record

TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # a detection counts above this score; the second for the tag "counting"
MOST = 16  # detections per class, at most
SHRINK = 0.1  # share of the two boxes' sizes subtracted from their centers' distance before it decides a relation


@dataclass(frozen=True)
class Verdict:
    """The official evaluator's `correct` and its reasons; the soft score and each entry's parts."""

    correct: bool
    reasons: list[str]
    soft: float
    parts: list[dict[str, Any]]


def assess(detections: Sequence[Detection], record: Record) -> Verdict:
    """The verdict on one image."""
    found = kept(detections, record.tag)
    reasons = mismatches(found, record)
    parts = satisfied(found, record)
    values = [v for part in parts for name, v in part.items() if name != "class"]
    return Verdict(not reasons, reasons, float(np.mean(values)), parts)


def kept(detections: Sequence[Detection], tag: str) -> dict[str, list[Detection]]:
    """The detections that count, by class, best first, at most MOST of each; overlapping ones are kept."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    found: dict[str, list[Detection]] = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        same = found.setdefault(detection.label, [])
        if detection.score > threshold and len(same) < MOST:
            same.append(detection)
    return found


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """Where box a lies relative to box b: up to two of left of, right of, above, below.

    Each component of the centers' offset o is shrunk by SHRINK times the boxes' sizes, then divided by |o|; it decides
    if it exceeds 1/2.
    """
    boxes = np.asarray([a, b], np.float64).reshape(2, 2, 2)  # (box, corner, axis)
    offset = boxes[0].mean(0) - boxes[1].mean(0)
    sizes = np.abs(boxes[:, 1] - boxes[:, 0]).sum(0)
    shrunk = np.sign(offset) * np.maximum(np.abs(offset) - SHRINK * sizes, 0)
    if (np.abs(shrunk) < 1e-3).all():
        return set()
    x, y = shrunk / np.linalg.norm(offset)
    decided = {"left of": x < -0.5, "right of": x > 0.5, "above": y < -0.5, "below": y > 0.5}
    return {name for name, holds in decided.items() if holds}


def mismatches(found: Mapping[str, Sequence[Detection]], record: Record) -> list[str]:
    """Why the official evaluator calls the image wrong; empty if it is correct.

    An entry requires at least `count` objects and considers only the best `count`. Its position is judged if number and
    color are right, against the objects of an entry that is itself right, and must hold for every pair.
    """
    reasons: list[str] = []
    matched: list[Sequence[Detection] | None] = []
    for entry in record.include:
        best = found.get(entry.label, [])[: entry.count]
        before = len(reasons)
        colored = sum(d.color == entry.color for d in best)
        if len(best) < entry.count:
            reasons.append(f"expected {entry.label}>={entry.count}, found {len(best)}")
        elif entry.color is not None and colored < entry.count:
            others = ", ".join(str(d.color) for d in best if d.color != entry.color)
            reasons.append(f"expected {entry.color} {entry.label}>={entry.count}, found {colored}, and {others}")
        elif entry.position is not None:
            relation, index = entry.position
            targets = matched[index]
            if targets is None:
                reasons.append(f"no target for {entry.label} to be {relation}")
            else:
                seen = [relations(a.box, b.box) for a in best for b in targets]
                wrong = next((s for s in seen if relation not in s), None)
                if wrong is not None:
                    where = " and ".join(sorted(wrong)) or "in no clear relation to"
                    reasons.append(f"expected {entry.label} {relation} target, found {where} target")
        matched.append(best if len(reasons) == before else None)
    for unwanted in record.exclude:
        count = len(found.get(unwanted.label, []))
        if count >= unwanted.count:
            reasons.append(f"expected {unwanted.label}<{unwanted.count}, found {count}")
    return reasons


def satisfied(found: Mapping[str, Sequence[Detection]], record: Record) -> list[dict[str, Any]]:
    """How far each entry is satisfied: {"class", "count", "color"?, "position"?}, all but the class in [0, 1].

    count: 1 - |found - wanted| / wanted, never below 0; color: share of the wanted objects that have it, among the
    best `count`; position: 1 if it holds for all pairs of objects found. An exclusion is its own part unless its class
    is also included, where the count already covers it.
    """
    parts: list[dict[str, Any]] = []
    best = [found.get(entry.label, [])[: entry.count] for entry in record.include]
    for entry, objects in zip(record.include, best, strict=True):
        off = abs(len(found.get(entry.label, [])) - entry.count)
        part: dict[str, Any] = {"class": entry.label, "count": max(0.0, 1 - off / entry.count)}
        if entry.color is not None:
            part["color"] = sum(d.color == entry.color for d in objects) / entry.count
        if entry.position is not None:
            relation, index = entry.position
            holds = [relation in relations(a.box, b.box) for a in objects for b in best[index]]
            part["position"] = float(bool(holds) and all(holds))
        parts.append(part)
    included = {entry.label for entry in record.include}
    for unwanted in record.exclude:
        if unwanted.label not in included:
            absent = float(len(found.get(unwanted.label, [])) < unwanted.count)
            parts.append({"class": unwanted.label, "absent": absent})
    return parts


def summary(values: np.ndarray, tags: Sequence[str]) -> dict[str, float | None]:
    """The official summary of verdicts (P, n) on prompts of these tags (P,): each tag's mean over its images, and
    `overall`, the unweighted mean of the six; None where a tag has no prompt."""
    of = np.asarray(tags)
    means = {tag: float(values[of == tag].mean()) if (of == tag).any() else None for tag in TAGS}
    there = [mean for mean in means.values() if mean is not None]
    return means | {"overall": float(np.mean(there)) if len(there) == len(TAGS) else None}
