"""Stochastic sampling into a store: what a trajectory holds is what was sampled, whatever the batch or interruption."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gdro.common.prompts import Prompt
from gdro.common.rng import torch_rng
from gdro.groups.sampling import Generation, sample_groups
from gdro.groups.store import GroupStore, GroupWriter, discard_trajectories
from gdro.models.flux import FluxModel
from gdro.samplers.ode import generate
from gdro.samplers.rollout import rollout
from gdro.samplers.sde import PUBLISHED_NOISE, STEPS, log_prob
from gdro.samplers.trajectory import Trajectory
from gdro.samplers.windows import window_steps

HOW: dict[str, Any] = {"guidance_scale": 3.5, "height": 32, "width": 64}
SETTINGS = Generation(
    images_per_prompt=3,
    num_inference_steps=5,
    max_sequence_length=24,
    batch_size=3,
    prompts_per_shard=2,
    sampler="flow_grpo",
    window="fixed",
    window_size=2,
    window_start=1,
    **HOW,
)
PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(["a red wall", "two dots", "a blue sign", "end"])]


def sampled(
    folder: Path, model: FluxModel, settings: Generation = SETTINGS, prompts: int = 2, **how: Any
) -> GroupStore:
    sample_groups(settings, model, PROMPTS[:prompts], folder, seed=7, **how)
    return GroupStore(folder)


def expanded(store: GroupStore, group: str) -> dict[str, torch.Tensor]:
    return {name: value.expand(store.size(group), *value.shape[1:]) for name, value in store.text(group).items()}


def recomputed(model: FluxModel, store: GroupStore, group: str, name: str) -> tuple[list[Any], torch.Tensor]:
    """((mean, std) of each step, log-probabilities (K, w)) of the model on the stored states, as training has them."""
    path, text = store.trajectory(group), expanded(store, group)
    steps, log_probs = [], []
    for j, (t, t_next) in enumerate(pairwise(path.times)):
        x = path.states[:, j]
        with torch.no_grad():
            v = model.velocity(x, t.expand(len(x)), text, **HOW)
        steps.append(STEPS[name](x, v, t, t_next, PUBLISHED_NOISE[name]))
        log_probs.append(log_prob(path.states[:, j + 1], *steps[-1]))
    return steps, torch.stack(log_probs, 1)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", STEPS)
def test_without_noise_a_rollout_is_the_ode(flux: FluxModel, name: str):
    text = flux.encode_text(["a red wall", "two dots"], 24)
    noise = torch.randn(2, 32, 64, generator=torch.Generator().manual_seed(0))
    ode = generate(flux, noise, text, flux.scheduler("FlowMatchEulerDiscreteScheduler", 4, 32, 64), **HOW)
    latents, _ = rollout(
        flux,
        noise,
        text,
        flux.scheduler("FlowMatchEulerDiscreteScheduler", 4, 32, 64),
        sampler=name,
        noise_level=0.0,
        window=range(0, 3),
        step_noise=lambda _: torch.ones(2, 32, 64),
        **HOW,
    )
    assert torch.allclose(latents, ode, atol=1e-5)


@pytest.mark.parametrize("name", STEPS)
def test_a_trajectory_is_what_was_sampled(flux: FluxModel, tmp_path: Path, name: str):
    """ODE to the window; states[j+1] = mean + std n(seed, purpose, group, index, step); ODE to the stored latent."""
    store = sampled(tmp_path, flux, Generation(**{**SETTINGS.model_dump(), "sampler": name, "noise_level": None}))
    assert store.has_trajectories
    sigmas = flux.scheduler(SETTINGS.scheduler, 5, 32, 64).sigmas
    for group in store.group_ids:
        path, text = store.trajectory(group), expanded(store, group)
        assert path.states.shape == (3, 3, 32, 64)
        assert {t.dtype for t in (path.states, path.log_probs, path.times)} == {torch.float32}
        assert torch.equal(path.times, sigmas[1:4])

        noise = torch.stack([torch.randn(32, 64, generator=torch_rng(7, "noise", group, i)) for i in range(3)])
        with torch.no_grad():
            v = flux.velocity(noise, sigmas[:1].expand(3), text, **HOW)
        assert torch.allclose(path.states[:, 0], noise + (sigmas[1] - sigmas[0]) * v, atol=1e-5)

        steps, log_probs = recomputed(flux, store, group, name)
        assert torch.equal(log_probs, path.log_probs), "the same batch: every ratio is exactly 1"
        for j, (mean, std) in enumerate(steps):
            n = [torch.randn(32, 64, generator=torch_rng(7, "noise", group, i, j + 1)) for i in range(3)]
            assert torch.allclose(path.states[:, j + 1], mean + std * torch.stack(n), atol=1e-5)

        x = path.states[:, -1]
        for t, t_next in pairwise(sigmas[3:]):
            with torch.no_grad():
                x = x + (t_next - t) * flux.velocity(x, t.expand(3), text, **HOW)
        assert torch.allclose(x, store.latents(group), atol=1e-4)


def test_log_probabilities_agree_whatever_the_batch(flux: FluxModel, tmp_path: Path):
    """Batches that cross groups, and the store with other ones, agree to rounding; so do recomputed ratios."""
    one = sampled(tmp_path / "one", flux, prompts=4)
    other = sampled(tmp_path / "other", flux, SETTINGS.model_copy(update={"batch_size": 4, "prompts_per_shard": 3}), 4)
    for group in one.group_ids:
        a, b = one.trajectory(group), other.trajectory(group)
        assert torch.allclose(a.states, b.states, atol=1e-4)
        assert torch.allclose(a.log_probs, b.log_probs, atol=1e-5)
        assert torch.allclose(recomputed(flux, other, group, "flow_grpo")[1], b.log_probs, atol=1e-5)
        assert torch.allclose(one.latents(group), other.latents(group), atol=1e-4)


def test_an_interrupted_job_ends_with_the_same_bits(flux: FluxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Stopped before the second shard, and between its trajectories and its parquet file."""
    sampled(tmp_path / "whole", flux, prompts=4)
    write = GroupWriter.write_shard

    def stop_at_second(writer: GroupWriter, i: int, *args: Any) -> None:
        write(writer, i, *args)
        if i == 1:
            (writer.folder / "groups-00001.parquet").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(GroupWriter, "write_shard", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        sampled(tmp_path / "stopped", flux, prompts=4)
    monkeypatch.undo()
    assert GroupStore(tmp_path / "stopped").group_ids == ["p0", "p1"]
    sampled(tmp_path / "stopped", flux, prompts=4)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
    assert "_trajectories-00001.safetensors" in files(tmp_path / "whole")


def test_one_initial_noise_for_a_group(flux: FluxModel, tmp_path: Path):
    """The noise of image 0; the steps' own noise makes the images differ."""
    shared = Generation(**{**SETTINGS.model_dump(), "sampler": "dance_grpo", "noise_level": None, "shared_noise": True})
    shared = shared.model_copy(update={"window_start": 0})
    store = sampled(tmp_path, flux, shared)
    starts = []
    for group in store.group_ids:
        states = store.trajectory(group).states
        assert torch.equal(states[:, 0], states[:1, 0].expand(3, -1, -1))
        assert torch.equal(states[0, 0], torch.randn(32, 64, generator=torch_rng(7, "noise", group, 0)))
        assert not torch.allclose(states[0, 1], states[1, 1], atol=0.01)
        assert len({image.tobytes() for image in store.images(group)}) == 3
        starts.append(states[0, 0])
    assert not torch.equal(*starts), "another group, another noise"


def test_the_window_is_the_rounds(flux: FluxModel, tmp_path: Path):
    sliding = Generation(**{**SETTINGS.model_dump(), "window": "sliding", "window_start": None})
    sigmas = flux.scheduler(SETTINGS.scheduler, 5, 32, 64).sigmas
    for round in range(4):
        store = sampled(tmp_path / str(round), flux, sliding, 1, round=round)
        window = window_steps("sliding", size=2, start=None, interval=1, num_steps=5, round=round, seed=7)
        path: Trajectory = store.trajectory(store.group_ids[0])
        assert torch.equal(path.times, sigmas[window.start : window.stop + 1])
        assert path.states.shape[1] == 3


def test_old_rounds_lose_their_trajectories_and_stay_finished(flux: FluxModel, tmp_path: Path):
    """Sampling sees nothing to do; images, latents and digests are as before."""
    before = sampled(tmp_path, flux, prompts=4)
    latents = before.latents("p1")
    discard_trajectories(tmp_path)
    kept = files(tmp_path)
    store = sampled(tmp_path, flux, prompts=4)
    assert files(tmp_path) == kept
    assert not store.has_trajectories
    assert store.contents == before.contents
    assert torch.equal(store.latents("p1"), latents)


def test_the_ode_leaves_no_trajectory_and_other_images(flux: FluxModel, tmp_path: Path):
    ode = sampled(tmp_path / "ode", flux, SETTINGS.deterministic())
    sde = sampled(tmp_path / "sde", flux)
    assert not ode.has_trajectories
    assert not list((tmp_path / "ode").glob("_trajectories*"))
    assert [shard.sampler for shard in (*ode.shards, *sde.shards)] == ["ode", "flow_grpo"]
    different = np.asarray(ode.images("p0")[0], np.int16) - np.asarray(sde.images("p0")[0], np.int16)
    assert np.abs(different).max() > 2
