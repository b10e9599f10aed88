"""The documents: what is generated is up to date, examples run, quoted messages and links exist."""

import ast
import importlib.util
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from run_files import rows
from toy_groups import GUIDANCE, HEIGHT, LENGTH, SAMPLING, WIDTH, write_toy

import gdro
from gdro.cli import parsers
from gdro.common.prompts import Prompt
from gdro.common.yaml import parse_yaml
from gdro.models import load_model, loading
from gdro.models.base import FlowModel
from gdro.rewards.registry import load_judge, load_reward
from gdro.runner.config import validate
from gdro.stages.train import train
from gdro.tools.comparison.table import END, START
from gdro.training.config import TrainConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(DOCS.glob("*.md"))]
IMAGES = [Image.new("RGB", (8, 8), color) for color in ("black", "white")]
PROMPTS = [Prompt("0", "a night"), Prompt("1", "a day")]


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the Python files of extending.md, in which gdro is as if started."""
    names = []
    for block in blocks("extending.md", "python"):
        name = block.splitlines()[0].removeprefix("# ")
        (tmp_path / name).write_text(block)
        names.append(name.removesuffix(".py"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["configuration", "api"])
def test_what_is_generated_is_up_to_date(generate: ModuleType, page: str) -> None:
    now = (DOCS / f"{page}.md").read_text()
    assert now == getattr(generate, page)(), "run python docs/generate.py"


def test_the_objective_trains(modules: Path, flux: Any) -> None:
    toy = write_toy(modules / "toy", flux)
    given = {"objective": "my_objectives:Hinge", "margin": 0.2, "k": 4, "rank": 4, "max_train_steps": 2}
    config = TrainConfig(**given, groups_per_step=3, learning_rate=2e-3, validation_steps=0)
    assert config.flat()["margin"] == 0.2
    train(config, flux, *toy, modules / "out", seed=0, sampling=SAMPLING, validate=None)
    first, second = rows(modules / "out")
    assert first["loss_rank"] == pytest.approx(3 * 0.2, rel=1e-4)  # policy = reference: k - 1 margins are all missed
    assert second["loss_rank"] != first["loss_rank"]


def test_the_reward_and_the_judge_score(modules: Path) -> None:
    reward: Any = load_reward("my_rewards:brightness")
    assert reward(IMAGES, PROMPTS).values.tolist() == [0, 1]
    grades = load_judge("my_judge:grade")(IMAGES, PROMPTS)
    assert set(grades) == {"alignment", "coherence", "style"}
    assert np.isfinite(np.concatenate(list(grades.values()))).all()


def test_the_family_is_a_model(modules: Path, flux: Any, flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(loading.FAMILIES, "FluxPipeline", ("my_model", "MyFluxModel"))
    mine: Any = load_model(str(flux_folder), device=torch.device("cpu"), dtype=torch.float32)
    assert type(mine).__name__ == "MyFluxModel"
    members = {name for name in vars(FlowModel) if not name.startswith("_")} | set(FlowModel.__annotations__)
    assert not [name for name in members if not hasattr(mine, name)]
    x_t, t = torch.randn(2, *mine.latent_shape(HEIGHT, WIDTH)), torch.tensor([0.2, 0.9])
    text = mine.encode_text(["a night", "a day"], LENGTH)
    assert {n: v.shape[1:] for n, v in text.items()} == mine.text_shapes(LENGTH)
    ours, theirs = (
        model.velocity(x_t, t, text, guidance_scale=GUIDANCE, height=HEIGHT, width=WIDTH) for model in (mine, flux)
    )
    assert torch.equal(ours, theirs)
    for preset in mine.lora_presets:
        mine.check_targets(preset)


def test_the_tutorials_configuration_is_valid() -> None:
    whole, *parts = blocks("tutorial.md", "yaml")
    data = parse_yaml(whole, "tutorial.md")
    validate(data)
    for part in parts:
        for name, value in parse_yaml(part, "tutorial.md").items():
            data[name] = {**data[name], **value} if isinstance(value, dict) else value
        validate(data)


@cache
def texts() -> list[str]:
    """Every string in the source, with … for what is put into it."""
    found = []
    for path in Path(gdro.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_quoted_message_is_in_the_source() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 30
    assert not [quote for quote in quoted if not any(quote in text for text in texts())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)\)", page.read_text())
    inside = [link for link in links if not re.match(r"\w+:", link)]
    assert not [link for link in inside if not (page.parent / link).exists()]


def test_the_readme_says_the_verdict_as_the_report_does() -> None:
    said = re.search(r'verdict in its report: "(.*?)"', (ROOT / "README.md").read_text(), re.DOTALL)
    assert said is not None
    assert " ".join(said[1].split()) in texts()


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "CHANGELOG.md"], ids=lambda page: page.name)
def test_commands_are_those_of_the_command_line(page: Path) -> None:
    fenced = "".join(re.findall(r"^```\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE))
    named = re.findall(r"^gdro ([a-z]+)", fenced, re.MULTILINE) + re.findall(r"`gdro ([a-z]+)", page.read_text())
    assert not set(named) - set(parsers()[1])


def test_the_bench_finds_its_place() -> None:
    text = (DOCS / "results.md").read_text()
    assert text.count(START) == text.count(END) == 1


def test_the_readme_is_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
