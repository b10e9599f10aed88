import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_groups import write_toy

from gdro.common.errors import UserError
from gdro.groups.store import GroupStore
from gdro.training.batches import Batches
from gdro.training.draws import GroupDraws, split

REWARDS = {
    "distinct": torch.arange(16) / 16,
    "one good": torch.tensor([0.0] * 15 + [1.0]),
    "one bad": torch.tensor([1.0] * 15 + [0.0]),
    "strict": torch.tensor([0.0, 1.0] * 8),
}


def draws(rewards: dict[str, torch.Tensor] = REWARDS, **changes: Any) -> GroupDraws:
    options: dict[str, Any] = {"k": 6, "subset": "spread", "groups_per_step": 3, "seed": 0}
    return GroupDraws(rewards, **(options | changes))


@pytest.mark.parametrize(("count", "processes"), [(4, 1), (4, 2), (4, 4), (3, 2), (1, 4)])
def test_visits_are_dealt_once_and_as_many_to_each_process(count: int, processes: int) -> None:
    step = draws(groups_per_step=count).at(1)
    shares = [split(step, process, processes) for process in range(processes)]
    assert {len(share) for share in shares} == {math.ceil(count / processes)}
    assert sorted(draw.slot for share in shares for draw in share if draw.ranked) == list(range(count))


@pytest.mark.parametrize("subset", ["spread", "random", "extremes"])
def test_visits_are_k_different_images_best_first(subset: str) -> None:
    for step in range(1, 60):
        for draw in draws(subset=subset).at(step):
            assert len(set(draw.images.tolist())) == 6
            assert torch.equal(draw.rewards, REWARDS[draw.group].double()[draw.images])
            assert (draw.rewards.diff() <= 0).all()


@pytest.mark.parametrize("k", [2, 6, 15, 16])
@pytest.mark.parametrize("subset", ["spread", "extremes"])
def test_spread_and_extremes_always_carry_a_ranking(k: int, subset: str) -> None:
    assert all(draw.ranked for step in range(1, 60) for draw in draws(k=k, subset=subset).at(step))


def test_random_subsets_may_carry_no_ranking() -> None:
    seen = [
        v.ranked for step in range(1, 60) for v in draws({"one good": REWARDS["one good"]}, subset="random").at(step)
    ]
    assert 0.25 < sum(seen) / len(seen) < 0.5  # 6 / 16


def test_spread_takes_one_image_of_each_slice_of_the_ranking() -> None:
    group = {"distinct": REWARDS["distinct"]}
    counts: Counter[int] = Counter()
    for step in range(1, 300):
        for draw in draws(group, k=4).at(step):
            ranks = 15 - draw.images  # rewards rise with the index
            assert (ranks // 4).tolist() == [0, 1, 2, 3]
            counts.update(draw.images.tolist())
    assert min(counts[i] for i in range(16)) > 160  # 224 expected each


def test_extremes_are_the_best_and_the_worst() -> None:
    (draw, *_) = draws({"distinct": REWARDS["distinct"]}, k=5, subset="extremes").at(1)
    assert draw.images.tolist() == [15, 14, 13, 1, 0]


def test_k_equal_to_the_group_takes_all_of_it() -> None:
    for subset in ("spread", "random", "extremes"):
        (draw, *_) = draws({"distinct": REWARDS["distinct"]}, k=16, subset=subset).at(1)
        assert draw.images.tolist() == list(range(15, -1, -1))


def test_ties_are_broken_anew_at_each_visit() -> None:
    best = {int(v.images[0]) for step in range(1, 40) for v in draws({"strict": REWARDS["strict"]}, k=16).at(step)}
    assert best == set(range(1, 16, 2))


def test_an_epoch_visits_every_group_once() -> None:
    shown = draws()
    order = [draw.group for step in range(1, 9) for draw in shown.at(step)]  # 24 draws = 6 epochs of 4 groups
    epochs = [order[i : i + 4] for i in range(0, 24, 4)]
    assert all(sorted(epoch) == sorted(REWARDS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_draws_depend_on_seed_and_step_alone() -> None:
    forward, backward = draws(), draws()
    steps = [[(v.group, v.images.tolist()) for v in forward.at(step)] for step in range(1, 9)]
    again = [[(v.group, v.images.tolist()) for v in backward.at(step)] for step in range(8, 0, -1)]
    assert steps == again[::-1]
    assert steps != [[(v.group, v.images.tolist()) for v in draws(seed=1).at(step)] for step in range(1, 9)]


def test_images_without_a_score_are_never_drawn() -> None:
    rewards = {"a": torch.tensor([0.1, math.nan, 0.3, 0.2, math.nan, 0.4])}
    for subset in ("spread", "random", "extremes"):
        shown = GroupDraws(rewards, k=3, subset=subset, groups_per_step=1, seed=0)
        drawn = [draw for step in range(1, 40) for draw in shown.at(step)]
        expected = {0, 2, 5} if subset == "extremes" else {0, 2, 3, 5}
        assert {int(i) for draw in drawn for i in draw.images} == expected
        for draw in drawn:
            torch.testing.assert_close(draw.rewards, rewards["a"][draw.images].double())


def test_groups_that_teach_nothing_are_left_out_by_reason() -> None:
    rewards = {
        "good": torch.tensor([0.0, 0.5, 1.0]),
        "few": torch.tensor([0.0, math.nan, 1.0]),
        "close": torch.tensor([0.50, 0.51, 0.52]),
        "solved": torch.tensor([0.8, 0.9, 1.0]),
    }
    shown = GroupDraws(rewards, k=3, subset="spread", groups_per_step=1, seed=0, min_spread=0.05, max_mean=0.85)
    assert list(shown.rewards) == ["good"]
    assert shown.excluded == {
        "too few scores": 1,
        "spread below train.min_spread": 1,
        "mean above train.max_mean": 1,
    }


def test_groups_without_spread_are_left_out_and_counted() -> None:
    shown = draws(REWARDS | {"flat": torch.ones(16), "flat too": torch.zeros(16)})
    assert shown.excluded == {"all rewards equal": 2}
    assert "flat" not in {draw.group for step in range(1, 20) for draw in shown.at(step)}


def test_bad_groups_are_refused() -> None:
    with pytest.raises(UserError, match=r"train\.k: 17, but group distinct has 16 images; expected at most 16"):
        draws(k=17)


def test_without_a_ranking_there_is_nothing_to_visit() -> None:
    shown = draws({"flat": torch.ones(16)})
    assert (shown.excluded.total(), shown.at(1)) == (1, [])


def test_advantages_are_those_of_the_whole_group() -> None:
    """Of the 6 images of a draw each has the advantage that it has among all 16 of its group."""
    for draw in draws({"distinct": REWARDS["distinct"]}, advantage="group").at(1):
        r = REWARDS["distinct"].double()
        expected = (r - r.mean()) / (r.std(correction=0) + 1e-4)
        torch.testing.assert_close(draw.advantages, expected[draw.images])


def test_a_round_starts_its_own_epochs() -> None:
    later = draws(done=10)
    assert sorted(v.group for step in range(11, 19) for v in later.at(step)) == sorted([*REWARDS] * 6)


@pytest.fixture
def store(tmp_path: Path, flux: Any) -> GroupStore:
    return GroupStore(write_toy(tmp_path, flux)[0])


def batches(store: GroupStore, **changes: Any) -> Batches:
    options: dict[str, Any] = {
        "timestep": "logit_normal",
        "logit_mean": 0.0,
        "logit_std": 1.0,
        "timestep_scope": "group",
        "noise_scope": "group",
        "memory_bytes": 1e9,
        "device": torch.device("cpu"),
        "seed": 0,
    }
    return Batches(store, **(options | changes))


def toy_visits(store: GroupStore) -> GroupDraws:
    generator = torch.Generator().manual_seed(0)
    return draws({group: torch.rand(8, generator=generator) for group in store.group_ids}, k=4)


def test_a_batch_holds_each_image_with_its_groups_text(store: GroupStore) -> None:
    chosen = toy_visits(store).at(1)
    batch = batches(store).of(chosen)
    assert batch.x0.shape == (3, 4, 32, 64)
    for i, draw in enumerate(chosen):
        assert torch.equal(batch.x0[i], store.latents(draw.group)[draw.images])
        for name, value in store.text(draw.group).items():
            assert torch.equal(batch.text[name][4 * i : 4 * i + 4], value.expand(4, *value.shape[1:]))


@pytest.mark.parametrize("scope", ["group", "image"])
def test_scopes_of_t_and_eps(store: GroupStore, scope: str) -> None:
    batch = batches(store, timestep_scope=scope, noise_scope=scope).of(toy_visits(store).at(1))
    assert batch.t.shape == (3, 4, 1, 1)
    assert batch.eps.shape == (3, 4 if scope == "image" else 1, 32, 64)
    assert len(batch.t.unique()) == (12 if scope == "image" else 3)


def test_batches_do_not_depend_on_micro_batches_or_memory(store: GroupStore, monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, reads, latents = toy_visits(store).at(3), [], store.latents
    monkeypatch.setattr(store, "latents", lambda group: reads.append(group) or latents(group))
    remembered, unremembered = batches(store), batches(store, memory_bytes=0)
    whole, again = remembered.of(chosen), remembered.of(chosen)
    assert len(reads) == len(chosen)
    parts = [unremembered.of([draw]) for draw in chosen * 2][: len(chosen)]
    assert len(reads) == 3 * len(chosen)
    assert torch.equal(again.x0, whole.x0)
    for name in ("x0", "eps", "t", "rewards", "ranked"):
        assert torch.equal(getattr(whole, name), torch.cat([getattr(part, name) for part in parts]))


@pytest.mark.parametrize(
    ("changes", "mean", "deviation"),
    [
        ({"timestep": "logit_normal"}, 0.5, 0.2083),
        ({"timestep": "uniform"}, 0.5, 0.2887),
        ({"logit_mean": 1.0, "logit_std": 0.5}, 0.7207, 0.0970),
    ],
)
def test_distribution_of_t(store: GroupStore, changes: dict[str, Any], mean: float, deviation: float) -> None:
    source, shown = batches(store, timestep_scope="image", **changes), toy_visits(store)
    t = torch.cat([source.of(shown.at(step)).t.flatten() for step in range(1, 150)])
    assert ((t >= 0) & (t < 1)).all()
    assert float(t.mean()) == pytest.approx(mean, abs=0.02)
    assert float(t.std()) == pytest.approx(deviation, abs=0.015)
