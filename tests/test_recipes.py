"""The recipes carry the paper's settings and run: whole runs at very small size, on models of the same classes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from small_pipelines import small_sd3, small_z_image
from small_run import REWARDS, prompt_lines

from gdro.cli import main
from gdro.config import load_config
from gdro.rewards.registry import load_reward

RECIPES = Path(__file__).parent.parent / "configs"
SMALL = {
    "device": "cpu",
    "sample.images_per_prompt": 8,
    "sample.num_inference_steps": 4,
    "sample.max_sequence_length": 24,
    "sample.height": 32,
    "sample.width": 64,
    "train.max_train_steps": 2,
    "train.groups_per_step": 2,
    "train.rank": 2,
    "evaluate.images_per_prompt": 1,
    "evaluate.num_inference_steps": 2,
    "evaluate.bootstrap_samples": 100,
}
TINY = {"model": "tiny", "sample.prompts": "tiny:{}:train:3", "evaluate.prompts": "tiny:{}:test:2"}


@pytest.mark.parametrize(
    ("name", "reward", "beta", "gamma", "steps"),
    [("flux_ocr", "ocr", 12, 0.5, 300), ("flux_geneval", "geneval", 6, 1.0, 700), ("sd3_ocr", "ocr", 12, 0.5, 300)],
)
def test_the_papers_settings(name: str, reward: str, beta: float, gamma: float, steps: int) -> None:
    config = load_config(RECIPES / f"{name}.yaml")
    train, sample = config.train, config.sample
    assert (train.objective, train.k, train.tau, train.rank, train.learning_rate) == ("gdro", 6, 0.05, 32, 3e-4)
    assert (train.beta, train.gamma, train.max_train_steps) == (beta, gamma, steps)
    assert (train.ema_warmup, train.ema_decay) == (0.001, 0.5)
    assert abs(train.k * train.groups_per_step - 512) < train.k
    assert (sample.images_per_prompt, sample.height, sample.width, sample.sampler) == (16, 512, 512, "ode")
    assert load_reward(config.score.reward).name == reward


def run(name: str, out: Path, settings: dict[str, object]) -> dict:
    """Do the recipe's whole run with some fields replaced; its summary."""
    options = [part for field, value in (SMALL | settings).items() for part in (f"--{field}", str(value))]
    assert main(["run", str(RECIPES / f"{name}.yaml"), "--out", str(out), *options]) == 0
    return json.loads((out / "summary.json").read_text())


@pytest.mark.parametrize(("name", "task"), [("flux_ocr", "ocr"), ("flux_geneval", "geneval")])
def test_flux_recipes_run_on_the_tiny_model(name: str, task: str, tmp_path: Path) -> None:
    """With the recipe's own reward, on the tiny world's prompts."""
    own = {"score.workers": 1} if task == "ocr" else {"score.reward": "geneval"}
    summary = run(name, tmp_path, {field: value.format(task) for field, value in TINY.items()} | own)
    assert summary["reward"]["base"] is not None
    assert (tmp_path / "adapter" / "pytorch_lora_weights.safetensors").exists()


@pytest.mark.parametrize("make", [small_sd3, small_z_image])
def test_the_sd3_recipe_runs_and_its_adapter_loads_in_diffusers(
    make: Callable[[], DiffusionPipeline], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights draw no word, so another reward stands in. Z-Image's text is the least like the others'."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make().save_pretrained(tmp_path / "model")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(prompt_lines(split, 2))
    settings = {
        "model": tmp_path / "model",
        "sample.prompts": tmp_path / "train.jsonl",
        "evaluate.prompts": tmp_path / "test.jsonl",
        "score.reward": "my_rewards:redness",
    }
    summary = run("sd3_ocr", tmp_path / "run", settings)
    assert summary["evaluations"]["sample"] == 2 * 8 * 4 * 2  # prompts, images, steps, with and without the prompt
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.load_lora_weights(tmp_path / "run" / "adapter", weight_name="pytorch_lora_weights.safetensors")
    assert pipe.get_active_adapters()
