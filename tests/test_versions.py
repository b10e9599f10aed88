"""The declared lower bounds are versions that the tests run on: `make lowest` installs exactly these."""

import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
BY_HAND = {"torch"}  # no CPU build of its lowest version everywhere: docs/log.md says when it was run
TOOLS = {"pytest", "pytest-xdist", "ruff", "mypy"}


def pins(name: str) -> dict[str, Version]:
    lines = (ROOT / name).read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {package: Version(version) for package, version in pairs}


def test_lower_bounds_are_the_versions_of_make_lowest():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = project["dependencies"] + [
        one for extra in ("tensorboard", "geneval", "ray", "dev") for one in project["optional-dependencies"][extra]
    ]
    lowest, pinned = pins("constraints-lowest.txt"), pins("constraints.txt")
    for requirement in map(Requirement, needed):
        bounds = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
        if not bounds or requirement.name in BY_HAND | TOOLS:
            continue
        tested = lowest.get(requirement.name, pinned.get(requirement.name))
        assert tested == bounds[0], f"{requirement} is tested from {tested} on"
    assert set(lowest) - {Requirement(one).name for one in needed} <= {"tokenizers", "pydantic_core"}
    assert all(lowest[name] <= pinned[name] for name in set(lowest) & set(pinned))
