"""The rooms of the package and the direction of its imports, read from the source."""

import ast
from functools import cache
from pathlib import Path

import gdro

ROOT = Path(gdro.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# A room may import from itself and from those before its own line; within a line the rooms do not know each other.
FLOORS = (
    ("common",),
    ("objectives", "models", "rewards"),
    ("samplers", "tiny"),
    ("groups",),
    ("training", "evaluation"),
    ("stages",),
    ("runner",),
    ("tools",),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, inside functions too; both without the leading "gdro."."""
    found: dict[str, set[str]] = {".".join(path.relative_to(ROOT).with_suffix("").parts): set() for path in FILES}
    for module, path in zip(list(found), FILES, strict=True):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named = [(alias.name,) for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module:
                named = [(f"{node.module}.{alias.name}", node.module) for alias in node.names]
            else:
                continue
            for candidates in named:  # a module, its package, or what holds the name
                inside = [name.removeprefix("gdro.") for name in candidates if name.startswith("gdro.")]
                inside += [name + ".__init__" for name in inside]
                found[module] |= set([name for name in inside if name in found][:1])
    return found


def room(module: str) -> str:
    return module.split(".")[0]


def test_every_module_stands_in_a_room() -> None:
    assert {room(module) for module in imports()} == set(FLOOR)


def test_imports_point_downward() -> None:
    upward = [
        f"{module} -> {other}"
        for module, others in imports().items()
        for other in others
        if room(other) != room(module) and FLOOR[room(other)] >= FLOOR[room(module)]
    ]
    assert not upward


def test_no_imports_in_circles() -> None:
    left = {module: set(others) for module, others in imports().items()}
    while True:
        free = {module for module, others in left.items() if not others & set(left) - {module}}
        if not free:
            break
        left = {module: others for module, others in left.items() if module not in free}
    assert not left, "modules in circles, or above one"
