"""Bounds for numbers, and wording for errors: what was found, what was expected."""

import json
from argparse import ArgumentTypeError
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T", int, float)

MAX_SEED = 2**63 - 1  # the most that a parquet column holds

_WORDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a string",
    "list_type": "a list",
    "dict_type": "a section of fields",
    "none_required": "null",
    "missing": "a value",
    "missing_keyword_only_argument": "a value",
    "model_type": "a section of fields",
    "model_attributes_type": "a section of fields",
}


def expected(problem: Any) -> str:
    """What was expected, according to one of pydantic's errors."""
    if problem["type"] in _WORDS:
        return _WORDS[problem["type"]]
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("a valid ")
    number = "a number " if problem["type"].startswith(("greater_than", "less_than")) else ""
    return number + message.replace("'", '"')


def show(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."


def integer(low: int, high: int) -> Callable[[str], int]:
    """The type of an option that is an integer from `low` to `high`."""
    return _between(int, low, high, "an integer")


def number(low: float, high: float) -> Callable[[str], float]:
    """The type of an option that is a number from `low` to `high`."""
    return _between(float, low, high, "a number")


def _between(kind: type[T], low: T, high: T, what: str) -> Callable[[str], T]:
    def read(text: str) -> T:
        wrong = ArgumentTypeError(f"it is {text[:80]}; expected {what} from {low} to {high}")
        try:
            value = kind(text)
        except ValueError:
            raise wrong from None
        if not low <= value <= high:  # also true for NaN
            raise wrong
        return value

    return read
