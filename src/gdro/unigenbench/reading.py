"""A published file of UniGenBench -> prompts with their test points."""

import csv
import io
import json
from pathlib import Path
from typing import Any, NoReturn

from gdro.errors import UserError, did_you_mean
from gdro.prompts import Prompt
from gdro.reading import parse_json, read_text
from gdro.unigenbench.criteria import ENGLISH

KEYS = {"en": ("Testpoints", "Testpoint Description"), "zh": ("考点", "考点对应描述")}
"""Language -> the two lists of the JSON in `sub_dims_*`."""


def read_benchmark(path: Path) -> tuple[str, list[Prompt]]:
    """Language ("en" or "zh") and prompts of a CSV file with `index`, `prompt_en`, `sub_dims_en` (or `_zh`).

    A prompt's id is its index; its fields are `points` (names as in the file) and `descriptions`, one a point. Raises
    UserError naming file, line and column.
    """
    text = read_text(path, "a .csv file of UniGenBench, such as data/test_prompts_en.csv")
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        language = _language(path, rows.fieldnames or [])
        prompts: dict[str, Prompt] = {}
        for row in rows:
            where = f"{path}: row {len(prompts) + 1} (ending at line {rows.line_num})"
            prompt = _prompt(where, row, language)
            if prompt.id in prompts:
                raise UserError(f"{where}, column index: {prompt.id} is there twice; expected each index once")
            prompts[prompt.id] = prompt
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num} is not CSV ({error})") from None
    if not prompts:
        raise UserError(f"{path} holds no row; expected at least one prompt")
    return language, list(prompts.values())


def _language(path: Path, columns: Any) -> str:
    found = [language for language in KEYS if {f"prompt_{language}", f"sub_dims_{language}"} <= set(columns)]
    if len(found) != 1 or "index" not in columns:
        raise UserError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; expected index, prompt_en, sub_dims_en, or "
            "index, prompt_zh, sub_dims_zh"
        )
    return found[0]


def _prompt(where: str, row: dict[Any, Any], language: str) -> Prompt:
    if None in row or None in row.values():
        raise UserError(
            f"{where} has {'more' if None in row else 'fewer'} cells than the header; expected one a column"
        )
    index, text, about = row["index"].strip(), row[f"prompt_{language}"].strip(), row[f"sub_dims_{language}"]
    if not (index.isascii() and index.isdecimal()):
        raise UserError(f"{where}, column index: {index!r}; expected a whole number")
    if not text:
        raise UserError(f"{where}, column prompt_{language}: empty; expected a prompt")
    points, descriptions = _points(f"{where}, column sub_dims_{language}", about, language)
    return Prompt(str(int(index)), text, {"points": points, "descriptions": descriptions})


def _points(where: str, about: str, language: str) -> tuple[list[str], list[str]]:
    def refuse(found: str, expected: str) -> NoReturn:
        raise UserError(f"{where}: {found}; expected {expected}")

    value = parse_json(about, where, "the JSON object of the published file")
    names, texts = KEYS[language]
    if not isinstance(value, dict):
        refuse("not a JSON object", f"one with {names} and {texts}")
    for key in (names, texts):
        if not isinstance(value.get(key), list) or not all(isinstance(item, str) for item in value[key]):
            refuse(f"{key} is {json.dumps(value.get(key), ensure_ascii=False)}", "a list of strings")
    points, descriptions = value[names], value[texts]
    if not points:
        refuse(f"{names} is empty", "at least one test point")
    for point in points:
        if point not in ENGLISH[language]:
            raise UserError(f"{where}: unknown test point {json.dumps(point, ensure_ascii=False)}"
                            f"{did_you_mean(point, ENGLISH[language])}")  # fmt: skip
    # as many at least: the published code takes the n-th description of the n-th point, and no notice of any further
    if len(descriptions) < len(points):
        refuse(f"{len(descriptions)} of {texts} for {len(points)} of {names}", "one a test point")
    return points, descriptions[: len(points)]
