"""Sums of rewards: s' = sum_i w_i (T_i(s_i) - mean_i) / std_i, from the files of the terms alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.evaluation.measure import read_evidence
from gdro.groups.scores import read_rewards
from gdro.groups.scoring import score_groups
from gdro.groups.store import GroupStore, GroupWriter, ImageRow
from gdro.rewards import derived
from gdro.rewards.registry import load_reward

FUNCTIONS = """
import numpy as np

def brightness(images, prompts):
    return [float(np.asarray(i).mean()) / 255 for i in images]

def redness(images, prompts):
    return [float(np.asarray(i)[..., 0].mean()) for i in images]

def flat(images, prompts):
    return [1.0] * len(images)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, str]:
    """(groups of four images, two of them alike; module of rewards)."""
    name = "derived_" + "".join(c if c.isalnum() else "_" for c in tmp_path.name)
    (tmp_path / f"{name}.py").write_text(FUNCTIONS)
    monkeypatch.syspath_prepend(tmp_path)
    common = {"latent": torch.zeros(1, 1), "seed": 0, "scheduler": "s", "num_inference_steps": 1, "guidance_scale": 1.0}
    common |= {"max_sequence_length": 1, "height": 8, "width": 8, "generator": "g", "revision": "r", "round": 0}
    colors = {
        "a": [(10, 0, 0), (20, 90, 0), (20, 90, 0), (5, 200, 9)],
        "b": [(0, 0, 250), (9, 9, 9), (1, 2, 3), (3, 2, 1)],
    }
    rows = [
        ImageRow(group_id=group, index=n, prompt=Prompt(group, group), image=Image.new("RGB", (8, 8), color), **common)
        for group, members in colors.items()
        for n, color in enumerate(members)
    ]
    GroupWriter(tmp_path / "groups").write_shard(0, rows, {group: {"t": torch.zeros(1, 1)} for group in colors})
    return tmp_path / "groups", name


def scored(spec: Any, groups: Path, out: Path, **options: Any) -> dict[str, np.ndarray]:
    path = score_groups(load_reward(spec), groups, out, **options)
    return {group: r.numpy() for group, r in read_rewards(path, GroupStore(groups)).items()}


def test_a_weighted_sum_of_standardized_scores(toy: tuple[Path, str], tmp_path: Path) -> None:
    groups, module = toy
    out, standard = tmp_path / "rewards", tmp_path / "standard.json"
    spec = [{"name": f"{module}:brightness", "weight": 0.7}, {"name": f"{module}:redness", "weight": -0.3}]
    total = scored(spec, groups, out, standard=standard, fit=True)
    one, two = scored(spec[0]["name"], groups, out), scored(spec[1]["name"], groups, out)
    a, b = np.concatenate(list(one.values())), np.concatenate(list(two.values()))
    wanted = 0.7 * (a - a.mean()) / a.std() - 0.3 * (b - b.mean()) / b.std()
    np.testing.assert_allclose(np.concatenate(list(total.values())), wanted, atol=1e-12)
    evidence = read_evidence(out / f"{load_reward(spec).name}.parquet")
    group = next(iter(one))
    assert evidence[f"{group}/0"]["terms"] == {
        load_reward(s["name"]).name: pytest.approx(float(v[group][0])) for s, v in zip(spec, (one, two), strict=True)
    }
    again = scored(spec, groups, tmp_path / "later", standard=standard)  # other images, the same constants
    np.testing.assert_array_equal(np.concatenate(list(again.values())), np.concatenate(list(total.values())))


def test_constants_must_be_there_and_of_this_reward(toy: tuple[Path, str], tmp_path: Path) -> None:
    groups, module = toy
    spec = [f"{module}:brightness", f"{module}:redness"]
    with pytest.raises(UserError, match=r"has no constants for the reward"):
        scored(spec, groups, tmp_path / "rewards", standard=tmp_path / "standard.json")
    scored(spec, groups, tmp_path / "rewards", standard=tmp_path / "standard.json", fit=True)
    other = [{"name": spec[0], "weight": 2}, spec[1]]
    with pytest.raises(UserError, match=r"has no constants for the reward"):
        scored(other, groups, tmp_path / "rewards", standard=tmp_path / "standard.json")
    scored(other, groups, tmp_path / "rewards", standard=tmp_path / "standard.json", fit=True)
    scored(spec, groups, tmp_path / "later", standard=tmp_path / "standard.json")  # a sum scored later takes none away
    with pytest.raises(UserError, match=r"gives all images the same score"):
        scored([spec[0], f"{module}:flat"], groups, tmp_path / "rewards", fit=True)


def test_transforms_inside_groups(toy: tuple[Path, str], tmp_path: Path) -> None:
    groups, module = toy
    raw = scored(f"{module}:brightness", groups, tmp_path / "rewards")
    won = scored({"name": f"{module}:brightness", "transform": "win_rate"}, groups, tmp_path / "rewards")
    for group, scores in raw.items():
        beaten = [
            (sum(s > o for o in scores) + 0.5 * (sum(s == o for o in scores) - 1)) / (len(scores) - 1) for s in scores
        ]
        np.testing.assert_allclose(won[group], beaten)
    assert load_reward({"name": "ocr", "transform": "win_rate"}).relative
    assert not load_reward({"name": "ocr", "transform": "hp_edit"}).relative


def test_transforms() -> None:
    scores = np.array([2.0, np.nan, 5.0, 2.0, 3.0])
    np.testing.assert_allclose(derived.rank(scores), [0, np.nan, 1, 0, 0.5])
    np.testing.assert_allclose(derived.win_rate(scores), [1 / 6, np.nan, 1, 1 / 6, 2 / 3])
    np.testing.assert_allclose(derived.win_rate(np.array([1.0])), [0.5])
    np.testing.assert_allclose(derived.hp_edit(np.array([2.5, 5.0])), [0.5, 1 / (1 + np.exp(-5.0))])
    np.testing.assert_array_equal(derived.clip(scores, 2.5, 4.0), [2.5, np.nan, 4.0, 2.5, 3.0])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ([], r"score.reward is an empty list"),
        ({"name": "ocr", "transform": "rnk"}, r'score.reward.transform is "rnk"; did you mean "rank"'),
        (
            {"name": "ocr", "transform": {"clip": [1, 0]}},
            r"score.reward.transform.clip has \[1, 0\]; expected the lower",
        ),
        ({"name": "ocr", "transform": {"clip": 1}}, r"transform.clip has \[1\]; expected a list of 2 numbers"),
        ([{"name": "ocr", "weight": 0}], r"score.reward.0.weight is 0; expected a number other than 0"),
        (["ocr", "ocr"], r"score.reward names a reward twice"),
        ({"name": "ocr", "wieght": 1}, r'score.reward.wieght: reward "ocr" has no such option'),
        ({"weight": 1}, r"score.reward has no name; expected a name"),
        (
            {"name": "ocr", "standardize": "no", "weight": 1},
            r'score.reward.standardize is "no"; expected true or false',
        ),
    ],
)
def test_bad_specs(spec: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(spec)
