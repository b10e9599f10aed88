"""The official GenEval evaluator's rules, transcribed in its own manner: arrays of (left, top, right, bottom, score) a
class in float32, colors asked for when they are needed, reasons as sentences. And random images for it."""

import json
import random
from collections.abc import Callable
from typing import Any

import numpy as np

RELATIONS = ("left of", "right of", "above", "below")
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
CLASSES = ("cat", "dog", "traffic light")

Box = np.ndarray  # (5,)


def details_of(boxes: dict[str, np.ndarray], tag: str) -> dict[str, list[tuple[int, Box]]]:
    """What the evaluator keeps: row and box, best first. It leaves the order of equal scores to numpy's argsort, read
    backwards; here the earlier row is first, as when it is handed the rows backwards."""
    least = 0.9 if tag == "counting" else 0.3
    kept = {}
    for name, rows in boxes.items():
        order = (len(rows) - 1 - np.argsort(rows[::-1, 4], kind="stable"))[::-1]
        order = order[rows[order, 4] > least][:16]
        if len(order):
            kept[name] = [(int(i), rows[i]) for i in order]
    return kept


def where(a: Box, b: Box) -> set[str]:
    corners = np.array([a, b])[:, :4].reshape(2, 2, 2)
    middle_a, middle_b = corners.mean(axis=1)
    extent_a, extent_b = np.abs(np.diff(corners, axis=1))[:, 0]
    gap = middle_a - middle_b
    rest = np.sign(gap) * np.maximum(np.abs(gap) - 0.1 * (extent_a + extent_b), 0)
    if np.all(np.abs(rest) < 1e-3):
        return set()
    across, down = rest / np.linalg.norm(gap)
    said = set()
    if across < -0.5:
        said.add("left of")
    if across > 0.5:
        said.add("right of")
    if down < -0.5:
        said.add("above")
    if down > 0.5:
        said.add("below")
    return said


def judge(
    kept: dict[str, list[tuple[int, Box]]], metadata: dict[str, Any], color_of: Callable[[str, int], str]
) -> tuple[bool, list[str]]:
    """(correct, reasons)."""
    correct, reasons, groups = True, [], []
    for asked in metadata.get("include", []):
        name, count, matched = asked["class"], asked["count"], True
        there = kept.get(name, [])[:count]
        if len(there) < count:
            correct = matched = False
            reasons.append(f"expected {name}>={count}, found {len(there)}")
        else:
            if "color" in asked:
                colors = [color_of(name, row) for row, _ in there]
                if colors.count(asked["color"]) < count:
                    correct = matched = False
                    listed = ", ".join(f"{colors.count(c)} {c}" for c in COLORS if c in colors)
                    reasons.append(
                        f"expected {asked['color']} {name}>={count}, found {colors.count(asked['color'])} "
                        f"{asked['color']}; and {listed}"
                    )
            if "position" in asked and matched:
                relation, target = asked["position"]
                if groups[target] is None:
                    correct = matched = False
                    reasons.append(f"no target for {name} to be {relation}")
                else:
                    for one, other in ((a, b) for _, a in there for _, b in groups[target]):
                        seen = where(one, other)
                        if relation not in seen:
                            correct = matched = False
                            reasons.append(f"expected {name} {relation} target, found {' and '.join(seen)} target")
                            break
        groups.append(there if matched else None)
    for asked in metadata.get("exclude", []):
        if len(kept.get(asked["class"], [])) >= asked["count"]:
            correct = False
            reasons.append(f"expected {asked['class']}<{asked['count']}, found {len(kept[asked['class']])}")
    return correct, reasons


def random_case(rng: random.Random) -> tuple[dict[str, Any], dict[str, np.ndarray], dict[tuple[str, int], str]]:
    """(metadata, boxes by class, color of each box): few distinct values, so that scores, centers, edges and
    thresholds are often equal; sometimes more objects than the evaluator keeps."""
    names = rng.sample(CLASSES, 2)
    metadata: dict[str, Any] = {"tag": rng.choice(TAGS), "include": []}
    for i, name in enumerate(names[: rng.randint(1, 2)]):
        asked: dict[str, Any] = {"class": name, "count": rng.choice([1, 1, 1, 2, 3])}
        if rng.random() < 0.4:
            asked["color"] = rng.choice(COLORS[:2])
        if i and rng.random() < 0.7:
            asked["position"] = [rng.choice(RELATIONS), 0]
        metadata["include"].append(asked)
    if rng.random() < 0.4:
        metadata["exclude"] = [{"class": rng.choice(names), "count": rng.choice([1, 2, 3, 4, 17])}]
    boxes, colors = {}, {}
    for name in names:
        rows = []
        for row in range(rng.choice([0, 1, 1, 1, 2, 2, 3, 20])):
            x, y = (5 * rng.randint(0, 6) for _ in range(2))
            score = rng.choice([0.2, 0.3, 0.31, 0.9, 0.91, 0.95, 0.95, 0.99])
            rows.append((x, y, x + rng.choice([1, 5, 10, 15]), y + rng.choice([1, 5, 10, 15]), score))
            colors[name, row] = rng.choices(COLORS[:3], (6, 2, 1))[0]
        boxes[name] = np.array(rows, np.float32).reshape(-1, 5)
    metadata["prompt"] = f"a picture for {json.dumps(metadata)}"
    return metadata, boxes, colors


def result_line(filename: str, metadata: dict[str, Any], boxes: dict, colors: dict) -> dict[str, Any]:
    """The row that the evaluator writes of an image."""
    kept = details_of(boxes, metadata["tag"])
    correct, reasons = judge(kept, metadata, lambda name, row: colors[name, row])
    return {
        "filename": filename,
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": correct,
        "reason": "\n".join(reasons),
        "metadata": json.dumps(metadata),
        "details": json.dumps({name: [box.tolist() for _, box in rows] for name, rows in kept.items()}),
    }
