"""YAML without surprises: duplicate keys refused, `3e-4` a number, `no` a word (YAML 1.2's core scalars)."""

import math
import re
from pathlib import Path
from typing import Any

import yaml

from gdro.errors import UserError

# tag, pattern, first characters. Neither infinities, sexagesimals, octals, dates nor yes/no/on/off: those stay words.
_SCALARS: list[tuple[str, str, str]] = [
    ("null", r"^(?:~|null|Null|NULL|)$", "~nN\0"),
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
]
_RESOLVERS: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
for _tag, _pattern, _firsts in _SCALARS:
    for _first in _firsts:
        _RESOLVERS.setdefault(_first.replace("\0", ""), []).append((f"tag:yaml.org,2002:{_tag}", re.compile(_pattern)))


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _RESOLVERS

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(problem=f"key {key!r}; expected a word", problem_mark=key_node.start_mark)
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f'the key "{key}" a second time; expected it once', problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes whatever these rules or YAML 1.1's would read as another type, so any YAML reader gets the same."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's way)
        first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_RESOLVERS.get(first, [])]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_RESOLVERS}
    }


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    value = float(node.value)
    if not math.isfinite(value):
        raise yaml.MarkedYAMLError(problem=f"{node.value}; expected a finite number", problem_mark=node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document. UserError names `where`, the line and what is wrong."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: {error.problem}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{where}: {' '.join(str(error).split())}; expected YAML") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds."""
    if not path.is_file():
        raise UserError(f"{path} not found; expected a YAML file with the run's configuration")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); expected YAML") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    value = parse_yaml(text, str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {value!r}; expected sections with fields, such as `train:`")
    return value


def dump_yaml(value: dict[str, Any]) -> str:
    """Text that parse_yaml reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
