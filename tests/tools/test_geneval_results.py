"""Verdicts again from stored detections: the official evaluator's results, and files of rewards."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from official_geneval import random_case, result_line
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.common.rng import numpy_rng
from gdro.groups.scores import Header, rewards_table, write_rewards
from gdro.groups.store import GroupStore, GroupWriter, ImageRow
from gdro.rewards.base import Scores
from gdro.rewards.geneval.detection import Detection, Record
from gdro.rewards.geneval.reward import geneval, geneval_strict
from gdro.rewards.geneval.rules import assess
from gdro.tiny import world
from gdro.tiny.prompts import tiny_prompts
from gdro.tools.geneval_results import read_official, rescore, results_table, table


@pytest.fixture(scope="module")
def cases() -> list[tuple[dict, dict, dict]]:
    rng = random.Random(2)
    return [random_case(rng) for _ in range(300)]


@pytest.fixture
def official(tmp_path: Path, cases: list) -> Path:
    """As the official script writes it: pandas, a line an image; four images a prompt."""
    rows = [result_line(f"{i:05}/samples/0.png", *case) for i, case in enumerate([*cases, *cases[:40]])]
    path = tmp_path / "results.jsonl"
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    return path


def test_the_table_is_the_official_summary(official: Path) -> None:
    frame = pd.read_json(official, orient="records", lines=True)
    by_tag = frame.groupby("tag", sort=False)["correct"].agg(["mean", "size"])
    lines = results_table(official).splitlines()
    rows = {line.split()[0]: line.split()[1:] for line in lines[1:8]}
    for tag, expected in by_tag.iterrows():
        assert rows[str(tag)][0] == f"{expected['mean']:.4f}"
        assert rows[str(tag)][2] == f"{expected['size']:.0f}"
    assert rows["overall"][0] == f"{by_tag['mean'].mean():.4f}"
    assert rows["overall"][2] == "340"
    prompts = frame.groupby("metadata")["correct"].any()
    assert lines[8] == (
        f"{frame['correct'].mean():.2%} of the images are correct, "
        f"and at least one image of {prompts.mean():.2%} of the {len(prompts)} prompts"
    )
    assert len(lines) == 9


def test_verdicts_and_soft_scores_come_again_from_boxes_and_reasons(official: Path, cases: list) -> None:
    """The colors are not in the file; they are read off the reasons. A few images do not tell theirs."""
    results = read_official(official)
    assert not any(result.differs for result in results)
    unknown = 0
    for result, (metadata, boxes, colors) in zip(results, cases, strict=False):
        detections = [
            Detection(name, tuple(box[:4].tolist()), round(float(box[4]), 6), colors[name, row])
            for name, rows in boxes.items()
            for row, box in enumerate(rows)
        ]
        expected = assess(detections, Record.model_validate(metadata))
        assert result.strict == expected.correct
        if result.soft is None:
            unknown += 1
        else:
            assert result.soft == pytest.approx(expected.soft)
    assert 0 < unknown < 60
    assert all(r.soft is not None for r in results if all("color" not in e for e in json.loads(r.prompt)["include"]))


def test_a_verdict_the_boxes_do_not_bear_out_is_told_of(official: Path) -> None:
    lines = official.read_text().splitlines()
    row = json.loads(lines[4])
    row["correct"] = not row["correct"]
    official.write_text("\n".join([*lines[:4], json.dumps(row), *lines[5:]]))
    assert [r.where for r in read_official(official) if r.differs] == [f"{official}:5"]
    last = results_table(official).splitlines()[-1]
    assert last == f"1 of the file's verdicts are not what its detections say, first {official}:5"


def test_results_without_boxes_have_the_verdict_alone(official: Path) -> None:
    rows = [json.loads(line) for line in official.read_text().splitlines()]
    official.write_text("".join(json.dumps({k: v for k, v in r.items() if k != "details"}) + "\n" for r in rows))
    results = read_official(official)
    assert {r.soft for r in results} == {None}
    assert [r.strict for r in results] == [r["correct"] for r in rows]
    assert table(results).splitlines()[1].split()[2] == "-"


def test_without_all_six_tags_there_is_no_overall(official: Path) -> None:
    results = [r for r in read_official(official) if r.tag != "position"]
    lines = table(results).splitlines()
    assert lines[5].split() == ["position", "-", "-", "0"]
    assert lines[7].split()[:3] == ["overall", "-", "-"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "is not JSON"),
        ("[]", 'has [] in "correct"; expected true or false'),
        ({"correct": 1}, 'has 1 in "correct"; expected true or false'),
        ({"metadata": None}, 'has None in "metadata"; expected an object'),
        ({"metadata": "{"}, 'in "metadata" is not JSON'),
        ({"metadata": '{"tag": "coloring", "include": []}'}, 'has no GenEval record: "tag"'),
        ({"tag": "coloring"}, "has 'coloring' in \"tag\"; expected "),
        ({"details": "[]"}, 'has [] in "details"; expected an object'),
        ({"details": '{"cat": [[1, 2, 3, 4]]}'}, "has [1, 2, 3, 4] among the details of 'cat'; expected [left, top"),
        ({"details": '{"cat": 3}'}, "has 3 among the details of 'cat'"),
    ],
)
def test_a_bad_line_is_named(official: Path, change: str | dict[str, Any], message: str) -> None:
    lines = official.read_text().splitlines()
    lines[2] = change if isinstance(change, str) else json.dumps(json.loads(lines[2]) | change)
    official.write_text("\n".join(lines))
    with pytest.raises(UserError) as error:
        results_table(official)
    assert str(error.value).startswith(f"{official}:3 ")
    assert message in str(error.value)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.jsonl").write_bytes("é".encode("latin-1"))
    for name, message in [
        ("results.csv", "ends in '.csv'; expected GenEval's results"),
        ("none.jsonl", "not found"),
        ("none.parquet", "not found"),
        ("empty.jsonl", "is empty"),
        ("latin.jsonl", "is not UTF-8"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            results_table(tmp_path / name)
        assert str(tmp_path / name) in str(error.value)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> GroupStore:
    """Twelve groups of two pictures, every other one of another prompt's scene."""
    folder = tmp_path_factory.mktemp("scored") / "groups"
    prompts = tiny_prompts("tiny:geneval:test:12")
    rows = [
        ImageRow(
            group_id=prompt.id,
            index=index,
            prompt=prompt,
            image=_picture(prompts[(i + index) % len(prompts)]),
            latent=torch.zeros(1, 1),
            seed=0,
            scheduler="FlowMatchEulerDiscreteScheduler",
            num_inference_steps=28,
            guidance_scale=1.0,
            max_sequence_length=8,
            height=32,
            width=64,
            generator="tiny",
            revision="none",
            round=0,
        )
        for i, prompt in enumerate(prompts)
        for index in range(2)
    ]
    GroupWriter(folder).write_shard(0, rows, {prompt.id: {"embeds": torch.zeros(1, 1)} for prompt in prompts})
    return GroupStore(folder)


def _picture(prompt: Prompt) -> Image.Image:
    return Image.fromarray(world.render(prompt.fields["scene"], numpy_rng(0, "picture", 0)))


def _scored(store: GroupStore, path: Path, *, strict: bool = False) -> Scores:
    """The rewards of the store's pictures, written to `path`."""
    reward = geneval_strict() if strict else geneval()
    pairs = [(image, store.prompt(group)) for group in store.group_ids for image in store.images(group)]
    scores = reward([image for image, _ in pairs], [prompt for _, prompt in pairs])
    _write(store, path, scores)
    return scores


def _write(store: GroupStore, path: Path, scores: Scores) -> None:
    header = Header("geneval", "1", store.contents)
    ids = [image_id for group in store.group_ids for image_id in store.image_ids(group)]
    write_rewards(path, header, [rewards_table(header, ids, scores)])


@pytest.mark.parametrize("strict", [False, True])
def test_a_file_of_rewards_gives_its_verdicts_again(store: GroupStore, tmp_path: Path, strict: bool) -> None:
    path = tmp_path / "geneval.parquet"
    scores = _scored(store, path, strict=strict)
    results = rescore(path)
    again = [float(r.strict) if strict else r.soft for r in results]
    np.testing.assert_array_equal(again, scores.values)
    assert 0.5 <= np.mean(again) < 1
    assert not any(r.differs for r in results)
    assert [r.tag for r in results[::2]] == [store.prompt(group).fields["tag"] for group in store.group_ids]
    lines = results_table(path).splitlines()
    assert lines[7].split()[-1] == "24"
    assert "of the 12 prompts" in lines[8]


def test_a_verdict_of_older_rules_is_told_of(store: GroupStore, tmp_path: Path) -> None:
    path = tmp_path / "geneval.parquet"
    scores = _scored(store, path)
    scores.evidence[3]["soft"] += 0.25
    _write(store, path, scores)
    assert [r.differs for r in rescore(path)].index(True) == 3
    assert "1 of the file's verdicts" in results_table(path)


def test_records_that_are_not_in_the_evidence_come_from_the_groups(store: GroupStore, tmp_path: Path) -> None:
    path = tmp_path / "geneval.parquet"
    scores = _scored(store, path)
    whole = rescore(path)
    for evidence in scores.evidence:
        del evidence["record"]
    _write(store, path, scores)
    groups = store.shards[0].path.parent
    assert rescore(path, groups) == whole
    with pytest.raises(UserError, match="without its prompt's record; expected the groups folder too"):
        rescore(path)


def test_rewards_of_another_kind_are_refused(store: GroupStore, tmp_path: Path) -> None:
    path = tmp_path / "ocr.parquet"
    _write(store, path, Scores(np.zeros(24), [{"text": ""} for _ in range(24)]))
    with pytest.raises(UserError, match="has no detections in its evidence; expected a file of GenEval rewards"):
        rescore(path)
