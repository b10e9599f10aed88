"""The reference's errors on a pool of draws: those that the reference itself gives, asked for once."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import rows
from small_run import small_run
from toy_groups import SAMPLING, write_toy

from gdro.models.base import FlowModel
from gdro.runner import pipeline
from gdro.runner.config import load_config
from gdro.stages import train as stage
from gdro.stages.train import prepare
from gdro.training.config import TrainConfig
from gdro.training.learner import Learner
from gdro.training.step import backward, train_step
from gdro.training.steps.forward import noised

SMALL: dict[str, Any] = {"k": 3, "rank": 4, "groups_per_step": 2, "learning_rate": 2e-3, "reference_draws": 2}


@pytest.fixture
def toy(tmp_path: Path, flux: Any) -> tuple[Path, Path]:
    return write_toy(tmp_path / "toy", flux, groups=3, images=4)


def learner(model: FlowModel, toy: tuple[Path, Path], seed: int = 0, **changes: Any) -> Learner:
    return prepare(TrainConfig(**(SMALL | changes)), model, *toy, seed=seed, sampling=SAMPLING)[0]


@pytest.mark.parametrize("scope", ["group", "image"])
def test_an_image_meets_the_draws_of_its_pool_whoever_it_is_seen_with(
    flux: Any, toy: tuple[Path, Path], scope: str
) -> None:
    seen: dict[tuple[str, int, int], tuple[float, torch.Tensor]] = {}
    for k in (2, 3):
        one = learner(flux, toy, k=k, timestep_scope=scope, noise_scope=scope)
        for step in range(1, 40):
            draws = one.data.draws.at(step)
            batch = one.data.batches.of(draws)
            assert batch.eps.shape[1] == (k if scope == "image" else 1)
            eps = batch.eps.expand(-1, k, -1, -1)
            for i, draw in enumerate(draws):
                for j, image in enumerate(draw.images.tolist()):
                    drawn = float(batch.t[i, j]), eps[i, j]
                    t, noise = seen.setdefault((draw.group, image, one.data.batches.pool_index(draw)), drawn)
                    assert t == drawn[0]
                    assert torch.equal(noise, drawn[1])
    assert len(seen) == 3 * 4 * 2  # all groups, images and draws
    assert len({t for t, _ in seen.values()}) == (24 if scope == "image" else 6)


@pytest.mark.parametrize("objective", ["gdro", "dgpo"])
def test_the_kept_errors_are_the_references_own(flux: Any, toy: tuple[Path, Path], objective: str) -> None:
    one = learner(flux, toy, objective=objective)
    for step in (1, 2, 3):
        train_step(one, step)
    draws = one.data.draws.at(4)

    def gradient() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        one.optimizer.zero_grad()
        figures = backward(one, draws, 2)
        return torch.cat([p.grad.flatten() for p in one.policies.parameters.values() if p.grad is not None]), figures

    kept, figures = gradient()
    assert one.data.reference_errors is not None
    errors = one.data.reference_errors.of(draws, [one.data.batches.pool_index(draw) for draw in draws])
    asked = noised(one.at(draws[0].group), one.data.batches.of(draws), base=False, reference="base").d_ref
    torch.testing.assert_close(errors, asked, rtol=1e-6, atol=0)
    one.data = replace(one.data, reference_errors=None)  # the same draws, the reference asked
    live, expected = gradient()
    assert (kept - live).norm() < 1e-4 * live.norm()
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(figures[name], value, rtol=1e-4, atol=1e-5)


def test_each_error_is_computed_once_and_counted_once(flux: Any, toy: tuple[Path, Path]) -> None:
    def cost(one: Learner, step: int) -> int:
        before = flux.nfe
        counted = train_step(one, step)["nfe"]
        assert counted == flux.nfe - before
        return int(counted)

    one = learner(flux, toy)
    costs = [cost(one, step) for step in range(1, 40)]
    assert costs[0] == 2 * 3 * (1 + 3)
    assert costs[-1] == 2 * 3 * 3
    assert sum(costs) == 39 * 18 + 3 * 4 * 2
    assert one.data.reference_errors is not None
    (known,) = one.data.reference_errors.state().values()
    assert known.shape == (12, 2)
    assert not known.isnan().any()
    assert cost(learner(flux, toy), 1) == costs[0]  # another run on the same groups counts the same


def test_a_group_met_twice_in_a_step_is_counted_once(flux: Any, toy: tuple[Path, Path]) -> None:
    one = learner(flux, toy, groups_per_step=9, reference_draws=1, k=4)
    assert train_step(one, 1)["nfe"] == 9 * 4 * 3 + 3 * 4


def test_what_is_known_is_kept_for_the_same_images_only(flux: Any, toy: tuple[Path, Path], tmp_path: Path) -> None:
    one = learner(flux, toy)
    train_step(one, 1)
    assert one.data.reference_errors is not None
    state = {name: values.clone() for name, values in one.data.reference_errors.state().items()}
    other = write_toy(tmp_path / "other", flux, groups=3, images=5)
    for groups, known in ((toy, True), (other, False)):
        again = learner(flux, groups)
        assert again.data.reference_errors is not None
        again.data.reference_errors.load(state)
        (values,) = again.data.reference_errors.state().values()
        assert bool(values.isnan().all()) is not known


@pytest.mark.slow
@pytest.mark.parametrize("kept", [1, 2])
def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one_at_its_budget(
    flux_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: int
) -> None:
    """In rounds: what was computed after the last checkpoint counts again, what is known of a kept round does not."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    changes = {
        "train.reference_draws": "2",
        "train.max_train_steps": "9",
        "train.checkpointing_steps": "3",
        "train.max_nfe": "170",
        "rounds.train_steps": "4",
        "rounds.prompts": "2",
        "rounds.keep": str(kept),
    }
    config = load_config(small_run(tmp_path, flux_folder), list(changes.items()))
    pipeline.run(config, tmp_path / "whole")
    real = stage.train_step
    for last in (2, 5, 6):

        def stop(one: Learner, step: int, last: int = last) -> dict[str, float]:
            if step > last:
                raise KeyboardInterrupt
            return real(one, step)

        monkeypatch.setattr(stage, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            pipeline.run(config, tmp_path / "cut")
    monkeypatch.setattr(stage, "train_step", real)
    pipeline.run(config, tmp_path / "cut")
    whole, cut = (results(tmp_path / name) for name in ("whole", "cut"))
    assert whole["summary"]["steps"] == 7  # the budget's, not max_train_steps
    assert cut == whole


def results(out: Path) -> dict[str, Any]:
    """All that comes out of a run but its times."""
    summary = json.loads((out / "summary.json").read_text())
    metrics = rows(out)
    for row in metrics:
        for figures in (row, row.get("validation", {})):
            for name in ("seconds", "images_per_second"):
                figures.pop(name, None)
    adapter = (out / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()
    del summary["seconds"], summary["digest"]  # of all of it
    return {"summary": summary, "metrics": metrics, "adapter": hashlib.sha256(adapter).hexdigest()}
