"""Words for what pydantic finds wrong: what was found, what was expected."""

import json
from typing import Any

_WORDS = {
    "int_type": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "dict_type": "a section of fields",
    "none_required": "null",
    "missing": "a value",
    "missing_keyword_only_argument": "a value",
    "model_type": "a section of fields",
    "model_attributes_type": "a section of fields",
}


def expected(problem: Any) -> str:
    """What one of pydantic's errors says was expected."""
    if problem["type"] in _WORDS:
        return _WORDS[problem["type"]]
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("a valid ")
    number = "a number " if problem["type"].startswith(("greater_than", "less_than")) else ""
    return number + message.replace("'", '"')


def show(value: Any) -> str:
    """A value as JSON, shortened."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 80 else text[:77] + "..."
