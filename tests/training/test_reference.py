"""The reference's errors on a pool of draws: those that the reference itself gives, asked for once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_files import rows, same, weights
from toy_groups import SAMPLING, write_toy

from gdro.errors import UserError
from gdro.groups.store import GroupStore
from gdro.models.base import FlowModel
from gdro.stages import train as stage
from gdro.stages.train import prepare, train
from gdro.training.config import TrainConfig
from gdro.training.step import Learner, backward, noised, train_step

SMALL: dict[str, Any] = {"k": 3, "rank": 4, "groups_per_step": 2, "learning_rate": 2e-3, "reference_draws": 2}


@pytest.fixture
def toy(tmp_path: Path, flux: Any) -> tuple[Path, Path]:
    return write_toy(tmp_path / "toy", flux, groups=3, images=4)


def learner(model: FlowModel, toy: tuple[Path, Path], seed: int = 0, **changes: Any) -> Learner:
    return prepare(TrainConfig(**(SMALL | changes)), model, *toy, seed=seed, sampling=SAMPLING)[0]


def files(toy: tuple[Path, Path]) -> list[Path]:
    return sorted(toy[0].glob("_reference-*.npy"))


@pytest.mark.parametrize("scope", ["group", "image"])
def test_an_image_meets_the_draws_of_its_pool_whoever_it_is_seen_with(
    flux: Any, toy: tuple[Path, Path], scope: str
) -> None:
    seen: dict[tuple[str, int, int], tuple[float, torch.Tensor]] = {}
    for k in (2, 3):
        one = learner(flux, toy, k=k, timestep_scope=scope, noise_scope=scope)
        for step in range(1, 40):
            visits = one.visits.at(step)
            batch = one.batches.of(visits)
            assert batch.eps.shape[1] == (k if scope == "image" else 1)
            eps = batch.eps.expand(-1, k, -1, -1)
            for i, visit in enumerate(visits):
                for j, image in enumerate(visit.images.tolist()):
                    drawn = float(batch.t[i, j]), eps[i, j]
                    t, noise = seen.setdefault((visit.group, image, one.batches.draw(visit)), drawn)
                    assert t == drawn[0]
                    assert torch.equal(noise, drawn[1])
    assert len(seen) == 3 * 4 * 2  # all groups, images and draws
    assert len({t for t, _ in seen.values()}) == (24 if scope == "image" else 6)


@pytest.mark.parametrize("objective", ["gdro", "dgpo"])
def test_the_kept_errors_are_the_references_own(flux: Any, toy: tuple[Path, Path], objective: str) -> None:
    one = learner(flux, toy, objective=objective)
    for step in (1, 2, 3):
        train_step(one, step)
    visits = one.visits.at(4)

    def gradient() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        one.optimizer.zero_grad()
        figures = backward(one, visits, 2)
        return torch.cat([p.grad.flatten() for p in one.parameters.values() if p.grad is not None]), figures

    kept, figures = gradient()
    assert one.reference_errors is not None
    errors = one.reference_errors.of(visits, [one.batches.draw(visit) for visit in visits])
    asked = noised(one.at(visits[0].group), one.batches.of(visits), base=False, reference="base").d_ref
    torch.testing.assert_close(errors, asked, rtol=1e-6, atol=0)
    one.reference_errors = None  # the same draws, the reference asked
    live, expected = gradient()
    assert (kept - live).norm() < 1e-4 * live.norm()
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(figures[name], value, rtol=1e-4, atol=1e-5)


def test_each_error_is_computed_once(flux: Any, toy: tuple[Path, Path]) -> None:
    def cost(one: Learner, step: int) -> int:
        before = flux.evaluations
        train_step(one, step)
        return int(flux.evaluations - before)

    one = learner(flux, toy)
    costs = [cost(one, step) for step in range(1, 40)]
    assert costs[0] == 2 * 3 * (1 + 3)
    assert costs[-1] == 2 * 3 * 3
    assert sum(costs) == 39 * 18 + 3 * 4 * 2
    assert not np.isnan(np.load(files(toy)[0])).any()
    assert cost(learner(flux, toy), 1) == 18  # another run on the same groups


def test_a_hole_in_the_file_is_filled_with_the_same_values(flux: Any, toy: tuple[Path, Path]) -> None:
    first = learner(flux, toy)
    for step in range(1, 40):
        train_step(first, step)
    (path,) = files(toy)
    whole = np.load(path)
    holes = whole.copy()
    holes[::2, 1] = np.nan
    np.save(path, holes)
    again = learner(flux, toy)
    for step in range(1, 40):
        train_step(again, step)
    np.testing.assert_allclose(np.load(path), whole, rtol=1e-5)


def test_what_the_errors_depend_on_has_a_file_of_its_own(flux: Any, toy: tuple[Path, Path]) -> None:
    changes = [{}, {"seed": 1}, {"reference_draws": 3}, {"timestep": "uniform"}, {"noise_scope": "image"}]
    for count, change in enumerate([*changes, {"logit_mean": 0.5}], 1):
        learner(flux, toy, **change)
        assert len(files(toy)) == count
    for same_errors in ({"k": 2}, {"beta": 3.0}, {"rank": 2}, {"objective": "dgpo"}):
        learner(flux, toy, **same_errors)
        assert len(files(toy)) == 6
    flux.transformer.bfloat16()
    learner(flux, toy)
    assert len(files(toy)) == 7


def test_a_damaged_file_is_refused(flux: Any, toy: tuple[Path, Path]) -> None:
    learner(flux, toy)
    (path,) = files(toy)
    data = path.read_bytes()
    for damage in (b"", data[:40], data[:-4]):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=rf"^{path} is damaged .*; delete it to compute it again$"):
            learner(flux, toy)
    np.save(path, np.zeros((2, 2), np.float32))
    with pytest.raises(UserError, match=r"holds float32 of \(2, 2\), expected float32 of \(12, 2\); delete it"):
        learner(flux, toy)
    path.unlink()
    learner(flux, toy)
    assert len(GroupStore(toy[0]).group_ids) == 3  # the store is none the wiser


def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    flux: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrainConfig(**SMALL, max_train_steps=8, checkpointing_steps=3, validation_steps=0)

    def run(name: str) -> None:
        groups = tmp_path / name / "toy"
        made = (groups / "groups", groups / "rewards" / "toy.parquet")
        if not groups.exists():
            write_toy(groups, flux, groups=3, images=4)
        train(config, flux, *made, tmp_path / name, seed=0, sampling=SAMPLING)

    run("whole")
    real = stage.train_step

    def stop(one: Learner, step: int) -> dict[str, float]:
        if step > 5:
            raise KeyboardInterrupt
        return real(one, step)

    monkeypatch.setattr(stage, "train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        run("cut")
    monkeypatch.setattr(stage, "train_step", real)
    run("cut")
    assert same(weights(tmp_path / "cut", 8), weights(tmp_path / "whole", 8))
    assert [row["loss"] for row in rows(tmp_path / "cut")] == [row["loss"] for row in rows(tmp_path / "whole")]
