"""Rounds: sample -> score -> train again and again, by every objective, on a very small real model."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from run_files import rows, same, weights
from safetensors.torch import load_file
from small_run import small_run

from gdro.common.errors import UserError
from gdro.groups.store import GroupStore
from gdro.objectives.registry import OBJECTIVES
from gdro.runner import pipeline
from gdro.runner.config import RunConfig, validate
from gdro.runner.pipeline import Run, run
from gdro.stages import train as stage
from gdro.stages.train import Round, prepare
from gdro.training.learner import MicroBatch
from gdro.training.step import backward
from gdro.training.steps.trajectory import transition

pytestmark = pytest.mark.slow

LOOP = pipeline.ROUND
TRAJECTORY = {"flow_grpo": "flow_grpo", "grpo_guard": "flow_grpo", "dance_grpo": "dance_grpo", "ddpo": "flow_cps"}


@pytest.fixture
def base(tmp_path: Path, flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The small run's configuration, its reward importable."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    data: dict[str, Any] = yaml.safe_load(small_run(tmp_path, flux_folder).read_text())
    data["train"] |= {"validation_steps": 0, "validation_prompts": None, "learning_rate": 2e-3}
    return data


def changed(base: dict[str, Any], **sections: dict[str, Any]) -> RunConfig:
    return validate(base | {name: base.get(name, {}) | fields for name, fields in sections.items()})


def online(base: dict[str, Any], objective: str = "gdro", **train: Any) -> RunConfig:
    """Three rounds of two steps on two prompts each."""
    sample: dict[str, Any] = {"num_inference_steps": 3}
    if objective in TRAJECTORY:
        sample["sampler"] = TRAJECTORY[objective]
    fixed = {"k": 2} if objective == "dpo" else {}
    return changed(
        base,
        sample=sample,
        train={"objective": objective, "max_train_steps": 6} | fixed | train,
        rounds={"train_steps": 2, "prompts": 2},
    )


def test_rounds_refresh_the_groups_and_keep_the_old_ones(base: dict[str, Any], tmp_path: Path) -> None:
    config, out = online(base), tmp_path / "run"
    run(config, out, LOOP)
    stores = [GroupStore(folder / "groups") for folder in (out, out / "rounds/0001", out / "rounds/0002")]
    assert len({store.settings["revision"] for store in stores}) == 3
    assert not (out / "rounds/0003").exists()
    job = Run(config, out)
    first, second = ({p.id for p in job.due(i)} for i in (0, 1))
    assert first | second == {"train0", "train1", "train2", "train3"}  # an epoch
    assert set(stores[0].group_ids) == first
    assert set(stores[1].group_ids) == {f"{prompt}@1" for prompt in second}
    assert [row["round"] for row in rows(out)] == [0, 0, 1, 1, 2, 2]
    assert json.loads((out / "checkpoints/stopped.json").read_text())["reason"] == "max_train_steps"


def test_model_evaluations_are_counted(base: dict[str, Any], tmp_path: Path) -> None:
    config = online(base, "flow_grpo", validation_steps=2, validation_prompts=str(tmp_path / "validation.jsonl"))
    run(config, tmp_path / "run", LOOP)
    costs = [row["validation"]["nfe"] for row in rows(tmp_path / "run") if "validation" in row]
    # a round: 2 prompts x 4 images x 3 steps; a step: 2 groups x 3 images x 2 transitions x (1 base + 3 policy)
    assert costs == [{"sample": 24, "train": 0}] + [{"sample": 24 * i, "train": 96 * i} for i in (1, 2, 3)]
    seconds = [row["validation"]["seconds"] for row in rows(tmp_path / "run") if "validation" in row]
    assert all(set(one) == set(LOOP) for one in seconds)
    assert seconds[-1]["train"] > seconds[1]["train"] > 0


@contextmanager
def interrupted(stage: str, call: int) -> Iterator[None]:
    """Ctrl-C in the `call`-th call of a stage's function, before it does anything."""
    name, calls = "sample_groups" if stage == "sample" else stage, 0
    real = getattr(pipeline, name)

    def stop(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return real(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, name, stop)
        with pytest.raises(KeyboardInterrupt):
            yield


@pytest.mark.parametrize(
    ("objective", "interruptions"),
    [("flow_grpo", [("sample", 2), ("score", 2), ("train", 1)]), ("nft", [("train", 2), ("sample", 2), ("score", 1)])],
)
def test_a_run_resumed_inside_any_round_ends_with_the_same_bits(
    base: dict[str, Any], tmp_path: Path, objective: str, interruptions: list[tuple[str, int]]
) -> None:
    """Each stage is interrupted in the second or third round; a resumed run begins with the round it stopped in."""
    config = online(base, objective, checkpoints_total_limit=1)
    run(config, tmp_path / "whole", LOOP)
    out = tmp_path / "stopped"
    for name, call in interruptions:
        with interrupted(name, call):
            run(config, out, LOOP)
    run(config, out, LOOP)
    assert same(weights(out, 6), weights(tmp_path / "whole", 6))
    for one, other in zip(rows(out), rows(tmp_path / "whole"), strict=True):
        assert all(one[key] == other[key] for key in one.keys() - {"seconds", "images_per_second"})
    before = (tmp_path / "whole/metrics.jsonl").read_bytes()
    run(config, tmp_path / "whole", LOOP)  # nothing left to do
    assert (tmp_path / "whole/metrics.jsonl").read_bytes() == before


def test_a_step_killed_inside_a_round_is_resumed(base: dict[str, Any], tmp_path: Path) -> None:
    config = online(base, "flow_grpo", checkpointing_steps=1, checkpoints_total_limit=1)
    run(config, tmp_path / "whole", LOOP)
    real = stage.train_step
    for cut in (3, 4):

        def stop(learner: Any, step: int, cut: int = cut) -> dict[str, float]:
            if step > cut:
                raise KeyboardInterrupt
            return real(learner, step)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(stage, "train_step", stop)
            with pytest.raises(KeyboardInterrupt):
                run(config, tmp_path / f"cut{cut}", LOOP)
        run(config, tmp_path / f"cut{cut}", LOOP)
        assert same(weights(tmp_path / f"cut{cut}", 6), weights(tmp_path / "whole", 6))


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_learns_in_rounds(base: dict[str, Any], tmp_path: Path, objective: str) -> None:
    run(online(base, objective, max_train_steps=4), tmp_path / "run", LOOP)
    steps = rows(tmp_path / "run")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    assert all(row["grad_norm"] > 0 for row in steps)
    for row in steps if objective in TRAJECTORY else []:
        assert (row["ratio"] == pytest.approx(1, abs=1e-7)) == (row["step"] in (1, 3))  # nothing learned since sampling


def test_stored_log_probabilities_are_the_samplers_own(base: dict[str, Any], tmp_path: Path) -> None:
    """Recomputed in training's batches, the first step's ratios are 1 to rounding, in a later round too."""
    config = online(base, "flow_grpo")
    run(config, tmp_path / "run", LOOP)
    job = Run(config, tmp_path / "run")
    place = Round(number=2, done=4, last=6)
    folder = tmp_path / "run/rounds/0002"
    rewards = next((folder / "rewards").glob("*.parquet"))
    learner, _ = prepare(
        config.train, job.model, folder / "groups", rewards, seed=0, sampling=job.sampling, round=place
    )
    learner.policies.model.load_adapter_state(load_file(tmp_path / "run/checkpoints/step-000004/adapter.safetensors"))
    draws = learner.data.draws.at(5)
    sized = learner.at(draws[0].group)
    _, batches = learner.data.transitions.of(draws)
    for batch in batches:
        seen = transition(sized, batch, fresh=False)
        torch.testing.assert_close(seen.log_prob, seen.old_log_prob, rtol=0, atol=1e-5)
        fresh = transition(sized, batch, fresh=True)
        assert torch.equal(fresh.log_prob, fresh.old_log_prob)

    def gradient(images: int | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        learner.micro_batch = MicroBatch(2, images)
        learner.optimizer.zero_grad()
        figures = backward(learner, draws, 2)
        return torch.cat(
            [p.grad.flatten() for p in learner.policies.parameters.values() if p.grad is not None]
        ), figures

    whole, figures = gradient(None)
    alone, same_figures = gradient(1)  # no image's loss depends on another's velocity
    assert (alone - whole).norm() < 1e-4 * whole.norm()
    for name, value in figures.items():
        torch.testing.assert_close(same_figures[name], value, rtol=1e-4, atol=1e-6)


def test_kept_rounds_are_trained_on_too(base: dict[str, Any], tmp_path: Path) -> None:
    config = changed(
        base, train={"max_train_steps": 8}, rounds={"train_steps": 2, "prompts": 2, "keep": 2, "behavior_policy": "ema"}
    )
    run(config, tmp_path / "run", LOOP)
    job = Run(config, tmp_path / "run")
    assert [len(job.place(i).kept) for i in range(4)] == [0, 1, 1, 1]
    folders = [tmp_path / "run" / name for name in ("rounds/0002", "rounds/0003")]
    (old, _), (groups, rewards) = [(f / "groups", next((f / "rewards").glob("*.parquet"))) for f in folders]
    place = job.place(3)
    assert [folder for folder, _ in place.kept] == [old]
    learner, _ = prepare(config.train, job.model, groups, rewards, seed=0, sampling=job.sampling, round=place)
    assert {v.group.partition("@")[2] for step in (7, 8) for v in learner.data.draws.at(step)} == {"2", "3"}


def test_trajectories_of_old_rounds_are_not_kept(base: dict[str, Any], tmp_path: Path) -> None:
    run(online(base, "flow_grpo"), tmp_path / "run", LOOP)
    there = [GroupStore(tmp_path / "run" / name).has_trajectories for name in ("groups", "rounds/0001/groups")]
    assert there == [False, False]
    assert GroupStore(tmp_path / "run/rounds/0002/groups").has_trajectories


def test_a_round_without_a_ranking_teaches_nothing(base: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "flat.py").write_text("def flat(images, prompts):\n    return [0.5] * len(images)\n")
    config = changed(
        base, score={"reward": "flat:flat"}, train={"max_train_steps": 2}, rounds={"train_steps": 1, "prompts": 2}
    )
    run(config, tmp_path / "run", LOOP)
    assert [row["groups"] for row in rows(tmp_path / "run")] == [0, 0]


def test_training_stops_at_its_target_or_budget_and_goes_on_from_there(base: dict[str, Any], tmp_path: Path) -> None:
    held_out = {"validation_steps": 2, "validation_prompts": str(tmp_path / "validation.jsonl")}
    run(online(base, **held_out), tmp_path / "whole", LOOP)
    reached = [row["validation"]["reward"] for row in rows(tmp_path / "whole") if "validation" in row]
    target = min(reached[1:])
    out = tmp_path / "target"
    run(online(base, **held_out, target_reward=target), out, LOOP)
    stopped = json.loads((out / "checkpoints/stopped.json").read_text())
    assert (stopped["reason"], stopped["step"]) == (
        "target_reward",
        2 * (1 + next(i for i, reward in enumerate(reached[1:]) if reward >= target)),
    )
    run(online(base, **held_out), out, LOOP)  # the target taken away
    assert same(weights(out, 6), weights(tmp_path / "whole", 6))

    out = tmp_path / "budget"
    run(online(base, **held_out, max_nfe=100), out, LOOP)
    stopped = json.loads((out / "checkpoints/stopped.json").read_text())
    # a round samples 2 x 4 x 3 and a step is 2 groups x 3 images x 4: 24 + 24, + 24, + 24 + 24
    assert (stopped["reason"], stopped["step"]) == ("max_nfe", 3)
    assert "validation" in rows(out)[-1]
    run(online(base, **held_out), out, LOOP)
    assert same(weights(out, 6), weights(tmp_path / "whole", 6))


def test_a_round_that_the_budget_cannot_pay_is_not_begun(base: dict[str, Any], tmp_path: Path) -> None:
    """After two steps 72 are spent; sampling the second round would make it 96."""
    held_out = {"validation_steps": 100, "validation_prompts": str(tmp_path / "validation.jsonl")}
    out = tmp_path / "run"
    run(online(base, **held_out, max_nfe=90), out, LOOP)
    stopped = json.loads((out / "checkpoints/stopped.json").read_text())
    assert (stopped["reason"], stopped["step"]) == ("max_nfe", 2)
    assert rows(out)[-1]["validation"]["nfe"] == {"sample": 24, "train": 48}
    assert not (out / "rounds").exists()
    run(online(base, **held_out, max_nfe=80), out, LOOP)  # a lower limit: nothing is done, and it is over
    assert not (out / "rounds").exists()
    assert json.loads((out / "checkpoints/stopped.json").read_text())["max_nfe"] == 80


def test_a_round_sampled_by_other_weights_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(online(base), out, LOOP)
    shutil.rmtree(out / "checkpoints")
    with pytest.raises(UserError, match=r"fingerprint: .*rounds/0001/groups was sampled with"):
        run(online(base, learning_rate=1e-3), out, LOOP)


def test_a_run_gone_back_to_an_earlier_checkpoint_samples_its_trajectories_again(
    base: dict[str, Any], tmp_path: Path
) -> None:
    config, out = online(base, "flow_grpo", checkpoints_total_limit=None), tmp_path / "run"
    run(config, out, LOOP)
    last = weights(out, 6)
    for step in (4, 6):
        shutil.rmtree(out / f"checkpoints/step-{step:06d}")
    run(config, out, LOOP)
    assert same(weights(out, 6), last)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        (
            {"train": {"objective": "flow_grpo"}},
            'train.objective is "flow_grpo".*sample.sampler is "ode"; expected flow',
        ),
        ({"train": {"objective": "flow_grop"}}, 'train.objective: "flow_grop" .*did you mean "flow_grpo"'),
        ({"train": {"objective": "dpo"}}, 'train.k is 3; expected 2 for objective "dpo"'),
        ({"train": {"mix": 0.5}}, 'train.mix is 0.5, which objective "gdro" does not have'),
        ({"train": {"timestep_fraction": 0.5}}, "train.timestep_fraction is 0.5; expected 1"),
        (
            {"train": {"timestep": "uniform", "logit_std": 0.5}},
            'train.logit_std is 0.5, but train.timestep is "uniform"; expected logit_normal, or 1.0',
        ),
        ({"train": {"target_reward": 0.5}}, "train.target_reward is 0.5, but there is no validation"),
        ({"rounds": {"train_steps": 0}}, "rounds.train_steps is 0; expected"),
        ({"rounds": {"train_steps": 2, "prompts": 0}}, "rounds.prompts is 0; expected"),
        ({"rounds": {"prompts": 2}}, "rounds.prompts is 2, but rounds.train_steps is null"),
        (
            {"sample": {"sampler": "flow_grpo", "num_inference_steps": 4, "window": "fixed", "window_size": 4}},
            "sample.window_size is 4; expected an integer from 1 to 3",
        ),
        ({"sample": {"window": "sliding"}}, "sample.window"),
        (
            {"train": {"objective": "ddpo", "timestep": "uniform"}, "sample": {"sampler": "flow_cps"}},
            'train.timestep is "uniform"; expected "logit_normal" for objective "ddpo"',
        ),
        (
            {
                "train": {"objective": "flow_grpo"},
                "sample": {"sampler": "flow_grpo"},
                "rounds": {"train_steps": 1, "keep": 2},
            },
            'rounds.keep is 2; expected 1 for objective "flow_grpo"',
        ),
        (
            {"rounds": {"train_steps": 2}, "train": {"resume_from_checkpoint": "somewhere"}},
            'train.resume_from_checkpoint is "somewhere"; expected latest',
        ),
        (
            {"sample": {"sampler": "flow_grpo", "num_inference_steps": 4, "window": "random", "window_size": 1}},
            'sample.window is "random", but rounds.train_steps is null',
        ),
    ],
)
def test_impossible_configurations_are_refused(
    base: dict[str, Any], sections: dict[str, dict[str, Any]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        changed(base, **sections)


def test_more_prompts_a_round_than_there_are_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    config = changed(base, rounds={"train_steps": 2, "prompts": 5})
    with pytest.raises(UserError, match=r"rounds\.prompts is 5; expected at most the 4 of sample.prompts"):
        run(config, tmp_path / "run", LOOP)


def test_a_store_without_trajectories_is_refused(base: dict[str, Any], tmp_path: Path) -> None:
    """Sampled by the ODE and then trained on by a trajectory objective: told before training."""
    out = tmp_path / "run"
    run(changed(base), out, ("sample", "score"))
    for name in (".config.yaml", "config.yaml"):
        (out / name).unlink()
    config = changed(base, sample={"sampler": "flow_grpo"}, train={"objective": "flow_grpo"})
    with pytest.raises(UserError, match="holds no trajectories"):
        run(config, out, ("train",))
