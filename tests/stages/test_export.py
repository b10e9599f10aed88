"""An exported adapter gives plain diffusers the images that training saw; the card says what it is."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import FluxPipeline
from safetensors.torch import load_file

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.common.sealed import write_record
from gdro.groups.sampling import Generation, sample_groups
from gdro.models.flux import FluxModel
from gdro.runner.config import RunConfig, saved_config
from gdro.samplers.ode import generate
from gdro.stages.export import export, model_card
from gdro.training.checkpoint import save_checkpoint
from gdro.training.config import RoundsConfig, TrainConfig

FILE = "pytorch_lora_weights.safetensors"
GENERATION = Generation(
    images_per_prompt=1, num_inference_steps=3, max_sequence_length=24, height=32, width=64, prompts_per_shard=2
)


@pytest.fixture
def run_dir(flux: FluxModel, tmp_path: Path) -> Path:
    """Two checkpoints of a run with alpha != rank, the first the better one."""
    flux.add_adapter(rank=4, alpha=10, targets="attention+ff", seed=0)
    for step in (100, 200):
        states = []
        for _ in range(2):
            with torch.no_grad():
                for parameter in flux.adapter().values():
                    parameter.add_(0.05)
            states.append({name: parameter.detach().clone() for name, parameter in flux.adapter().items()})
        raw, ema = states
        save(tmp_path, step, raw, ema, best={"step": 100, "corrected": 0.5})
    config = {
        "model": flux.name,
        "seed": 0,
        "sample": GENERATION.model_dump(mode="json") | {"prompts": "train.txt", "images_per_prompt": 6},
        "score": {"reward": "ocr"},
        "train": TrainConfig(rank=4, lora_alpha=10).model_dump(mode="json"),
        "rounds": RoundsConfig().model_dump(),
        "evaluate": {"num_inference_steps": 3, "prompts": "test.txt"},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path


def save(run_dir: Path, step: int, raw: Any, ema: Any, *, best: dict[str, Any] | None) -> None:
    memory = {"best": best}
    save_checkpoint(run_dir / "checkpoints", step, adapter=raw, ema=ema, optimizer={}, settings={}, memory=memory)


def config_of(run_dir: Path) -> RunConfig:
    saved = saved_config(run_dir)
    assert saved is not None
    return saved


@pytest.mark.parametrize(("folder", "weights"), [(".", "ema"), ("raw", "adapter")])
def test_plain_diffusers_gives_the_same_images(
    run_dir: Path, flux: FluxModel, flux_folder: Path, folder: str, weights: str
):
    out = export(config_of(run_dir), run_dir, run_dir / "adapter")
    flux.load_adapter_state(load_file(run_dir / "checkpoints" / "step-000100" / f"{weights}.safetensors"))
    noise = torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0))
    scheduler = flux.scheduler("FlowMatchEulerDiscreteScheduler", 3, 32, 64)
    how = {"guidance_scale": 3.5, "height": 32, "width": 64}
    ours = flux.decode(generate(flux, noise, flux.encode_text(["a red wall"], 24), scheduler, **how), 32, 64)[0]

    pipe = FluxPipeline.from_pretrained(flux_folder)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(out / folder, weight_name=FILE)
    theirs = pipe("a red wall", latents=noise, num_inference_steps=3, max_sequence_length=24, **how).images[0]
    assert np.abs(np.asarray(ours, np.int16) - np.asarray(theirs, np.int16)).max() <= 1


def test_the_last_checkpoint_is_taken_if_that_is_asked_for(run_dir: Path) -> None:
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["train"]["export"] = "last"
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    card = (export(config_of(run_dir), run_dir, run_dir / "adapter") / "README.md").read_text()
    assert "200 steps" in card
    assert "beta 12.0" in card
    assert "None" not in card


def test_the_last_checkpoint_is_taken_if_none_was_validated(run_dir: Path, flux: FluxModel):
    state = {name: parameter.detach().clone() for name, parameter in flux.adapter().items()}
    save(run_dir, 200, state, state, best=None)
    state = load_file(export(config_of(run_dir), run_dir, run_dir / "out") / FILE)
    ema = load_file(run_dir / "checkpoints" / "step-000200" / "ema.safetensors")
    assert state.keys() == {f"transformer.{name}" for name in ema}
    for name, value in ema.items():  # the strength, 10 / 4, is in B
        assert torch.equal(state[f"transformer.{name}"], value * (2.5 if ".lora_B." in name else 1.0))


VERDICT = {"verdict": {"outcome": "hacked", "headline": "It hacked the reward.", "lines": []}}


def test_card_holds_figures_pictures_and_use(run_dir: Path, flux: FluxModel):
    prompts = [Prompt("a", 'a sign with "A_B"'), Prompt("b", "two dots")]
    sample_groups(GENERATION, flux, prompts, run_dir / "evaluation" / "tuned", seed=0)
    with flux.adapter_disabled():
        sample_groups(GENERATION, flux, prompts, run_dir / "evaluation" / "base", seed=0)
    (run_dir / "evaluation.json").write_text("{}")
    figures = {"base": 0.5, "tuned": 0.7, "gain": 0.2, "ci95": [0.15, 0.25]}
    axes = {"alignment": 3.0, "coherence": 3.5, "style": 4.0}
    summary = VERDICT | {"reward": figures, "corrected": figures, "judge": {"base": axes, "tuned": axes}}
    write_record(run_dir / "summary.json", summary)
    out = export(config_of(run_dir), run_dir, run_dir / "adapter")
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "diffusers"
    assert {"lora", "text-to-image"} <= set(front["tags"])
    assert "| reward | 0.5000 | 0.7000 | +0.2000 | +0.1500 to +0.2500 |" in card
    assert "\n\nIt hacked the reward.\n\n" in card
    assert r'a sign with "A\_B"' in card
    assert "images/pair-1.png" in card
    assert (out / "images" / "pair-1.png").exists()
    assert "pipe.load_lora_weights" in card


def test_a_prompt_is_one_line_of_the_card_whatever_it_holds(run_dir: Path):
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    config["score"]["reward"] = "mine:`x`\n# Reward"
    prompt = "a wall\n\n# Heading\n\n---\r\n<script>alert(1)</script> &amp; ![x](y) | *b* `c` \u2028## Next"
    lines = model_card(config, 1, None, [(prompt, "pair-0.png")]).splitlines()
    assert [line for line in lines if line.startswith("#")] == [
        f"# LoRA for {config['model'].replace('_', chr(92) + '_')}, post-trained with gdro",
        "## Base (left) and tuned (right), same noise",
        "## Use",
    ]
    assert lines.count("---") == 2
    assert any(line.endswith("Reward: `` mine:`x` # Reward ``.") for line in lines)
    shown = r"a wall # Heading --- &lt;script&gt;alert(1)&lt;/script&gt; &amp;amp; !\[x\](y) \| \*b\* \`c\` ## Next"
    assert f"*{shown}*" in lines
    assert f"![{shown}](images/pair-0.png)" in lines


def test_a_card_without_a_judge_leaves_its_rows_out(run_dir: Path):
    figures = {"base": 0.5, "tuned": 0.7, "gain": 0.2, "ci95": [0.15, 0.25]}
    nothing = {"base": None, "tuned": None, "gain": None, "ci95": [None, None]}
    axes = {"alignment": None, "coherence": None, "style": None}
    summary = VERDICT | {"reward": figures, "corrected": nothing, "judge": {"base": axes, "tuned": axes}}
    write_record(run_dir / "summary.json", summary)
    card = (export(config_of(run_dir), run_dir, run_dir / "adapter") / "README.md").read_text()
    assert "| reward |" in card
    assert "| corrected |" not in card
    assert "style" not in card


def test_a_card_of_one_prompt_has_no_interval(run_dir: Path):
    figures = {"base": 0.5, "tuned": 0.7, "gain": 0.2, "ci95": [None, None]}
    axes = {"alignment": 3.0, "coherence": 3.5, "style": 4.0}
    summary = VERDICT | {"reward": figures, "corrected": figures, "judge": {"base": axes, "tuned": axes}}
    write_record(run_dir / "summary.json", summary)
    card = (export(config_of(run_dir), run_dir, run_dir / "adapter") / "README.md").read_text()
    assert "| reward | 0.5000 | 0.7000 | +0.2000 | – |" in card


def test_a_card_without_evaluation_claims_nothing(run_dir: Path):
    card = (export(config_of(run_dir), run_dir, run_dir / "adapter") / "README.md").read_text()
    assert "| reward" not in card
    assert "images/" not in card


def test_runs_without_whole_checkpoints_are_refused(run_dir: Path):
    path = run_dir / "checkpoints" / "step-000100" / "ema.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"ema\.safetensors"):
        export(config_of(run_dir), run_dir, run_dir / "adapter")
    save(run_dir, 200, {}, {}, best={"step": 300})
    with pytest.raises(UserError, match="step-000300 not found"):
        export(config_of(run_dir), run_dir, run_dir / "adapter")
    with pytest.raises(UserError, match=r"holds no checkpoint"):
        export(config_of(run_dir), run_dir / "nowhere", run_dir / "adapter")
