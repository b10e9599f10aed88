"""Training on a real, tiny FLUX and a store of made-up groups."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from run_files import rows, same, weights
from safetensors.torch import load_file
from toy_groups import SAMPLING, write_toy

from gdro.common.errors import UserError
from gdro.models import load_model
from gdro.models.base import FlowModel
from gdro.objectives.flow import implicit_reward
from gdro.objectives.forward.gdro import Gdro, gdro_weights
from gdro.stages import train as stage
from gdro.stages.train import train
from gdro.training.config import MAY_CHANGE, TrainConfig
from gdro.training.learner import Learner
from gdro.training.step import backward, train_step
from gdro.training.steps.forward import noised

KILLED_RUN = """
import json, sys
from pathlib import Path
import torch
from gdro.models import load_model
from gdro.stages.train import train
from gdro.training.config import MAY_CHANGE, TrainConfig
arguments = json.loads(sys.argv[1])
model = load_model(arguments["model"], device=torch.device("cpu"), dtype=torch.float32)
config = TrainConfig(**arguments["config"])
train(config, model, *map(Path, arguments["paths"]), seed=0, sampling=arguments["sampling"])
"""

SMALL: dict[str, Any] = {
    "k": 4,
    "rank": 4,
    "lora_alpha": 8,
    "max_train_steps": 6,
    "groups_per_step": 3,
    "learning_rate": 2e-3,
    "checkpointing_steps": 2,
    "checkpoints_total_limit": None,
    "validation_steps": 0,
}


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory, flux_folder: Path) -> tuple[Path, Path]:
    model = load_model(str(flux_folder), device=torch.device("cpu"), dtype=torch.float32)
    return write_toy(tmp_path_factory.mktemp("toy"), model)


def run(model: FlowModel, toy: tuple[Path, Path], out: Path, *, validate: Any = None, **changes: Any) -> None:
    train(TrainConfig(**(SMALL | changes)), model, *toy, out, seed=0, sampling=SAMPLING, validate=validate)


def learner(model: FlowModel, toy: tuple[Path, Path], **changes: Any) -> Learner:
    return stage.prepare(TrainConfig(**(SMALL | changes)), model, *toy, seed=0, sampling=SAMPLING)[0]


def test_the_first_step_costs_ln_k_factorial_and_every_figure_is_logged(
    flux: Any, toy: tuple[Path, Path], tmp_path: Path
) -> None:
    run(flux, toy, tmp_path, k=6, max_train_steps=2)
    first, second = rows(tmp_path)
    assert first["loss_rank"] == pytest.approx(math.log(math.factorial(6)), abs=1e-3)
    assert first["loss"] == pytest.approx(first["loss_rank"] + 0.5 * first["loss_top1"], rel=1e-6)
    assert first["entropy_p"] == pytest.approx(first["loss_rank"], rel=1e-5)
    assert first["entropy_p"] - first["entropy_q"] == pytest.approx(first["kl"], rel=1e-4)
    assert (first["drift_best"], first["drift_worst"], first["spread_s"]) == (0, 0, 0)
    assert second["drift_best"] != 0
    assert second["spread_s"] > 0
    figures = {"step", "loss", "loss_rank", "loss_top1", "entropy_p", "entropy_q", "kl", "spread_s", "drift_best"}
    figures |= {"drift_worst", "error_best", "grad_norm", "lr", "images_per_second", "seconds", "alarm"}
    figures |= {"round", "groups"}
    assert set(first) == set(second) == figures
    assert [row["step"] for row in (first, second)] == [1, 2]


@pytest.mark.parametrize("objective", ["rank", "top1"])
def test_other_objectives_start_where_they_must(
    flux: Any, toy: tuple[Path, Path], tmp_path: Path, objective: str
) -> None:
    run(flux, toy, tmp_path, objective=objective, max_train_steps=2)
    expected = math.log(4) if objective == "top1" else math.log(24)
    assert rows(tmp_path)[0]["loss_rank"] == pytest.approx(expected, abs=1e-3)


def test_accumulated_gradients_equal_one_big_batch(flux: Any, toy: tuple[Path, Path]) -> None:
    whole = learner(flux, toy)
    train_step(whole, 1)  # B = 0 before it, so that half of the gradient would be zero
    draws = whole.data.draws.at(2)
    gradients = []
    for size in (3, 2, 1):
        whole.optimizer.zero_grad()
        for first in range(0, 3, size):
            backward(whole, draws[first : first + size], 3)
        gradients.append(
            torch.cat([p.grad.flatten() for p in whole.policies.parameters.values() if p.grad is not None])
        )
    for gradient in gradients[1:]:
        assert (gradient - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_the_gradient_is_the_weighted_sum_of_error_gradients(flux: Any, toy: tuple[Path, Path]) -> None:
    """The whole path, model included: dL/dtheta = beta sum_j w_j grad d_j + gamma grad d_1."""
    one = learner(flux, toy, micro_batch_groups=1)
    train_step(one, 1)
    (draw, *_) = one.data.draws.at(2)
    backward(one, [draw], 1)
    expected = {name: p.grad.clone() for name, p in one.policies.parameters.items() if p.grad is not None}
    one.optimizer.zero_grad()
    batch = one.data.batches.of([draw])
    seen = noised(one.at(draw.group), batch, base=False, reference="base")
    beta, tau, gamma = 12.0, 0.05, 0.5
    assert one.objective == Gdro(beta, tau, gamma)
    s = implicit_reward(seen.d, seen.d_ref, beta)
    coefficients = beta * gdro_weights(s, batch.rewards, tau)
    coefficients[:, 0] += gamma
    (coefficients.float() * seen.d).sum().backward()
    for name, parameter in one.policies.parameters.items():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-6)


def test_equal_rewards_in_a_visit_add_nothing(flux: Any, flux_folder: Path, tmp_path: Path) -> None:
    """A random subset without spread has neither a ranking nor a best image: no gradient, and no share of the mean."""
    one_good = write_toy(tmp_path, flux, groups=3, rewards=[[0.0] * 7 + [1.0]] * 3)
    one = learner(flux, one_good, subset="random", k=2, groups_per_step=8)
    step = next(i for i in range(1, 99) if sorted(v.ranked for v in one.data.draws.at(i)) == [False] * 6 + [True] * 2)
    figures = train_step(one, step)
    assert figures["loss_rank"] == pytest.approx(math.log(2), abs=1e-5)
    flat = [draw for draw in one.data.draws.at(step) if not draw.ranked]
    backward(one, flat, 1)
    assert all(p.grad is None or not p.grad.any() for p in one.policies.parameters.values())


def test_a_first_step_without_a_ranking_is_no_alarm(flux: Any, flux_folder: Path, tmp_path: Path) -> None:
    one_good = write_toy(tmp_path, flux, groups=3, rewards=[[0.0] * 7 + [1.0]] * 3)
    changes: dict[str, Any] = {"subset": "random", "k": 2, "groups_per_step": 1, "max_train_steps": 6}
    assert not learner(flux, one_good, **changes).data.draws.at(1)[0].ranked
    run(flux, one_good, tmp_path, **changes)
    assert len(rows(tmp_path)) == 6


@pytest.mark.slow
def test_training_orders_the_group_by_its_rewards(flux: Any, flux_folder: Path, tmp_path: Path) -> None:
    """Overfitting three groups: the loss falls toward its floor, and the best image drifts below the worst."""
    toy = write_toy(tmp_path, flux, groups=3, images=4)
    run(flux, toy, tmp_path / "run", k=4, max_train_steps=60, tau=0.5, beta=50.0, gamma=0.0, learning_rate=5e-3)
    metrics = rows(tmp_path / "run")

    def mean(name: str, part: list[dict[str, Any]]) -> float:
        return sum(row[name] for row in part) / len(part)

    assert mean("loss_rank", metrics[-15:]) < metrics[0]["loss_rank"] - 0.1
    assert mean("kl", metrics[-15:]) < 0.7 * metrics[0]["kl"]
    assert mean("drift_best", metrics[-15:]) < mean("drift_worst", metrics[-15:])


@pytest.mark.parametrize(
    "options",
    [
        {"timestep_scope": "image", "noise_scope": "image"},
        {"timestep": "uniform", "subset": "extremes"},
        {"k": 8},
        {"memory_gigabytes": 0.0, "micro_batch_groups": 2, "target_modules": "attention"},
    ],
)
def test_options_train(flux: Any, toy: tuple[Path, Path], tmp_path: Path, options: dict[str, Any]) -> None:
    run(flux, toy, tmp_path, max_train_steps=2, **options)
    assert rows(tmp_path)[0]["loss_rank"] == pytest.approx(math.log(math.factorial(options.get("k", 4))), abs=1e-3)


@pytest.mark.slow
def test_resumed_runs_end_bit_for_bit_like_uninterrupted_ones(
    flux: Any, toy: tuple[Path, Path], tmp_path: Path
) -> None:
    run(flux, toy, tmp_path / "whole")
    for cut in (2, 3, 5):  # at a checkpoint and between two
        out = tmp_path / f"cut{cut}"
        with interrupted_after(cut):
            run(flux, toy, out)
        assert len(rows(out)) == cut
        run(flux, toy, out)
        assert same(weights(out, 6), weights(tmp_path / "whole", 6))
        for whole, resumed in zip(rows(tmp_path / "whole"), rows(out), strict=True):
            for name in whole.keys() - {"seconds", "images_per_second"}:
                assert resumed[name] == whole[name]
    before = rows(tmp_path / "whole")
    run(flux, toy, tmp_path / "whole")  # nothing left to do
    assert rows(tmp_path / "whole") == before
    run(flux, toy, tmp_path / "longer", max_train_steps=3)
    run(flux, toy, tmp_path / "longer")  # more steps than first asked for
    assert same(weights(tmp_path / "longer", 6), weights(tmp_path / "whole", 6))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"memory_gigabytes": 0.0},
        {"checkpointing_steps": 1, "checkpoints_total_limit": None},
    ],
)
def test_what_leaves_the_bits_as_they_are(
    flux: Any, toy: tuple[Path, Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    """The list in docs/running.md; stopping is tested here too, scoring's workers and batches in test_score.py."""
    assert {f"train.{name}" for name in change} <= MAY_CHANGE
    for out, changes in (("as it is", {}), ("changed", change)):
        run(flux, toy, tmp_path / out, **({"group_gradient": "one_pass"} | changes))
    assert same(weights(tmp_path / "changed", 6), weights(tmp_path / "as it is", 6))
    for one, other in zip(rows(tmp_path / "changed"), rows(tmp_path / "as it is"), strict=True):
        assert one["loss"] == other["loss"]


@contextmanager
def diverging_at(last: int) -> Iterator[None]:
    real = stage.train_step

    def diverge(one: Learner, step: int) -> dict[str, float]:
        if step == last:
            for weight in one.policies.parameters.values():
                weight.data.fill_(torch.inf)
        return real(one, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "train_step", diverge)
        yield


@contextmanager
def interrupted_after(steps: int) -> Iterator[None]:
    real = stage.train_step

    def stop(one: Learner, step: int) -> dict[str, float]:
        if step > steps:
            raise KeyboardInterrupt
        return real(one, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "train_step", stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.slow
def test_a_killed_run_ends_bit_for_bit_like_an_uninterrupted_one(
    flux: Any, flux_folder: Path, toy: tuple[Path, Path], tmp_path: Path
) -> None:
    changes = {"max_train_steps": 24, "checkpointing_steps": 3, "checkpoints_total_limit": 2}
    arguments = {
        "model": str(flux_folder),
        "config": SMALL | changes,
        "paths": [*map(str, toy), str(tmp_path / "killed")],
        "sampling": SAMPLING,
    }
    process = subprocess.Popen([sys.executable, "-c", KILLED_RUN, json.dumps(arguments)], stderr=subprocess.DEVNULL)
    metrics = tmp_path / "killed" / "metrics.jsonl"
    while process.poll() is None and (not metrics.exists() or metrics.read_bytes().count(b"\n") < 8):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert metrics.read_bytes().count(b"\n") < 24
    run(flux, toy, tmp_path / "killed", **changes)
    run(flux, toy, tmp_path / "whole", **changes)
    assert same(weights(tmp_path / "killed", 24), weights(tmp_path / "whole", 24))
    assert [row["loss"] for row in rows(tmp_path / "killed")] == [row["loss"] for row in rows(tmp_path / "whole")]


def test_validation_sees_the_average_and_keeps_the_best_checkpoint(
    flux: Any, toy: tuple[Path, Path], tmp_path: Path
) -> None:
    seen: dict[int, dict[str, torch.Tensor]] = {}
    scores = {0: 0.9, 2: 0.3, 4: 0.5, 6: 0.4, 7: 0.1}

    def validate(model: FlowModel, step: int) -> dict[str, float]:
        seen[step] = {name: p.detach().clone() for name, p in model.adapter().items()}
        return {"corrected": scores[step], "reward": 0.0}

    options = {"validation_steps": 2, "checkpointing_steps": 6, "max_train_steps": 7, "checkpoints_total_limit": 1}
    run(flux, toy, tmp_path / "run", validate=validate, **options)
    assert list(seen) == [0, 2, 4, 6, 7]
    validations = {row["step"]: row["validation"] for row in rows(tmp_path / "run") if "validation" in row}
    assert {step: row["corrected"] for step, row in validations.items()} == scores
    checkpoints = tmp_path / "run" / "checkpoints"
    best = json.loads((checkpoints / "best.json").read_text())
    assert (best["step"], best["corrected"]) == (4, 0.5)
    names = ["best.json", "step-000004", "step-000007", "stopped.json"]
    assert sorted(path.name for path in checkpoints.iterdir()) == names
    average = load_file(checkpoints / "step-000004" / "ema.safetensors")
    assert all(torch.equal(seen[4][name], average[name]) for name in average)

    run(flux, toy, tmp_path / "unvalidated", **(options | {"validation_steps": 0}))
    assert same(weights(tmp_path / "run", 7), weights(tmp_path / "unvalidated", 7))

    seen.clear()
    with interrupted_after(5):
        run(flux, toy, tmp_path / "cut", validate=validate, **options)
    run(flux, toy, tmp_path / "cut", validate=validate, **options)
    assert list(seen) == [0, 2, 4, 6, 7]
    assert json.loads((tmp_path / "cut" / "checkpoints" / "best.json").read_text()) == best
    assert same(weights(tmp_path / "cut", 7), weights(tmp_path / "run", 7))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 1e-3}, r"train\.learning_rate: 0\.001, but .*step-000006 was made with 0\.002"),
        ({"tau": 0.5}, r"train\.tau: 0\.5, but .* was made with 0\.05"),
        ({"max_train_steps": 3}, r"train\.max_train_steps: 3, but .*step-000006 is past it"),
        ({"resume_from_checkpoint": None}, r"train\.resume_from_checkpoint: null, but .* holds step-000006"),
    ],
)
def test_resuming_with_a_changed_configuration_is_refused(
    flux: Any, toy: tuple[Path, Path], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    run(flux, toy, tmp_path)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match=message):
        run(flux, toy, tmp_path, **change)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    run(flux, toy, tmp_path, checkpointing_steps=5, memory_gigabytes=0.0)


def test_resuming_with_other_rewards_or_seed_is_refused(flux: Any, toy: tuple[Path, Path], tmp_path: Path) -> None:
    run(flux, toy, tmp_path / "run", max_train_steps=2)
    other = write_toy(tmp_path, flux, rewards=[[0.1 * i for i in range(8)]] * 6)
    with pytest.raises(UserError, match=r"^rewards: .* was made with"):
        run(flux, other, tmp_path / "run")
    with pytest.raises(UserError, match=r"^seed: 1, but .* was made with 0"):
        train(TrainConfig(**SMALL), flux, *toy, tmp_path / "run", seed=1, sampling=SAMPLING)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("guidance_scale", 1.0, r"^sample\.guidance_scale: 1.0, but the groups in .* were made with 3.5"),
        ("max_sequence_length", 32, r"^sample\.max_sequence_length: 32, but the groups in .* were made with 16"),
        ("height", 64, r"^sample\.height, sample\.width: 64x64, but group g0 in .* is 64x32"),
        ("width", 32, r"^sample\.height, sample\.width: 32x32, but group g0 in .* is 64x32"),
    ],
)
def test_groups_made_otherwise_are_refused(
    flux: Any, toy: tuple[Path, Path], tmp_path: Path, field: str, value: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        train(TrainConfig(**SMALL), flux, *toy, tmp_path / "run", seed=0, sampling=SAMPLING | {field: value})
    assert not (tmp_path / "run").exists()


def test_too_large_k_is_refused(flux: Any, toy: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^train\.k: 9, but group g0 has 8 images; expected at most 8"):
        run(flux, toy, tmp_path / "run", k=9)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "bad",
    [
        *({"k": 1}, {"tau": 0.0}, {"tau": -0.1}, {"beta": 0.0}, {"gamma": -1.0}, {"learning_rate": 0.0}, {"rank": 0}),
        *({"max_train_steps": 0}, {"ema_decay": 1.0}, {"objective": "gddo"}, {"beta": float("nan")}, {"kk": 4}),
        *({"mix": 0.5}, {"objective": "sft", "beta": 1.0}, {"objective": "nft", "mix": 1.5}, {"objective": 3}),
    ],
)
def test_bad_values_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises((ValueError, UserError), match=list(bad)[-1]):
        TrainConfig(**bad)


def test_zero_tau_names_the_rank_objective() -> None:
    with pytest.raises(UserError, match="objective: rank"):
        TrainConfig(tau=0.0)


def test_a_diverging_run_stops_with_its_last_checkpoint(flux: Any, toy: tuple[Path, Path], tmp_path: Path) -> None:
    with (
        diverging_at(3),
        pytest.raises(
            UserError, match=r"^train\.learning_rate: 0\.002: the (loss|gradient norm) is (nan|inf) at step 3"
        ),
    ):
        run(flux, toy, tmp_path, checkpointing_steps=1, max_train_steps=20)
    last = max((tmp_path / "checkpoints").iterdir())
    assert all(torch.isfinite(tensor).all() for tensor in weights(tmp_path, int(last.name[5:])).values())
    assert len(rows(tmp_path)) == int(last.name[5:])


@pytest.mark.parametrize("state", ["always adapted", "never adapted"])
def test_a_reference_that_is_the_policy_is_noticed(
    flux: Any, toy: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    if state == "always adapted":
        monkeypatch.setattr(flux, "adapter_disabled", nullcontext)
    else:
        real = flux.velocity

        def unadapted(*args: Any, **options: Any) -> torch.Tensor:
            with flux.adapter_disabled():
                velocity = real(*args, **options)
            return velocity + 0 * sum(p.sum() for p in flux.adapter().values())

        monkeypatch.setattr(flux, "velocity", unadapted)
    with pytest.raises(RuntimeError, match="policy equals the reference"):
        run(flux, toy, tmp_path)
