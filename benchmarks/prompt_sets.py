"""The prompt sets that gdro ships: 1,000 for training, 200 for validation, 200 for testing, of OCR and of GenEval.

    python benchmarks/prompt_sets.py            (writes src/gdro/recipes/prompts; the same bytes at every call)

OCR: a scene with a text of one to six words in double quotes; no text is asked for twice in all three sets. GenEval:
the six tags in turn, objects of COCO's 80 classes, in the official evaluator's records; what is combined in a set (a
class and its number or color, a pair of classes) is combined in no other. No prompt has the official ones' words, and
none combines what an official one combines; single objects excepted, of which the official set has all there are.

What is chosen follows from SHA-256 of the choice: no library's generator can change it.
"""

import argparse
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import combinations, cycle, islice, product
from pathlib import Path
from typing import Any, TypeVar

from gdro.common.yaml import read_yaml

SEED = 0
SIZES = {"test": 200, "validation": 200, "train": 1000}
WORDS = read_yaml(Path(__file__).with_suffix(".yaml"))
FOLDER = Path(__file__).parent.parent / "src" / "gdro" / "recipes" / "prompts"

T = TypeVar("T")


def ranked(items: Iterable[T], purpose: str) -> list[T]:
    """The items in an order that is random, but always the same."""
    return sorted(items, key=lambda item: hashlib.sha256(f"{SEED}/{purpose}/{item}".encode()).digest())


def chosen(items: Sequence[T], *purpose: object) -> T:
    return ranked(items, "/".join(map(str, purpose)))[0]


# ---- OCR


def ocr_sets() -> dict[str, list[str]]:
    """The lines of each split: every kind of text as often, each text once, in random order."""
    texts = {
        kind: iter(ranked({" ".join(filter(None, parts)) for form in forms for parts in product(*form)}, "texts"))
        for kind, forms in WORDS["texts"].items()
    }
    moods = ["", *(f", {mood}" for mood in WORDS["moods"])]
    prompts = []
    for kind in islice(cycle(texts), sum(SIZES.values())):
        text = next(texts[kind])
        scene = chosen(WORDS["scenes"][kind], "scene", text).format(f'"{text}"')
        prompts.append(scene + chosen(moods, "mood", text) * chosen([True, False], "has mood", text))
    lines = iter(ranked(prompts, "prompts"))
    return {split: list(islice(lines, size)) for split, size in SIZES.items()}


# ---- GenEval

CLASSES: list[str] = WORDS["classes"]
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
OPPOSITES = {"left of": "right of", "above": "below"}
COUNTS = {2: "two", 3: "three", 4: "four"}
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
# One of a class and several, where it is not `a class` and `classes`.
SINGULAR = {"skis": "pair of skis", "scissors": "pair of scissors", "broccoli": "piece of broccoli"}
PLURAL = {
    "person": "people",
    "sheep": "sheep",
    "knife": "knives",
    "computer mouse": "computer mice",
    "scissors": "pairs of scissors",
    "broccoli": "pieces of broccoli",
}
UNCOUNTED = "skis"  # is a pair one, or two?
FORMS = [
    f"{medium} {{}}{setting}"
    for medium in ("a photograph of", "a picture of", "an image of", "a snapshot of", "a realistic picture of")
    for setting in ("", " in daylight", " outdoors", " on a plain background", " in soft light", " on a cloudy day")
]
HELD_OUT = 0.15  # of a tag's combinations, for each of validation and test, where there are few

OFFICIAL = set(WORDS["official"].split())  # what the official prompts combine, as `digest` has it

Combination = tuple[str, ...]


def with_article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def one(name: str, color: str = "") -> str:
    noun = SINGULAR.get(name, name)
    return with_article(f"{color} {noun}" if color else noun)


def several(name: str, count: int) -> str:
    ending = "es" if name.endswith(("s", "sh", "ch")) else "s"
    return f"{COUNTS[count]} {PLURAL.get(name, name + ending)}"


def combinations_of(tag: str) -> list[Combination]:
    """What prompts of a tag combine, in random order. No two classes are a pair in more than one tag."""
    colored = [name for name in CLASSES if name != "person"]
    pairs = ranked((tuple(ranked(pair, "sides")) for pair in combinations(CLASSES, 2)), "pairs")
    found: Iterable[Combination]
    if tag == "single_object":
        found = ((name,) for name in CLASSES)
    elif tag == "counting":
        found = ((name, str(count)) for name in CLASSES if name != UNCOUNTED for count in COUNTS)
    elif tag == "colors":
        found = ((name, color) for name in colored for color in COLORS if color != name)
    elif tag == "two_object":
        found = pairs[::3]
    elif tag == "position":
        found = ((a, chosen([*OPPOSITES, *OPPOSITES.values()], "relation", a, b), b) for a, b in pairs[1::3])
    else:
        both = [pair for pair in pairs[2::3] if "person" not in pair]
        colors = [[c for c in ranked(COLORS, f"colors/{a}/{b}") if c not in (a, b)] for a, b in both]
        found = ((a, first, b, second) for (a, b), (first, second, *_) in zip(both, colors, strict=True))
    return ranked((c for c in found if digest(tag, c) not in OFFICIAL), tag)


def digest(tag: str, combination: Combination) -> str:
    """Of a combination, whichever way round it is said."""
    if tag == "two_object":
        combination = tuple(sorted(combination))
    elif tag == "position":
        a, relation, b = combination
        there = {other: same for same, other in OPPOSITES.items()}
        combination = (b, there[relation], a) if relation in there else combination
    elif tag == "color_attr":
        a, first, b, second = combination
        combination = tuple(sorted((f"{first} {a}", f"{second} {b}")))
    return hashlib.sha256("/".join((tag, *combination)).encode()).hexdigest()[:6]


def record(tag: str, combination: Combination) -> tuple[str, dict[str, Any]]:
    """What the prompt says after `a picture of`, and the evaluator's record of it."""
    name = combination[0]
    entry: dict[str, Any] = {"class": name, "count": 1}
    if tag == "single_object":
        return one(name), {"tag": tag, "include": [entry]}
    if tag == "counting":
        count = int(combination[1])
        unwanted = [{"class": name, "count": count + 1}]
        return several(name, count), {"tag": tag, "include": [entry | {"count": count}], "exclude": unwanted}
    if tag == "colors":
        return one(name, combination[1]), {"tag": tag, "include": [entry | {"color": combination[1]}]}
    if tag == "two_object":
        other = combination[1]
        return f"{one(name)} and {one(other)}", {"tag": tag, "include": [entry, {"class": other, "count": 1}]}
    if tag == "position":
        _, relation, other = combination
        include = [{"class": other, "count": 1}, entry | {"position": [relation, 0]}]
        return f"{one(name)} {relation} {one(other)}", {"tag": tag, "include": include}
    _, color, other, second = combination
    include = [entry | {"color": color}, {"class": other, "count": 1, "color": second}]
    return f"{one(name, color)} and {one(other, second)}", {"tag": tag, "include": include}


def prompts_of(tag: str, combined: Sequence[Combination]) -> Iterator[dict[str, Any]]:
    """Prompts of these combinations: each in another form when its turn comes again."""
    for turn in range(len(FORMS)):
        for combination in combined:
            what, asked = record(tag, combination)
            yield {"prompt": ranked(FORMS, f"form/{tag}/{combination}")[turn].format(what), **asked}


def geneval_sets() -> dict[str, list[str]]:
    sources: dict[str, dict[str, Iterator[dict[str, Any]]]] = {split: {} for split in SIZES}
    for tag in TAGS:
        left = combinations_of(tag)
        share = round(HELD_OUT * len(left))
        for split, size in SIZES.items():
            taken = len(left) if split == "train" else min(share, -(-size // len(TAGS)))
            sources[split][tag], left = prompts_of(tag, left[:taken]), left[taken:]
    return {
        split: [
            json.dumps({"id": f"{split}-{number:04d}", **next(sources[split][tag])})
            for number, tag in enumerate(islice(cycle(TAGS), size))
        ]
        for split, size in SIZES.items()
    }


def write(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, sets in (("ocr_{}.txt", ocr_sets()), ("geneval_{}.jsonl", geneval_sets())):
        for split, lines in sets.items():
            (folder / name.format(split)).write_bytes("".join(f"{line}\n" for line in lines).encode())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=FOLDER, help="the folder to write to (the package's)")
    write(parser.parse_args().out)
