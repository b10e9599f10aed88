"""Whole runs on what is scored in other ways: sums of rewards, comparisons, images without a score."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_run import small_run

from gdro.cli import main
from gdro.common.sealed import read_record
from gdro.groups.scores import read_header, read_scored, write_rewards

pytestmark = pytest.mark.slow

SUM = '[{name: "my_rewards:redness", weight: 0.7}, {name: "my_rewards:blueness", weight: 0.3, transform: win_rate}]'


@pytest.fixture
def config(tmp_path: Path, flux_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return small_run(tmp_path, flux_folder)


def test_a_sum_of_rewards_is_trained_on_and_one_of_them_measured(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    given = ["--score.reward", SUM, "--evaluate.reward", "my_rewards:redness"]
    assert main(["run", str(config), "--out", str(out), *given]) == 0
    names = {path.stem for path in (out / "rewards").glob("*.parquet")}
    assert names == {"my_rewards.redness", "my_rewards.blueness", "my_rewards.redness+my_rewards.blueness.win_rate"}
    assert json.loads((out / "evaluation.json").read_text())["reward"] == "my_rewards.redness"
    assert "my_rewards.redness" in (out / "report.html").read_text()
    assert main(["run", "--out", str(out)]) == 0  # its own config.yaml says the same


def test_a_standardized_sum_is_measured_by_the_constants_of_training(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    spec = '[{name: "my_rewards:redness"}, {name: "my_rewards:blueness", weight: -0.5}]'
    assert main(["run", str(config), "--out", str(out), "--score.reward", spec]) == 0
    (constants,) = read_record(out / "rewards" / "standard.json").values()
    for side in ("base", "tuned"):
        folder = out / "evaluation" / side / "rewards"
        red, blue, both = (
            pq.read_table(folder / f"{name}.parquet")["score"].to_pylist()
            for name in ("my_rewards.redness", "my_rewards.blueness", "my_rewards.redness+my_rewards.blueness")
        )
        (m1, s1), (m2, s2) = constants
        assert both == pytest.approx([(r - m1) / s1 - 0.5 * (b - m2) / s2 for r, b in zip(red, blue, strict=True)])


@pytest.mark.parametrize("spec", ['{name: "my_rewards:redness", transform: rank}', "{name: win_rate, comparator: ocr}"])
def test_what_compares_inside_groups_cannot_compare_models(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], spec: str
) -> None:
    assert main(["run", str(config), "--out", str(tmp_path / "run"), "--score.reward", spec]) == 2
    assert "so it cannot compare models; expected evaluate.reward to name another" in capsys.readouterr().err


def test_images_without_a_score_are_left_out(config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nulls in the file of rewards, as a judge that gave no answer leaves them: the run goes on with the others."""
    out = tmp_path / "run"
    assert main(["run", str(config), "--out", str(out), "--until", "score"]) == 0
    path = out / "rewards" / "my_rewards.redness.parquet"
    forget(path, {"train0/1", "train0/2", "train1/0"})
    assert main(["run", "--out", str(out), "--until", "train"]) == 0
    assert "1 too few scores" in capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert max(row["step"] for row in rows) == 6


def forget(path: Path, images: set[str]) -> None:
    """Take these images' scores out of a file of rewards."""
    header = read_header(path)
    tables = []
    for place in range(len(header.contents)):
        table = read_scored(path, place)
        kept = [
            None if image in images else score
            for image, score in zip(table["image_id"].to_pylist(), table["score"].to_pylist(), strict=True)
        ]
        tables.append(table.set_column(4, "score", pa.array(kept, pa.float64())))
    write_rewards(path, header, tables)
