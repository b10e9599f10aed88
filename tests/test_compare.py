"""A small real bench: search, a run, a continued run; then resumption, shared base images, status, refusals."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import small_run, start

from gdro.cli import main
from gdro.compare import Comparison, take_on
from gdro.comparison.bench import Bench, load_bench
from gdro.errors import UserError


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, flux_folder: Path) -> Path:
    """A folder with bench.yaml and the bench finished in `out`. One of the search's candidates cannot but fail."""
    folder = tmp_path_factory.mktemp("bench")
    common = yaml.safe_load(small_run(folder, flux_folder).read_text())
    common["device"] = "cpu"
    common["train"] |= {"max_train_steps": 1000, "validation_steps": 2, "export": "last"}
    searched = {"train.target_modules": ["attention", ["nothing"]]}
    bench = {
        "seeds": [0],
        "common": common,
        "tasks": {"red": {"target_reward": 0.99, "budget": 80}},
        "methods": {
            "gdro": {"title": "GDRO", "stop_at_target": True, "search": searched},
            "longer": {"title": "Longer", "continues": "gdro", "budget": 1.5},
        },
        "search": {"budget": 0.75},
    }
    (folder / "bench.yaml").write_text(yaml.safe_dump(bench, sort_keys=False))
    command = ["compare", "bench.yaml", "--out", "out", "--jobs", "2", "--results", "figures/bench.json"]
    process = start(folder, *command)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1, err  # one candidate failed
    assert "red/gdro/search/1 failed: " in out
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


@pytest.fixture
def bench(place: Path) -> Bench:
    return load_bench(place / "bench.yaml")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_candidate_is_chosen_on_validation_prompts_and_recorded(place: Path) -> None:
    choice = read(place / "out" / "choices.json")["red"]["gdro"]
    assert choice["chosen"] == 0
    assert "train.target_modules" in choice["candidates"][1]["error"]
    assert choice["candidates"][0]["evaluations"]["train"] > 0
    assert not list((place / "out/red/gdro/search").glob("*/evaluation*"))
    assert yaml.safe_load((place / "out/red/gdro/seed-0/config.yaml").read_text())["seed"] == 0


def test_the_results_hold_every_figure(place: Path) -> None:
    results = read(place / "figures" / "bench.json")
    assert results == read(place / "out" / "results.json")
    assert results["jobs"] == 2
    task = results["tasks"]["red"]
    assert task["base"]["reward"]["n"] == 1
    one, longer = (task["methods"][name]["seeds"]["0"] for name in ("gdro", "longer"))
    assert 80 <= one["spent"]["evaluations"] < 120 <= longer["spent"]["evaluations"]
    assert sum(one["evaluations"].values()) == one["spent"]["evaluations"]
    assert longer["curve"][: len(one["curve"])] == one["curve"]
    assert one["to_target"] == {"evaluations": None, "seconds": None}
    assert task["methods"]["longer"]["choice"] == task["methods"]["gdro"]["choice"]
    table, page = (place / "out" / "table.md").read_text(), (place / "out" / "bench.html").read_text()
    assert "| Longer |" in table
    assert page.count('<img src="data:image/png') == 2 * 3  # two test prompts, the base and two methods


def test_the_base_is_one_for_every_method(place: Path, bench: Bench) -> None:
    evaluations = [read(place / f"out/red/{name}/seed-0/evaluation.json") for name in ("gdro", "longer")]
    assert evaluations[0]["base"] == evaluations[1]["base"]
    assert evaluations[0]["weights"] != evaluations[1]["weights"]

    bed = Comparison(bench, place / "out", workers=2)
    job = next(job for job in bench.plan(["red"]) if job.name == "red/gdro/seed-0")
    shutil.copytree(place / "out/red/longer/seed-0", place / "again/red/longer/seed-0")
    again = Comparison(bench, place / "again", workers=2)
    config = bed.config(job)
    again._share_base(job, config.model_copy(update={"seed": 1}))
    assert not (place / "again/red/gdro").exists()
    again._share_base(job, config)
    copied = place / "again/red/gdro/seed-0/evaluation/base"
    files = {path.relative_to(copied): path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    base = place / "out/red/gdro/seed-0/evaluation/base"
    assert files == {path.relative_to(base): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    assert any(path.suffix == ".parquet" for path in files)


def test_what_is_done_is_not_done_again_and_a_changed_setting_is_not_done(place: Path, bench: Bench) -> None:
    bed = Comparison(bench, place / "out", workers=1)  # other jobs at once: the same runs
    assert [bed.is_done(job) for job in bench.plan(["red"])] == [True, False, True, True]
    data = yaml.safe_load((place / "bench.yaml").read_text())
    data["tasks"]["red"]["budget"] = 70
    (place / "other.yaml").write_text(yaml.safe_dump(data))
    other = Comparison(load_bench(place / "other.yaml"), place / "out", workers=1)
    assert [other.is_done(job) for job in other.bench.plan(["red"]) if job.candidate is not None] == [False, False]
    with pytest.raises(UserError, match="begun with other settings"):
        other.chosen("red", "gdro")


def test_status_starts_nothing_and_shows_the_results(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(place / "out" / "results.json")
    (place / "README.md").write_text("<!-- bench:start --><!-- bench:end -->")
    arguments = ["--readme", "README.md", "--pictures", "pictures", "--jobs", "2"]
    assert main(["compare", "bench.yaml", "--out", "out", "--status", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["red gdro: search 1/2, seeds 0", "red longer: seeds 0"]
    assert read(place / "out" / "results.json") == before
    assert "![bench-red: reward" in (place / "README.md").read_text()
    assert (place / "pictures" / "bench-red.svg").exists()


def test_only_a_finished_run_is_taken_on(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not finished"):
        take_on(tmp_path / "parent", tmp_path / "run")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml not found"),
        (["bench.yaml", "--task", "rde"], 'no task of bench.yaml; did you mean "red"?'),
        (["bench.yaml", "--jobs", "0"], "--jobs is 0; expected at least 1"),
        (["bench.yaml", "--train.k", "3"], "unrecognized arguments: --train.k"),
    ],
)
def test_refusals_are_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["compare", *arguments, "--out", "new"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (place / "new").exists()
