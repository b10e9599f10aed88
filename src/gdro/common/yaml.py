"""YAML without surprises: duplicate keys are refused, `3e-4` is a number, `no` a word (YAML 1.2's core scalars).

Aliases are allowed, but their expansion is limited: 500 bytes of them could fill any memory.
"""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gdro.common.errors import UserError
from gdro.common.reading import DEPTH, DIGITS, cause, read_text
from gdro.common.validation import show

NODES = 10_000  # values per document, with aliases expanded
# tag, pattern, first characters. Infinities, sexagesimals, octals, dates and yes/no/on/off are left out, hence words.
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

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}  # per finished node, aliases expanded

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        mark, alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._depth += 1
        if self._depth > DEPTH:
            raise yaml.MarkedYAMLError(problem=f"nested more than {DEPTH} deep", problem_mark=mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if node is None:
            return None
        if alias and node not in self._sizes:
            raise yaml.MarkedYAMLError(problem="an alias inside what it stands for", problem_mark=mark)
        if not alias:
            self._sizes[node] = 1 + sum(self._sizes[child] for child in _children(node))
        if self._sizes[node] > NODES:
            raise yaml.MarkedYAMLError(problem=f"more than {NODES:,} values, aliases expanded", problem_mark=mark)
        return node

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            if isinstance(node, yaml.ScalarNode):
                node.value.encode()
            return super().construct_object(node, deep)
        except yaml.YAMLError:
            raise
        except UnicodeEncodeError:
            problem = "half of a surrogate pair in a string, such as \\ud800"
        except Exception as error:  # `!!float x` and other false tags
            problem = f"not a valid {node.tag.rpartition(':')[2]} ({cause(error)})"
        raise yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else ():  # otherwise refused below
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"key {show(key)}; expected a word", problem_mark=key_node.start_mark
                )
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {show(key)} a second time; expected it once", problem_mark=key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes anything that these rules or YAML 1.1's would read as another type, so all YAML readers agree."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (PyYAML's way)
        first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_RESOLVERS.get(first, [])]
        for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_RESOLVERS}
    }


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    for child in node.value if isinstance(node, yaml.CollectionNode) else ():
        yield from child if isinstance(child, tuple) else (child,)


def _construct_int(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = loader.construct_scalar(node)
    if len(text) > DIGITS:
        raise ValueError(f"an integer of {len(text)} digits; expected at most {DIGITS}")
    return int(text)


def _construct_float(loader: _Loader, node: yaml.ScalarNode) -> float:
    value = float(loader.construct_scalar(node))
    if not math.isfinite(value):
        raise yaml.MarkedYAMLError(problem=f"{node.value}; expected a finite number", problem_mark=node.start_mark)
    return value


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)


def parse_yaml(text: str, where: str) -> Any:
    """The value of one YAML document. UserError names `where`, the line and the problem."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(f"{where}{line}: {error.problem}") from None
    except Exception as error:
        raise UserError(f"{where}: {' '.join(str(error).split())[:200]}; expected YAML") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    value = parse_yaml(read_text(path, "a YAML file with the run's configuration"), str(path))
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {show(value)}; expected sections with fields, such as `train:`")
    return value


def dump_yaml(value: dict[str, Any]) -> str:
    """Text that parse_yaml reads back as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
