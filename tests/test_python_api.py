"""gdro in a notebook: what `import gdro` gives, what it costs, and the lines of README.md that say how it goes."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from small_run import REWARDS, small_run

import gdro
import gdro.runner.pipeline  # a submodule, once imported, is an attribute of its package: none may hide a name
from gdro.common.sealed import read_record
from gdro.objectives.registry import FORWARD, TRAJECTORY

README = Path(__file__).parents[1] / "README.md"
HEAVY = {"torch", "numpy", "pydantic", "PIL", "pyarrow", "yaml", "diffusers", "transformers"}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["import gdro", "from gdro.cli import main; main(['--help'])"])
def test_importing_and_help_load_nothing_heavy(program: str) -> None:
    said = "import atexit, sys; atexit.register(lambda: print(*sys.modules, file=sys.stderr))"
    done = subprocess.run([sys.executable, "-c", f"{said}; {program}"], capture_output=True, text=True, check=True)
    assert "gdro" in done.stderr.split()
    assert not HEAVY & set(done.stderr.split())


def test_names_are_what_type_checkers_see() -> None:
    tree = ast.parse(Path(gdro.__file__).read_text())
    seen = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gdro.")
        for alias in node.names
    }
    assert set(seen) == set(gdro.__all__) <= set(dir(gdro))
    for name, home in seen.items():
        assert getattr(gdro, name) is getattr(import_module(home), name)
        assert getattr(gdro, name).__doc__
    assert {kind.__name__ for kind in (*FORWARD, *TRAJECTORY)} <= set(gdro.__all__)
    assert (Path(gdro.__file__).parent / "py.typed").exists()
    with pytest.raises(AttributeError, match="no attribute 'lod_model'"):
        gdro.lod_model  # noqa: B018


def test_a_configuration_is_a_recipe_with_values_of_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = gdro.load_config("demo", {"train.k": 4, "train.objective": gdro.Rank(beta=5.0), "sample.prompts": "a.txt"})
    assert (config.model, config.train.k, config.sample.prompts) == ("tiny", 4, "a.txt")
    assert config.train.objective == gdro.Rank(beta=5.0)
    Path("demo").write_text("model: mine\nsample: {prompts: a.txt}\nevaluate: {prompts: b.txt}\n")
    assert gdro.load_config("demo").model == "mine"
    with pytest.raises(gdro.UserError, match=r'train.k is "4"; expected an integer'):
        gdro.load_config("demo", {"train.k": "4"})
    with pytest.raises(gdro.UserError, match="nowhere not found"):
        gdro.load_config("nowhere")


def test_a_model_goes_where_there_is_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    model = gdro.load_model("tiny")
    assert model.device.type == "cpu"
    assert next(model.transformer.parameters()).dtype == torch.float32
    with pytest.raises(gdro.UserError, match='device is "cuda", but torch finds no GPU'):
        gdro.load_model("tiny", device="cuda")


def test_training_repeats_the_stochastic_steps_of_the_store(flux: Any, tmp_path: Path) -> None:
    """Without being told how they were sampled; from a store that does not say it is refused."""
    settings = gdro.Generation(
        images_per_prompt=3, num_inference_steps=3, sampler="flow_grpo", max_sequence_length=16, height=32, width=64
    )
    prompts = [gdro.Prompt(name, f"a sign {name}") for name in ("a", "b")]
    groups = gdro.sample_groups(settings, flux, prompts, tmp_path / "groups")
    rewards = gdro.score_groups(gdro.load_reward("jpeg_compressibility"), groups)
    config = gdro.TrainConfig(objective=gdro.FlowGrpo(), k=3, groups_per_step=2, max_train_steps=1, rank=2)
    gdro.train(config, flux, groups, rewards, tmp_path)
    (tmp_path / "groups" / "_sampling.json").unlink()
    with pytest.raises(gdro.UserError, match=r"lacks _sampling\.json"):
        gdro.train(config, flux, groups, rewards, tmp_path / "other")


def test_the_lines_of_the_readme_do_the_main_job(
    flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand; small by the files they name."""
    found = re.search(r"^## From Python\n.*?^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    assert found is not None
    lines = found[1]
    assert len(lines.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    config = yaml.safe_load(small_run(tmp_path, flux_folder).read_text())
    config["evaluate"]["judge"] = None
    Path("my.yaml").write_text(yaml.safe_dump(config))
    Path("my_rewards.py").write_text(REWARDS.replace("redness", "brightness"))
    monkeypatch.setitem(sys.modules, "my_rewards", None)  # what it was, or that it was not there, comes back
    del sys.modules["my_rewards"]
    for name in ("train", "test"):
        Path(f"{name}.txt").write_text("\n".join(f"a sign {name} {i}" for i in range(4)))
    exec(compile(lines, str(README), "exec"), {})
    evidence = read_record(Path("runs/mine/evaluation.json"))
    assert capsys.readouterr().out == evidence["verdict"]["headline"] + "\n"
    assert evidence["base"]["reward"] != evidence["tuned"]["reward"]
    assert Path("runs/mine/adapter/pytorch_lora_weights.safetensors").is_file()
