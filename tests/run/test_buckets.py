"""Images of several sizes: each group is of one, no batch mixes them, and everything else is as with one size."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pictures import noise_image
from small_run import small_run
from toy_groups import SAMPLING, write_toy

from gdro.cli import main
from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.groups.importing import import_folder, read_metadata
from gdro.groups.sampling import batches, sample_groups
from gdro.groups.store import GroupStore
from gdro.models.flux import FluxModel
from gdro.samplers.settings import Generation
from gdro.stages.train import prepare
from gdro.training.config import TrainConfig
from gdro.training.draws import of_one_size
from gdro.training.learner import Learner
from gdro.training.micro_batch import choose_micro_batch
from gdro.training.step import backward, check_reference, train_step
from gdro.training.steps.forward import noised

SIZES = [(32, 64), (64, 32), (40, 48)]  # the first two have equally many tokens
GENERATION = Generation(
    images_per_prompt=3,
    num_inference_steps=2,
    max_sequence_length=24,
    height=32,
    width=64,
    buckets=[[64, 32], [40, 48]],
    batch_size=4,
    prompts_per_shard=4,
)
PROMPTS = [Prompt(f"p{i}", text) for i, text in enumerate(["a red wall", "two dots", "a blue sign", "end", "x", "y"])]
SMALL: dict[str, Any] = {"k": 4, "rank": 4, "lora_alpha": 8, "groups_per_step": 6, "learning_rate": 2e-3}
BUCKETS = SAMPLING | {"buckets": [[64, 32], [40, 48]]}


def test_batches_hold_every_image_once_and_one_size() -> None:
    """Sizes are split by (seed, group): neither order nor company changes a group's."""
    groups = [f"g{i}" for i in range(40)]
    found = batches(GENERATION, groups, 7)
    assert sorted(job for _, batch in found for job in batch) == [(p, i) for p in range(40) for i in range(3)]
    assert max(len(batch) for _, batch in found) == 4
    of_group: dict[str, set[tuple[int, int]]] = {}
    for size, batch in found:
        for place, _ in batch:
            of_group.setdefault(groups[place], set()).add(size)
    assert all(len(sizes) == 1 for sizes in of_group.values())
    counts = [sum({size} == sizes for sizes in of_group.values()) for size in SIZES]
    assert min(counts) >= 6
    assert {size for size, _ in batches(GENERATION, ["g5"], 7)} == of_group["g5"]
    assert batches(GENERATION, groups, 8) != found


def test_a_group_is_what_it_would_be_if_its_size_were_the_only_one(flux: FluxModel, tmp_path: Path) -> None:
    sample_groups(GENERATION, flux, PROMPTS, tmp_path / "mixed", seed=7)
    store = GroupStore(tmp_path / "mixed")
    assert store.group_ids == [prompt.id for prompt in PROMPTS]
    assert {store.image_size(group) for group in store.group_ids} == set(SIZES)
    for height, width in SIZES:
        alone = GENERATION.model_copy(update={"height": height, "width": width, "buckets": [], "batch_size": 2})
        sample_groups(alone, flux, PROMPTS, tmp_path / f"{height}", seed=7)
        single = GroupStore(tmp_path / f"{height}")
        for group in store.group_ids:
            if store.image_size(group) == (height, width):
                assert {image.size for image in store.images(group)} == {(width, height)}
                assert torch.allclose(store.latents(group), single.latents(group), atol=1e-4)


def learner(model: FluxModel, toy: tuple[Path, Path], **changes: Any) -> Learner:
    return prepare(TrainConfig(**(SMALL | changes)), model, *toy, seed=0, sampling=BUCKETS)[0]


@pytest.fixture
def toy(flux: FluxModel, tmp_path: Path) -> tuple[Path, Path]:
    return write_toy(tmp_path, flux, sizes=SIZES)


def test_a_step_sees_every_group_at_its_own_size(flux: FluxModel, toy: tuple[Path, Path]) -> None:
    """Its gradient is the sum over the groups, each by itself at its size, whatever goes through the model at once."""
    one = learner(flux, toy)
    train_step(one, 1)  # B = 0 before it, so that half of the gradient would be zero
    draws = one.data.draws.at(2)
    assert {one.data.batches.groups.image_size(draw.group) for draw in draws} == set(SIZES)

    def gradient(step: Callable[[], Any]) -> torch.Tensor:
        one.optimizer.zero_grad()
        step()
        return torch.cat([p.grad.flatten() for p in one.policies.parameters.values() if p.grad is not None])

    def singly() -> None:
        for draw in draws:
            height, width = one.data.batches.groups.image_size(draw.group)
            sized = replace(one, policies=one.policies.at(height, width))
            seen = noised(sized, one.data.batches.of([draw]), base=False, reference="base")
            (one.objective.loss(seen)[0].sum() / len(draws)).backward()

    def together(most: int) -> None:
        for some in of_one_size(draws, one.data.batches.groups, most):
            backward(one, some, len(draws))

    expected = gradient(singly)
    for most in (1, 2, 6):
        assert (gradient(lambda most=most: together(most)) - expected).norm() < 1e-5 * expected.norm()
    figures = train_step(one, 2)
    assert figures["groups"] == 6
    check_reference(one, 2, figures)


def test_memory_is_measured_on_the_largest_images(
    flux: FluxModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy = write_toy(tmp_path, flux, sizes=[(64, 32), (40, 48), (40, 56)])
    sampling = SAMPLING | {"height": 64, "width": 32, "buckets": [[40, 48], [40, 56]]}
    one = prepare(TrainConfig(**SMALL), flux, *toy, seed=0, sampling=sampling)[0]
    seen, velocity = [], flux.velocity
    monkeypatch.setattr(flux, "velocity", lambda *args, **how: seen.append(how) or velocity(*args, **how))
    choose_micro_batch(one)
    assert [(how["height"], how["width"]) for how in seen] == [(40, 56)]


def test_what_does_not_fit_is_refused_in_one_line(flux: FluxModel, toy: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sample\.width: 64x32, 48x40, but group g1 in .* is 32x64; training must"):
        prepare(TrainConfig(**SMALL), flux, *toy, seed=0, sampling=SAMPLING | {"buckets": [[40, 48]]})
    off = GENERATION.model_copy(update={"buckets": [[36, 64]]})
    with pytest.raises(UserError, match="height: 36 does not fit the model's grid"):
        sample_groups(off, flux, PROMPTS, tmp_path / "off", seed=7)
    assert not (tmp_path / "off").exists()


def test_imported_groups_may_differ_in_size(flux: FluxModel, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    rows = []
    for i, (height, width) in enumerate([(32, 64), (64, 32)] * 2):
        noise_image(width, height, i).save(source / f"{i}.png")
        rows.append({"file_name": f"{i}.png", "prompt": "a", "reward": i, "group": f"g{i % 2}"})
    (source / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    members = read_metadata(source)
    import_folder(members, flux, tmp_path / "groups", tmp_path / "rewards", guidance_scale=3.5, max_sequence_length=16)
    store = GroupStore(tmp_path / "groups")
    assert [store.image_size(group) for group in ("g0", "g1")] == [(32, 64), (64, 32)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    [
        {},
        {
            "train.objective": "flow_grpo",
            "sample.sampler": "flow_grpo",
            "sample.num_inference_steps": "3",
            "rounds.train_steps": "2",
        },
    ],
)
def test_a_whole_run_of_several_sizes(flux_folder: Path, tmp_path: Path, method: dict[str, str], monkeypatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    config, out = small_run(tmp_path, flux_folder), tmp_path / "run"
    options = {"sample.buckets": "[[64, 32]]", "train.groups_per_step": "4", "train.k": "4", **method}
    flags = [text for name, value in options.items() for text in (f"--{name}", value)]
    assert main(["run", str(config), "--out", str(out), *flags]) == 0
    store = GroupStore(out / "groups")
    sizes = {group: store.image_size(group) for group in store.group_ids}
    assert set(sizes.values()) == {(32, 64), (64, 32)}
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(row["loss"]) for row in rows if "loss" in row)
    assert (out / "report.html").exists()
