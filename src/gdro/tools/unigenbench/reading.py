"""Reads a published file of UniGenBench: prompts with their test points."""

import csv
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from gdro.common.errors import UserError, did_you_mean
from gdro.common.prompts import Prompt
from gdro.common.reading import parse_json, read_text
from gdro.tools.unigenbench.criteria import ENGLISH

READINGS = 5  # attempts per row; a comma is inserted after each but the last
KEYS = {"en": ("Testpoints", "Testpoint Description"), "zh": ("考点", "考点对应描述")}
"""Language -> the two lists in the JSON of `sub_dims_*`."""


@dataclass(frozen=True)
class PromptFile:
    """A file's language ("en" or "zh"), its prompts, and a description of repairs."""

    language: str
    prompts: list[Prompt]
    repairs: list[str]


def read_prompt_file(path: Path, *, repair: bool = False) -> PromptFile:
    """A CSV file with `index`, `prompt_en`, `sub_dims_en` (or `_zh`).

    A prompt's id is its index; its fields are `points` (names as in the file) and `descriptions`, one per point. Raises
    UserError naming file, line and column. If only a comma is missing (as in a published file), the error says where,
    and `repair` inserts it.
    """
    text = read_text(path, "a .csv file of UniGenBench, such as data/test_prompts_en.csv")
    rows = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        language = _language(path, rows.fieldnames or [])
        prompts: dict[str, Prompt] = {}
        repairs: list[str] = []
        for row in rows:
            where = f"{path}: row {len(prompts) + 1} (ending at line {rows.line_num})"
            commas = _missing_commas(row, language)
            if commas and not repair:
                raise UserError(
                    f"{where}, {'; '.join(commas)}; insert it in the file, or pass --repair to have it inserted"
                )
            repairs += commas
            prompt = _prompt(where, row, language)
            if prompt.id in prompts:
                raise UserError(f"{where}, column index: {prompt.id} is there twice; expected each index once")
            prompts[prompt.id] = prompt
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num} is not CSV ({error})") from None
    if not prompts:
        raise UserError(f"{path} holds no rows; expected at least one prompt")
    return PromptFile(language, list(prompts.values()), repairs)


def _language(path: Path, columns: Any) -> str:
    found = [language for language in KEYS if {f"prompt_{language}", f"sub_dims_{language}"} <= set(columns)]
    if len(found) != 1 or "index" not in columns:
        raise UserError(
            f"{path} has the columns {', '.join(columns) or '(none)'}; expected index, prompt_en, sub_dims_en, or "
            "index, prompt_zh, sub_dims_zh"
        )
    return found[0]


def _missing_commas(row: dict[Any, Any], language: str) -> list[str]:
    """Insert missing commas into `row` and say where; empty if more than that is wrong with it."""
    text, dims = f"prompt_{language}", f"sub_dims_{language}"
    cells, found = {dims: row[dims] or ""}, []
    if row[dims] is None and (row[text] or "").count('"{"') == 1:  # the two cells in one, their quotes doubled
        before, _, after = row[text].partition('"{"')
        cells = {text: before, dims: f'{{"{after}'}
        found.append(f"before {cells[dims][:30]}...")
    for _ in range(READINGS):
        try:
            about = json.loads(cells[dims])
            break
        except json.JSONDecodeError as error:
            if not error.msg.startswith("Expecting ',' delimiter"):
                return []
            head, tail = cells[dims][: error.pos], cells[dims][error.pos :]
            cells[dims] = f"{head},{tail}"
            found.append(f"before {tail[:30]}...")
        except (ValueError, RecursionError):
            return []
    else:
        return []
    lists: list[Any] = [about.get(key) for key in KEYS[language]] if isinstance(about, dict) else [None]
    # a quotation mark within a string can look like a missing comma, but then splits one string into two
    if not found or not all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        return []
    row.update(cells)
    return [f"index {row['index']}, column {dims}: a comma is missing {place}" for place in found]


def _prompt(where: str, row: dict[Any, Any], language: str) -> Prompt:
    if None in row or None in row.values():
        raise UserError(
            f"{where} has {'more' if None in row else 'fewer'} cells than the header; expected one per column"
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
    # at least as many: the published code takes the n-th description for the n-th point and ignores any more
    if len(descriptions) < len(points):
        refuse(f"{len(descriptions)} of {texts} for {len(points)} of {names}", "one per test point")
    return points, descriptions[: len(points)]
