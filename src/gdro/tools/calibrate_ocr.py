"""`gdro calibrate ocr`: what the OCR engines read in the same images, how fast, and where they disagree.

Every engine reads every image in turn, on one thread, after one image that is not timed.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from gdro.common.errors import UserError, did_you_mean
from gdro.common.files import write_json
from gdro.common.images import open_image, path_inside
from gdro.common.progress import Progress
from gdro.common.prompts import Prompt
from gdro.common.reading import parse_json, read_lines
from gdro.rewards.base import ImageFailure
from gdro.rewards.ocr.engines import INSTALL, NAMES, identity, prepare, read
from gdro.rewards.ocr.reward import OcrReward, edit_distance, ocr_score, quoted_text, target_of

Reader = Callable[[int, Image.Image], dict[str, Any]]
"""(index, image) -> evidence with its `text`."""
SHOWN = 5  # disagreements shown in full per pair of engines


@dataclass(frozen=True)
class Pictures:
    """Images to read, with their names and the texts they should show; `load(i)` opens the i-th."""

    names: list[str]
    targets: list[str]
    load: Callable[[int], Image.Image]

    def thinned(self, limit: int | None) -> "Pictures":
        """At most `limit` of them, evenly spread."""
        total = len(self.names)
        if limit is None or limit >= total:
            return self
        places = [i * total // limit for i in range(limit)]
        return Pictures(
            [self.names[i] for i in places], [self.targets[i] for i in places], lambda i: self.load(places[i])
        )


def calibrate_ocr(
    images: Path, out: Path, *, engines: Sequence[str] = (), lang: str | None = None, limit: int | None = None
) -> str:
    """Compare `engines` on `images`; returns a Markdown table, and writes everything to the JSON file `out`.

    `images` is a folder with metadata.jsonl (`pictures_of_folder`), a store of groups or a run directory. Without
    `engines`, all are compared and missing ones listed. `lang` is PaddleOCR's. Raises UserError for bad input, and for
    a requested engine that is not available.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit is {limit}; expected at least 1")
    if out.suffix != ".json":
        raise UserError(f"--out is {out}; expected a name that ends in .json")
    for name in engines:
        if name not in NAMES:
            raise UserError(f'--engine is "{name}", which is not an engine{did_you_mean(name, NAMES)}')
    pictures = pictures_of(images).thinned(limit)

    readers: dict[str, Reader] = {}
    versions, absent = {}, {}
    for name in NAMES:
        if engines and name not in engines:
            continue
        tongue = lang if name == "paddleocr" else None
        try:
            identity(name, tongue)
        except UserError:
            if engines:
                raise
            absent[name] = f"not installed; {INSTALL[name]}"
            continue
        prepare(name, tongue)
        readers[name] = lambda i, image, name=name, tongue=tongue: read(i, image, name, tongue)  # type: ignore[misc]
        versions[name] = OcrReward(engine=name, lang=tongue).version
    found = {"images": str(images), "count": len(pictures.names), **compare(pictures, readers), "absent": absent}
    for name, version in versions.items():
        found["engines"][name]["version"] = version
    write_json(out, found)
    return table(found)


def pictures_of(source: Path) -> Pictures:
    """The images of a folder with metadata.jsonl, a store of groups, or a run directory."""
    for folder in (source, source / "groups"):
        if any(folder.glob("groups-*.parquet")):
            return pictures_of_store(folder)
    if not os.path.exists(source / "metadata.jsonl"):
        raise UserError(f"{source} has no images to read; expected metadata.jsonl, a store of groups or a run in it")
    return pictures_of_folder(source)


def pictures_of_folder(folder: Path) -> Pictures:
    """The images of a folder with `metadata.jsonl`, one row per image: `file_name`, and `text`, what it should show.

    A text with a part in double quotes is a prompt with that part as its target. A row may have `prompt` instead, with
    such a part or with a `target` beside it. Raises UserError naming the line.
    """
    path = folder / "metadata.jsonl"
    names, targets = [], []
    for number, line in read_lines(path, "one JSON object per image: file_name, text"):
        name, target = _row(line, f"{path}:{number}", folder)
        names.append(name)
        targets.append(target)
    if not names:
        raise UserError(f"{path} has no rows; expected one JSON object per image: file_name, text")

    def load(i: int) -> Image.Image:
        return open_image(folder / names[i], str(folder / names[i]))

    return Pictures(names, targets, load)


def _row(line: str, where: str, folder: Path) -> tuple[str, str]:
    row = parse_json(line, where, "a JSON object")
    if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
        raise UserError(f'{where} has no text in "file_name"; expected an object with file_name and text')
    key = "text" if "text" in row else "prompt"
    text = row.get(key)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where} has {text!r} in "{key}"; expected "text", what the image should show, or "prompt"')
    path = path_inside(folder, row["file_name"])
    if path is None:
        raise UserError(f'{where} has "file_name" {row["file_name"]!r}; expected an image inside the folder')
    open_image(path, f"{where}: {path}")
    try:
        if key == "text" and quoted_text(text) is None:
            return row["file_name"], text
        return row["file_name"], target_of(Prompt("", text, row))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def pictures_of_store(folder: Path) -> Pictures:
    """The images of a store of groups, with their prompts' targets."""
    from gdro.groups.store import GroupStore

    store = GroupStore(folder)
    names, targets, places = [], [], []
    for group in store.group_ids:
        try:
            target = target_of(store.prompt(group))
        except UserError as error:
            raise UserError(f'{folder}: group "{group}": {error}') from None
        for i, name in enumerate(store.image_ids(group)):
            names.append(name)
            targets.append(target)
            places.append((group, i))
    last: dict[str, list[Image.Image]] = {}  # one group's images, because neighbors are read in turn

    def load(i: int) -> Image.Image:
        group, place = places[i]
        if group not in last:
            last.clear()
            last[group] = store.images(group)
        return last[group][place]

    return Pictures(names, targets, load)


def compare(pictures: Pictures, readers: Mapping[str, Reader]) -> dict[str, Any]:
    """`engines` (results of each), `agreement` (of each pair) and `readings` (each image's texts and rewards)."""
    texts: dict[str, list[str]] = {name: [] for name in readers}
    seconds = dict.fromkeys(readers, 0.0)
    with Progress("calibrate ocr", len(pictures.names), "img") as progress:
        for i, name in enumerate(pictures.names):
            image = pictures.load(i)
            for engine, seen in readers.items():
                try:
                    if i == 0:
                        seen(i, image)  # warms up
                    start = time.perf_counter()
                    texts[engine].append(seen(i, image)["text"])
                    seconds[engine] += time.perf_counter() - start
                except ImageFailure as failure:
                    raise UserError(f'image "{name}": {failure.reason}') from failure
            progress.advance()
    targets = pictures.targets
    rewards = {e: np.array([ocr_score(t, g) for t, g in zip(texts[e], targets, strict=True)]) for e in readers}
    edits = {e: np.array([edit_distance(t, g) for t, g in zip(texts[e], targets, strict=True)]) for e in readers}
    engines = {
        engine: {
            "mean_reward": float(rewards[engine].mean()),
            "exact_match": float((edits[engine] == 0).mean()),
            "mean_edit_distance": float(edits[engine].mean()),
            "images_per_second": len(targets) / seconds[engine],
        }
        for engine in readers
    }
    readings = [
        {"image": name, "target": target} | {e: {"text": texts[e][i], "reward": float(rewards[e][i])} for e in readers}
        for i, (name, target) in enumerate(zip(pictures.names, targets, strict=True))
    ]
    pairs = [{"engines": [a, b], **agreement(rewards[a], rewards[b])} for a, b in combinations(readers, 2)]
    for pair in pairs:
        pair["worst"] = [readings[i] for i in pair.pop("worst")]
    return {"engines": engines, "agreement": pairs, "readings": readings}


def agreement(a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Agreement of two engines' rewards (n,) on the same images.

    `correlation` is Pearson's, None if either is constant; `equal_verdicts` is the share of images to which both or
    neither give reward 1; `worst` lists the indices of the largest differences, at most SHOWN.
    """
    gaps = np.abs(a - b)
    worst = [int(i) for i in np.argsort(-gaps, kind="stable")[:SHOWN] if gaps[i] > 0]
    correlation = float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else None
    return {"correlation": correlation, "equal_verdicts": float(((a == 1) == (b == 1)).mean()), "worst": worst}


def table(found: Mapping[str, Any]) -> str:
    """The results as Markdown: engines, agreement of each pair, worst disagreements."""
    lines = [f"{found['count']} images of {found['images']}; one thread per engine", ""]
    lines += _markdown(
        ["engine", "mean reward", "exact match", "mean edit distance", "images/s"],
        [
            [
                engine,
                f"{one['mean_reward']:.3f}",
                f"{100 * one['exact_match']:.1f} %",
                f"{one['mean_edit_distance']:.2f}",
                f"{one['images_per_second']:.1f}",
            ]
            for engine, one in found["engines"].items()
        ]
        + [[engine, why, "–", "–", "–"] for engine, why in found["absent"].items()],
    )
    for pair in found["agreement"]:
        a, b = pair["engines"]
        correlation = "none, one is constant" if pair["correlation"] is None else f"{pair['correlation']:.3f}"
        equal = f"{100 * pair['equal_verdicts']:.1f} %"
        lines += ["", f"{a} and {b}: correlation of rewards {correlation}; equal verdicts (right or not) {equal}"]
        if pair["worst"]:
            cells = [
                [one["image"], one["target"], *(f"{one[e]['text']} ({one[e]['reward']:.2f})" for e in (a, b))]
                for one in pair["worst"]
            ]
            lines += ["", *_markdown(["worst disagreements", "target", a, b], cells)]
    return "\n".join(lines)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    for row in (head, ["---"] * len(head), *rows):
        yield "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in row) + " |"
