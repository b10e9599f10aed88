"""The recipes carry the paper's settings and run as they are: whole runs, on their own prompts, at very small size."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from conftest import clip_config, clip_tokenizer
from diffusers import DiffusionPipeline
from fake_endpoint import Asked, FakeEndpoint, Said
from small_pipelines import small_sd3, small_z_image
from small_run import REWARDS, prompt_lines

from gdro.cli import main
from gdro.objectives.forward.gdro import Gdro
from gdro.rewards.geneval import detectors
from gdro.rewards.registry import load_judge, load_reward
from gdro.runner.config import load_config
from gdro.runner.planning.report import prompt_counts
from gdro.runner.prompt_sets import load_prompts

RECIPES = Path(__file__).parents[2] / "configs"
NAMES = ("flux_ocr", "flux_ocr_fast", "flux_geneval", "sd3_ocr")
# One round of two prompts, one step; prompts, lengths of text and all else are the recipe's own.
SMALL = {
    "device": "cpu",
    "mixed_precision": "no",
    "sample.images_per_prompt": 6,
    "sample.num_inference_steps": 1,
    "sample.height": 16,
    "sample.width": 32,
    "rounds.train_steps": 1,
    "rounds.prompts": 2,
    "score.workers": 1,
    "train.max_train_steps": 1,
    "train.groups_per_step": 2,
    "train.rank": 2,
    "evaluate.images_per_prompt": 1,
    "evaluate.num_inference_steps": 1,
    "evaluate.bootstrap_samples": 100,
}


@pytest.mark.parametrize(
    ("name", "reward", "beta", "gamma", "steps"),
    [("flux_ocr", "ocr", 12, 0.5, 300), ("flux_geneval", "geneval", 6, 1.0, 700), ("sd3_ocr", "ocr", 12, 0.5, 300)],
)
def test_the_papers_settings(name: str, reward: str, beta: float, gamma: float, steps: int) -> None:
    config = load_config(RECIPES / f"{name}.yaml")
    train, sample = config.train, config.sample
    assert (train.k, train.rank, train.learning_rate, train.max_train_steps) == (6, 32, 3e-4, steps)
    assert train.objective == Gdro(beta=beta, tau=0.05, gamma=gamma)
    assert (train.ema_warmup, train.ema_decay) == (0.001, 0.5)
    assert abs(train.k * train.groups_per_step - 512) < train.k
    assert (sample.images_per_prompt, sample.height, sample.width, sample.sampler) == (16, 512, 512, "ode")
    assert load_reward(config.score.reward).name == reward


def test_the_fast_recipe_costs_a_tenth_per_prompt() -> None:
    """Model evaluations of sampling and training, with live reference and without guidance's second pass."""
    cost = {}
    for name in ("flux_ocr", "flux_ocr_fast"):
        config = load_config(RECIPES / f"{name}.yaml")
        train, images = config.train, config.train.max_train_steps * config.train.groups_per_step * config.train.k
        cost[name] = config.sample.images_per_prompt * config.sample.calls + 4 * images / 1000
        assert train.objective.reference == "base"
    assert cost["flux_ocr"] == pytest.approx(1060)
    assert cost["flux_ocr_fast"] <= 110


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_is_complete_wherever_it_is_copied(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of all three splits that fit its text length, validation, a judge of pinned weights."""
    (tmp_path / "my.yaml").write_bytes((RECIPES / f"{name}.yaml").read_bytes())
    monkeypatch.chdir(tmp_path)
    config = load_config(Path("my.yaml"))
    assert config.train.validates
    assert config.train.validation_prompts is not None
    counts = []
    for spec in (config.sample.prompts, config.train.validation_prompts, config.evaluate.prompts):
        prompts = load_prompts(spec)
        counts.append(len(prompts))
        for prompt in prompts:  # T5 has a token for the end, and never more of them than characters and one
            assert len(prompt.text) + 2 <= config.sample.max_sequence_length
            assert len(prompt.text.split()) <= 30  # of CLIP's 77 tokens
    assert counts == [1000, 60 if "geneval" in name else 50, 200]
    judge = config.evaluate.judge
    assert isinstance(judge, dict)
    assert len(judge["revision"]) == 40
    text = Path("my.yaml").read_text()
    assert f"vllm serve {judge['model']} --revision {judge['revision']}" in text
    assert load_judge(judge).name == "unified_judge"


@pytest.mark.parametrize("name", [*NAMES, "demo"])
def test_a_plan_knows_how_many_prompts_a_recipe_has(name: str) -> None:
    counts, notes = prompt_counts(load_config(RECIPES / f"{name}.yaml"))
    assert all(counts.values())
    assert notes == []


@pytest.fixture
def judge() -> Iterator[FakeEndpoint]:
    """Grades by how many prompts it was asked about, so that they differ."""

    def behave(asked: Asked) -> Said:
        grade = 2 + asked.number % 3
        axes = (f"{axis} Score (1-5): {grade}" for axis in ("Alignment", "Coherence", "Style"))
        return Said("\n".join(axes))

    with FakeEndpoint(behave, models=("CodeGoat24/UnifiedReward-2.0-qwen35-9b",)) as server:
        yield server


def with_spread(reward: dict[str, object]) -> list[dict[str, object]]:
    """The reward, and one that tells images of noise apart: where neither letter nor object is, nothing is learned."""
    return [term | {"standardize": False} for term in (reward, {"name": "jpeg_compressibility"})]


def run(name: str, out: Path, judge: FakeEndpoint, settings: dict[str, object]) -> dict:
    """Do the recipe's whole run with its judge at another address and some fields replaced; its summary."""
    own = load_config(RECIPES / f"{name}.yaml").evaluate.judge
    assert isinstance(own, dict)
    asked = {"evaluate.judge": own | {"url": judge.url, "cache": str(out.parent / "replies.sqlite")}}
    options = [
        part
        for field, value in (SMALL | asked | settings).items()
        for part in (
            f"--{field}",
            yaml.safe_dump(value).removesuffix("...\n") if isinstance(value, dict | list) else str(value),
        )
    ]
    assert main(["run", str(RECIPES / f"{name}.yaml"), "--out", str(out), *options]) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["judge"]["base"].keys() == summary["judge"]["tuned"].keys() == {"alignment", "coherence", "style"}
    assert summary["nfe"]["train"] > 0
    assert (out / "adapter" / "pytorch_lora_weights.safetensors").exists()
    return summary


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux_ocr", "flux_ocr_fast"])
def test_flux_ocr_runs_with_its_own_reward(name: str, flux_folder: Path, judge: FakeEndpoint, tmp_path: Path) -> None:
    settings = {"model": flux_folder, "score.reward": with_spread({"name": "ocr"})}
    summary = run(name, tmp_path / "run", judge, settings)
    assert summary["reward"]["base"] is not None
    assert len(judge.asked) == 2 * 50 + 2 * 200  # validation of the base and of the step, both sides of the test


@pytest.fixture
def eyes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A Mask2Former of COCO's classes, at 64 pixels, and a CLIP: real classes, random weights."""
    monkeypatch.setattr(detectors, "INPUT_SIZE", {"shortest_edge": 64, "longest_edge": 128})
    words = yaml.safe_load((RECIPES.parent / "benchmarks" / "prompt_sets.yaml").read_text())
    torch.manual_seed(0)
    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            image_size=64,
            embed_dim=8,
            depths=[1, 1, 1, 1],
            num_heads=[1, 1, 2, 2],
            window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=16,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=16,
        num_queries=6,
        id2label=dict(enumerate(words["classes"])),
        label2id={name: i for i, name in enumerate(words["classes"])},
    )
    text = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = text | {"image_size": 32, "patch_size": 8}
    tokenizer = clip_tokenizer()
    clip = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=clip_config(tokenizer).to_dict(), vision_config=vision, projection_dim=16)
    )
    kinds = {"detector": transformers.Mask2FormerForUniversalSegmentation(config), "clip": clip}
    processors = {
        "detector": {"image_processor_type": "Mask2FormerImageProcessor", "size": {"height": 384, "width": 384}},
        "clip": {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": 32},
            "crop_size": {"height": 32, "width": 32},
        },
    }
    for name, model in kinds.items():
        model.save_pretrained(tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(processors[name]))
    tokenizer.save_pretrained(tmp_path / "clip")
    return {name: str(tmp_path / name) for name in kinds}


@pytest.mark.slow
def test_flux_geneval_runs_with_a_detector_of_its_class(
    flux_folder: Path, eyes: dict[str, str], judge: FakeEndpoint, tmp_path: Path
) -> None:
    settings = {"model": flux_folder, "score.reward": with_spread({"name": "geneval", **eyes})}
    summary = run("flux_geneval", tmp_path / "run", judge, settings)
    assert summary["reward"]["base"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("make", [small_sd3, small_z_image])
def test_the_sd3_recipe_runs_and_its_adapter_loads_in_diffusers(
    make: Callable[[], DiffusionPipeline], judge: FakeEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights draw no word, so another reward stands in. Z-Image's text is the least like the others'."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make().save_pretrained(tmp_path / "model")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)
    settings: dict[str, object] = {"model": tmp_path / "model", "score.reward": "my_rewards:redness"}
    if make is small_sd3:  # all of these prompts are flux_ocr's too
        settings |= {"train.validation_prompts": "gdro:ocr:validation:8", "evaluate.prompts": "gdro:ocr:test:8"}
    else:  # has places for few characters
        for field in ("sample.prompts", "train.validation_prompts", "evaluate.prompts"):
            path = tmp_path / f"{field}.jsonl"
            path.write_text(prompt_lines(field, 2))
            settings[field] = path
    summary = run("sd3_ocr", tmp_path / "run", judge, settings)
    assert summary["nfe"]["sample"] == 2 * 6 * 2  # prompts, images, with and without the prompt
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "model")
    pipe.load_lora_weights(tmp_path / "run" / "adapter", weight_name="pytorch_lora_weights.safetensors")
    assert pipe.get_active_adapters()
