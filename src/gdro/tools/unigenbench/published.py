"""UniGenBench's judge prompt from the user's copy of its script, verbatim and without executing it.

The script is `eval/src/eval_common.py`, for both languages; in older copies `eval/*_eval.py`, one per language. From
its syntax tree, only strings, dicts, names' values, and f-strings of those are read.
"""

import ast
import string
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError
from gdro.common.reading import read_text, reading
from gdro.tools.unigenbench.criteria import MEANINGS, UNDEFINED
from gdro.tools.unigenbench.judging import FIELDS, JudgePrompt

EXPECTED = "UniGenBench's eval/src/eval_common.py, or eval/*_eval.py of an older copy"


def published_prompt(path: Path, language: str) -> JudgePrompt:
    """The judge prompt for files of this language. Raises UserError if the script does not hold it.

    Test points that published files use but some scripts do not define (`UNDEFINED`) get gdro's meaning.
    """
    name = f"--judge-prompt: {path}"
    text = read_text(path, EXPECTED, name)
    with reading(path, EXPECTED, name):
        tree = ast.parse(text)
        configs = _assigned(tree.body, {}).get("LANG_CONFIGS")
        config = configs.get(language) if isinstance(configs, dict) else None
        names = _assigned(ast.walk(tree), {"config": config})
        ends = {
            node.target.id: _value(node.value, {})
            for node in ast.walk(tree)
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name)
            if isinstance(node.value, ast.Constant)
        }
        system = [
            node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) and _name(node) == "system_prompt"
        ]
    template: Any
    meanings: Any
    if isinstance(config, dict):
        template, meanings = config.get("system_prompt_template"), config.get("explanation_dict")
    else:
        pieces = [piece for value in system[-1:] if isinstance(value, ast.JoinedStr) for piece in value.values]
        template, meanings = "".join(map(_piece, pieces)), names.get("explanation_dict")
    brackets: dict[str, Any] = {field: (names.get(field), ends.get(field)) for field in FIELDS[2:]}
    if not _is_template(template) or not _are_texts(meanings) or not all(map(_are_texts, brackets.values())):
        raise UserError(
            f"{name} holds no judge prompt for {language} that gdro can read; expected {EXPECTED}, with a template of "
            f"{', '.join(FIELDS)}, what the test points mean, and what the two lists begin and end with"
        )
    lent = {point: MEANINGS[language][point] for point in UNDEFINED[language] if point not in meanings}
    return JudgePrompt(str(path), template, meanings | lent, brackets, tuple(lent))


def _assigned(nodes: Iterable[ast.AST], known: Mapping[str, Any]) -> dict[str, Any]:
    """Values assigned to plain names, with `known` ones as given; None for values that are not read."""
    found: dict[str, Any] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and (name := _name(node)):
            found[name] = _value(node.value, {**found, **known})
    return found


def _name(node: ast.Assign) -> str | None:
    target = node.targets[0]
    return target.id if len(node.targets) == 1 and isinstance(target, ast.Name) else None


def _value(node: ast.AST | None, names: Mapping[str, Any]) -> Any:
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.Name(id=name):
            return names.get(name)
        case ast.Dict(keys=keys, values=values):
            return {_value(key, {}): _value(value, names) for key, value in zip(keys, values, strict=True)}
        case ast.Subscript(value=ast.Name(id=name), slice=ast.Constant(value=str(key))):
            table = names.get(name)
            return table.get(key) if isinstance(table, dict) else None
        case ast.JoinedStr(values=pieces):
            texts = [_value(p.value if isinstance(p, ast.FormattedValue) else p, names) for p in pieces]
            return "".join(texts) if _are_texts(texts) else None
    return None


def _piece(node: ast.expr) -> str:
    """A piece of an f-string as a piece of a template; only FIELDS stay placeholders, so there are no others."""
    if isinstance(node, ast.FormattedValue) and isinstance(node.value, ast.Name) and node.value.id in FIELDS:
        return f"{{{node.value.id}}}"
    return (_value(node, {}) or "").replace("{", "{{").replace("}", "}}")


def _is_template(value: Any) -> bool:
    """Whether `value` has all FIELDS as `str.format` placeholders and no others, which could reach into objects."""
    try:
        places = [place[1:] for place in string.Formatter().parse(value) if place[1] is not None]
    except (TypeError, ValueError):
        return False
    return {name for name, _, _ in places} == set(FIELDS) and all(not form and not kind for _, form, kind in places)


def _are_texts(value: Any) -> bool:
    """Whether `value` is a sequence or dict of strings, none of them empty."""
    texts = [*value, *value.values()] if isinstance(value, dict) else value
    return bool(texts) and all(isinstance(text, str) and text for text in texts)
