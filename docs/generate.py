"""Write docs/configuration.md and docs/api.md from the descriptions in the code.

    python docs/generate.py

`tests/test_docs.py` holds both files to what this writes.
"""

import importlib
import inspect
import json
import re
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

import gdro
from gdro.objectives.registry import OBJECTIVES, hyperparameter_model
from gdro.rewards.registry import COMPARATORS, JUDGES, REWARDS
from gdro.runner.config import MAY_CHANGE, RunConfig

DOCS = Path(__file__).parent
GENERATED = "<!-- written by docs/generate.py: change the descriptions in the code, then run it -->"


def configuration() -> str:
    """configuration.md: every field by section, the objectives' own, the rewards' options."""
    top = {name: field for name, field in RunConfig.model_fields.items() if not _is_section(field.annotation)}
    parts = [
        "# Configuration",
        GENERATED,
        "`gdro run my.yaml` takes a YAML file with these fields, strictly: an unknown field, a wrong type or a value "
        "out of range is refused in one line. On the command line a field is given by its dotted name, `--train.k 4`. "
        "Complete files are in [`configs/`](../configs); which values to choose is in [choosing.md](choosing.md).",
        "A field marked ↻ may change when a run is resumed; every other one is fixed once its stage has begun. The "
        "resolved configuration is `config.yaml` in the run directory.",
        "## Top level",
        _table("", top),
    ]
    for name, field in RunConfig.model_fields.items():
        if _is_section(field.annotation):
            parts += [f"## `{name}`", _table(f"{name}.", field.annotation.model_fields)]
            if name == "train":
                parts += list(_objectives())
    parts += ["## Rewards, judges, comparators", *_rewards()]
    return "\n\n".join(parts) + "\n"


def api() -> str:
    """api.md: the public names of the package, with signature and docstring."""
    parts = ["# Python API", GENERATED, _doc(gdro)]
    for name in sorted(getattr(gdro, "__all__", []), key=str.lower):
        parts += list(_described(name, getattr(gdro, name)))
    return "\n\n".join(parts) + "\n"


def _objectives() -> Iterator[str]:
    yield "### Objectives and their hyperparameters"
    yield (
        "`train.objective` is a name, `module:Class` of your own ([extending.md](extending.md)), or a section "
        "`{name: gdro, beta: 12}`. Hyperparameters may also stand beside it, as `train.beta`. One that is left out or "
        "null takes the default below; one that the objective lacks is refused."
    )
    about: dict[str, tuple[FieldInfo, list[str]]] = {}
    rows = []
    for name, kind in OBJECTIVES.items():
        fields = hyperparameter_model(kind).model_fields
        for field_name, field in fields.items():
            about.setdefault(field_name, (field, []))[1].append(name)
        shown = ", ".join(f"`{field_name}` {_value(field.default)}" for field_name, field in fields.items())
        rows.append((f"`{name}`", "trajectories" if "trajectories" in kind.needs else "images", shown or "none"))
    yield _rows(("objective", "learns from", "hyperparameters and their defaults"), rows)
    rows = [(f"`train.{n}`", _type(f), f.description or "") for n, (f, _) in sorted(about.items())]
    yield _rows(("hyperparameter", "type and range", "description"), rows)


def _rewards() -> Iterator[str]:
    yield (
        "A reward is named in `score.reward` (and `evaluate.reward`), a judge in `evaluate.judge`: a name, "
        "`{name: ..., options}`, or `module:function`. A list of rewards, each with `weight`, is their sum "
        "([rewards.md](rewards.md)). `gdro rewards` prints this list."
    )
    rows = []
    for kind, entries in (("reward", REWARDS), ("judge", JUDGES), ("comparator", COMPARATORS)):
        for name, entry in entries.items():
            module, _, function = entry.factory.partition(":")
            options = inspect.signature(getattr(importlib.import_module(module), function)).parameters.values()
            shown = [f"`{p.name}`" if p.default is p.empty else f"`{p.name}` {_value(p.default)}" for p in options]
            needs = [entry.hardware, *(f"field `{field}`" for field in entry.fields)]
            needs += [f"`gdro[{entry.extra}]`"] if entry.extra else []
            rows.append((f"`{name}`", kind, entry.about, ", ".join(needs), ", ".join(shown) or "none"))
    yield _rows(("name", "kind", "what it measures", "needs", "options and defaults (none: required)"), rows)


def _table(prefix: str, fields: Mapping[str, FieldInfo]) -> str:
    rows = []
    for name, field in fields.items():
        mark = " ↻" if prefix + name in MAY_CHANGE else ""
        default = "required" if field.is_required() else _value(field.default)
        rows.append((f"`{prefix}{name}`{mark}", _type(field), default, field.description or ""))
    return _rows(("field", "type and range", "default", "description"), rows)


def _rows(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, tuple("---" for _ in head), *rows]
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _type(field: FieldInfo) -> str:
    bounds = {}
    for item in field.metadata:
        for sign, words in (("ge", "from "), ("gt", "above "), ("le", "to "), ("lt", "below ")):
            if getattr(item, sign, None) is not None:
                bounds[sign] = f"{words}{_value(getattr(item, sign), code=False)}"
    limits = " ".join(bounds.values())
    return _kind(field.annotation) + (f", {limits}" if limits else "")


def _kind(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kind(arguments[0])
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(_kind(argument) for argument in arguments))
    if origin is list:
        return f"list of {_kind(arguments[0])}"
    names = {
        int: "integer",
        float: "number",
        str: "text",
        bool: "true or false",
        type(None): "null",
        Any: "text or section",
    }
    return "section" if origin is dict or kind is dict else names.get(kind, str(kind))


def _value(value: Any, *, code: bool = True) -> str:
    if isinstance(value, float) and value == int(value) and abs(value) < 1e15:
        value = int(value)
    if isinstance(value, int) and abs(value) >= 10_000:
        text = f"{value:,}"
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=lambda v: str(getattr(v, "name", v)))
    return f"`{text}`" if code else text


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _doc(thing: Any) -> str:
    return inspect.getdoc(thing) or ""


def _described(name: str, thing: Any) -> Iterator[str]:
    if inspect.ismodule(thing):
        yield f"## `gdro.{name}`"
        yield _doc(thing)
        for inner in getattr(thing, "__all__", []):
            yield f"* `{name}.{inner}`: {_doc(getattr(thing, inner)).splitlines()[0]}"
        return
    if not callable(thing):
        yield f"## `gdro.{name}`"
        return
    yield f"## `gdro.{name}`"
    if not (inspect.isclass(thing) and (issubclass(thing, BaseModel | Exception) or Protocol in thing.__bases__)):
        yield f"```\n{name}{_signature(thing)}\n```"
    yield _doc(thing) + (" Its fields: [configuration.md](configuration.md)." if _is_section(thing) else "")
    if inspect.isclass(thing) and not issubclass(thing, BaseModel):
        public = [(n, m) for n, m in vars(thing).items() if not n.startswith("_")]
        members = [(n, m) for n, m in public if isinstance(m, types.FunctionType | property) and m.__doc__]
        shown = [(n + (_signature(m) if inspect.isfunction(m) else ""), _doc(m).splitlines()[0]) for n, m in members]
        if shown:
            yield "\n".join(f"* `{name}`: {about}" for name, about in shown)


def _signature(thing: Any) -> str:
    """Parameters without the ranges of hyperparameters, types without their modules."""
    found = inspect.signature(thing)
    plain = [p.replace(annotation=_plain(p.annotation)) for p in found.parameters.values()]
    return re.sub(r"\b(?:[a-z_]\w*\.)+(?=[A-Za-z])", "", str(found.replace(parameters=plain)))


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def main() -> int:
    (DOCS / "configuration.md").write_text(configuration(), encoding="utf-8")
    (DOCS / "api.md").write_text(api(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
