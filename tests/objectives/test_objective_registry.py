"""Objectives by name, and what is refused."""

import ast
import sys
from dataclasses import FrozenInstanceError, asdict, fields
from pathlib import Path
from typing import Any

import pytest

import gdro.objectives
from gdro.common.errors import UserError
from gdro.objectives.registry import (
    ALL_HYPERPARAMETERS,
    OBJECTIVES,
    hyperparameter_model,
    make_objective,
    source_version,
    spec_of,
)

SHARED = ALL_HYPERPARAMETERS


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_has_defaults_and_shared_names(name: str) -> None:
    objective: Any = make_objective(name, {})
    assert objective.name == name
    assert "rewards" in objective.needs
    assert all(field.description for field in hyperparameter_model(type(objective)).model_fields.values())
    assert make_objective(name, dict.fromkeys(SHARED)) == objective
    with pytest.raises(FrozenInstanceError):
        objective.name = "other"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_hyperparameter_the_objective_lacks_is_refused(name: str) -> None:
    own = {field.name for field in fields(OBJECTIVES[name])}
    for other in [*sorted(SHARED - own), "learning_rate"]:
        with pytest.raises(
            UserError, match=rf'^train\.{other} is 0.3, which objective "{name}" does not have; [^\n]*$'
        ):
            make_objective(name, {other: 0.3})


def test_given_hyperparameters_replace_the_defaults() -> None:
    assert asdict(make_objective("gdro", {"beta": 6.0, "gamma": 1.0, "tau": None})) == {
        "beta": 6.0,
        "tau": 0.05,
        "gamma": 1.0,
        "reference": "base",
    }


def test_defaults_are_the_authors() -> None:
    """Of their configurations for OCR or GenEval on SD3.5: whose deviation, and the divergence's weight."""
    published = {
        "flow_grpo": ("batch", 0.04, 1e-4),
        "grpo_guard": ("batch", 0.0, 2e-6),
        "dance_grpo": ("group", None, 1e-4),
        "ddpo": ("group", None, 1e-4),
        "dgpo": ("batch", None, None),
        "nft": ("batch", 1e-4, None),
        "awm": ("batch", None, 1.0),
    }
    for name, values in published.items():
        own = asdict(make_objective(name, {}))
        assert (own["advantage"], own.get("kl_weight"), own.get("clip_range")) == values


def test_an_unknown_objective_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(
        UserError,
        match=r'^train\.objective: "flow_gpro" is neither an objective nor a module:Class; did you mean "flow_grpo"\?$',
    ):
        make_objective("flow_gpro", {})


@pytest.mark.parametrize("fields", [{"advantage": "slas"}, {"advantage": "batch", "advantage_exponent": 0.5}])
def test_slas_and_its_exponent_go_together(fields: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"^train\.advantage_exponent is .*expected more than 0 with slas"):
        make_objective("flow_grpo", fields)
    assert make_objective("flow_grpo", {"advantage": "slas", "advantage_exponent": 0.5})


def test_objectives_import_little() -> None:
    """The command line reads them to check a configuration; it must not wait for the model libraries."""
    allowed = sys.stdlib_module_names | {"torch", "pydantic"}
    for path in Path(gdro.objectives.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            for name in names:
                ours = name.startswith(("gdro.objectives", "gdro.common"))
                assert ours or name.partition(".")[0] in allowed, (path, name)


def test_the_source_of_an_own_objective_is_part_of_what_a_run_was_trained_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One's own module changes at will; gdro's objectives change with the package."""
    monkeypatch.chdir(tmp_path)
    source = Path("my_best_only.py")
    source.write_text(
        "from dataclasses import dataclass\n"
        "from gdro.objectives.base import ForwardObjective\n"
        "@dataclass(frozen=True)\n"
        "class BestOnly(ForwardObjective):\n"
        "    scale: float = 1.0\n"
        "    def loss(self, batch):\n"
        "        return self.scale * batch.d[:, 0], {'loss_rank': batch.d[:, 0].detach()}\n"
    )
    own = make_objective("my_best_only:BestOnly", {"scale": 2.0})
    assert spec_of(own) == {"name": "my_best_only:BestOnly", "scale": 2.0}
    before = source_version(own)
    source.write_text(source.read_text() + "# another\n")
    assert before is not None
    assert source_version(own) not in (None, before)
    assert source_version(make_objective("gdro", {})) is None
