"""The model in the package: real classes, small, loadable by plain diffusers, good enough and flawed enough."""

import json

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from tiny import pretrain
from tiny.build import TEXT_LENGTH, build_pipeline

from gdro.common.rng import numpy_rng, torch_rng
from gdro.models.loading import TINY_FOLDER
from gdro.rewards.registry import load_reward
from gdro.tiny import world
from gdro.tiny.judge import TinyJudge
from gdro.tiny.prompts import tiny_prompts

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pipe() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(TINY_FOLDER)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_is_small_and_says_nothing_of_where_it_was_made():
    assert sum(path.stat().st_size for path in TINY_FOLDER.rglob("*.safetensors")) <= 12e6
    for path in TINY_FOLDER.rglob("*.json"):
        value = json.loads(path.read_text())
        assert not isinstance(value, dict) or "_name_or_path" not in value, path


def test_it_is_a_guidance_embedded_flux(pipe):
    assert type(pipe.transformer) is FluxTransformer2DModel
    assert pipe.transformer.config.guidance_embeds


def test_captions_fit_the_text_length(pipe):
    captions = [world.caption(world.random_scene(numpy_rng(0, "caption", i))) for i in range(500)]
    captions.append('an olive wall with a sign that says "BATS" and three orange triangles')
    assert max(len(ids) for ids in pipe.tokenizer_2(captions).input_ids) <= TEXT_LENGTH


def test_a_sign_is_spelled_in_single_letters(pipe):
    tokens = pipe.tokenizer_2.tokenize('a gray wall with a sign that says "BAKE"')
    assert tokens[-6:] == ['▁"', "B", "A", "K", "E", '"']


@pytest.mark.parametrize(
    ("task", "least", "most", "alignment"), [("ocr", 0.4, 0.75, 4.0), ("geneval", 0.35, 0.65, 3.4)]
)
def test_it_draws_well_and_slips(pipe, task, least, most, alignment):
    """Room to improve, and spread within a group, is what the main job needs of its base."""
    prompts = tiny_prompts(f"tiny:{task}:validation:24")
    records = [prompt for prompt in prompts for _ in range(4)]
    noise = torch.stack([torch.randn(32, 64, generator=torch_rng(0, "test", i)) for i in range(len(records))])
    images = pipe(
        [prompt.text for prompt in records],
        height=world.HEIGHT,
        width=world.WIDTH,
        num_inference_steps=12,
        guidance_scale=3.5,
        max_sequence_length=TEXT_LENGTH,
        latents=noise,
    ).images
    rewards = load_reward(task)(images, records).values.reshape(-1, 4)
    assert least < rewards.mean() < most
    assert (rewards.std(1) > 0).mean() > 0.6
    grades = {axis: values.mean() for axis, values in TinyJudge()(images, records).items()}
    assert grades.pop("alignment") > alignment  # lower where kinds and colors of shapes slip
    assert min(grades.values()) > 4


def test_pretraining_resumed_equals_pretraining_uninterrupted(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain, "CHUNK", 32)
    monkeypatch.setattr(pretrain, "BATCH", 16)
    monkeypatch.setattr(pretrain.FlowTrainer, "steps_per_chunk", 4)
    whole = pretrain.FlowTrainer(build_pipeline(), seed=0, compiled=False)
    for index in range(2):
        whole.run_chunk(index)
    first = pretrain.FlowTrainer(build_pipeline(), seed=0, compiled=False)
    first.run_chunk(0)
    first.save(tmp_path / "state.safetensors", 1)
    second = pretrain.FlowTrainer(build_pipeline(), seed=0, compiled=False)
    assert second.load(tmp_path / "state.safetensors") == 1
    second.run_chunk(1)
    for name, parameter in whole.parameters.items():
        np.testing.assert_array_equal(parameter.detach().numpy(), second.parameters[name].detach().numpy(), name)
        np.testing.assert_array_equal(whole.ema[name].numpy(), second.ema[name].numpy(), name)
