"""A small real spec: search, a run, a continued run; then resumption, shared base images, status, refusals.

Its jobs run one after the other in this process, which has the libraries loaded; test_running.py has the processes.
"""

import io
import json
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

import pytest
import yaml
from small_run import small_run

from gdro.cli import main
from gdro.common.errors import UserError
from gdro.common.sealed import read_record, write_record
from gdro.tools.comparison import running
from gdro.tools.comparison.agreement import MADE_WITH
from gdro.tools.comparison.compare import Comparison
from gdro.tools.comparison.running import FAILED
from gdro.tools.comparison.spec import ComparisonSpec, Job, load_spec
from gdro.training.checkpoint import stopped_at


class HereAndNow:
    """In place of `subprocess.Popen`: the child's work, done when it is made."""

    def __init__(self, command: list[str], *, stdout: BinaryIO, **_: Any) -> None:
        self.stdin = io.BytesIO()
        with redirect_stderr(io.StringIO()) as log, redirect_stdout(log):
            self.returncode = main(command[command.index("gdro.tools.comparison.child") + 2 :])
        stdout.write(log.getvalue().encode())

    def poll(self) -> int:
        return self.returncode


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, flux_folder: Path) -> Path:
    """A folder with comparison.yaml and the comparison finished in `out`. One of its candidates cannot but fail.

    Tests work on copies of `out`, or leave it as it is.
    """
    folder = tmp_path_factory.mktemp("spec")
    common = yaml.safe_load(small_run(folder, flux_folder).read_text())
    common["device"] = "cpu"
    common["sample"]["prompts_per_shard"] = 4
    common["train"] |= {"max_train_steps": 1000, "validation_steps": 4, "checkpointing_steps": 100, "export": "last"}
    searched = {"train.target_modules": ["attention", ["nothing"]]}
    spec = {
        "seeds": [0],
        "common": common,
        "tasks": {"red": {"target_reward": 0.99, "budget": 80}},
        "methods": {
            "gdro": {"title": "GDRO", "stop_at_target": True, "search": searched},
            "longer": {"title": "Longer", "continues": "gdro", "budget": 1.5},
        },
        "search": {"budget": 0.75},
    }
    (folder / "comparison.yaml").write_text(yaml.safe_dump(spec, sort_keys=False))
    command = ["compare", "comparison.yaml", "--out", "out", "--jobs", "2", "--results", "figures/comparison.json"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as out:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.delitem(sys.modules, "my_rewards", raising=False)  # another test's
        patch.setattr(running, "subprocess", SimpleNamespace(Popen=HereAndNow, PIPE=subprocess.PIPE))
        assert main(command) == 1  # one candidate failed
    assert "red/gdro/search/1 failed: " in out.getvalue()
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)


@pytest.fixture
def spec(place: Path) -> ComparisonSpec:
    return load_spec(place / "comparison.yaml")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def changed(place: Path, name: str, **task: Any) -> ComparisonSpec:
    """The comparison with other settings of its task."""
    data = yaml.safe_load((place / "comparison.yaml").read_text())
    data["tasks"]["red"] |= task
    (place / name).write_text(yaml.safe_dump(data))
    return load_spec(place / name)


def job(spec: ComparisonSpec, name: str) -> Job:
    return next(one for one in spec.plan(["red"]) if one.name == name)


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Path:
    return shutil.copytree(place / "out", tmp_path / "out")


@pytest.mark.slow
def test_the_candidate_is_chosen_on_validation_prompts_and_recorded(place: Path) -> None:
    choice = read(place / "out" / "choices.json")["red"]["gdro"]
    assert choice["chosen"] == 0
    assert "train.target_modules" in choice["candidates"][1]["error"]
    assert choice["candidates"][0]["nfe"]["train"] > 0
    assert not list((place / "out/red/gdro/search").glob("*/evaluation*"))
    assert yaml.safe_load((place / "out/red/gdro/seed-0/config.yaml").read_text())["seed"] == 0


def test_the_results_hold_every_figure(place: Path) -> None:
    results = read(place / "figures" / "comparison.json")
    assert results == read(place / "out" / "results.json")
    assert results["jobs"] == 2
    task = results["tasks"]["red"]
    assert task["base"]["reward"]["n"] == 1
    one, longer = (task["methods"][name]["seeds"]["0"] for name in ("gdro", "longer"))
    assert 80 <= one["spent"]["nfe"] < 120 <= longer["spent"]["nfe"]
    assert sum(one["nfe"].values()) == one["spent"]["nfe"]
    assert longer["curve"][: len(one["curve"])] == one["curve"]
    assert one["to_target"] == {"nfe": None, "seconds": None}
    assert [task["methods"][name]["budget"] for name in ("gdro", "longer")] == [80, 120]
    assert (task["budget"], task["searched_on"]) == (80, "red")
    assert task["methods"]["longer"]["choice"] == task["methods"]["gdro"]["choice"]
    table, page = (place / "out" / "table.md").read_text(), (place / "out" / "comparison.html").read_text()
    assert "| Longer (budget 120) |" in table
    assert "- GDRO (red): 2 candidates, train.target_modules attention, " in table
    assert page.count('<img src="data:image/png') == 2 * 3  # two test prompts, the base and two methods


def test_the_base_is_one_for_every_method(place: Path, spec: ComparisonSpec) -> None:
    evaluations = [read(place / f"out/red/{name}/seed-0/evaluation.json") for name in ("gdro", "longer")]
    assert evaluations[0]["base"] == evaluations[1]["base"]
    assert evaluations[0]["fingerprint"] != evaluations[1]["fingerprint"]

    bed = Comparison(spec, place / "out", workers=2)
    one = job(spec, "red/gdro/seed-0")
    shutil.copytree(place / "out/red/longer/seed-0", place / "again/red/longer/seed-0")
    again = Comparison(spec, place / "again", workers=2)
    config = bed.config(one)
    again.share_base(one, config.model_copy(update={"seed": 1}))
    assert not (place / "again/red/gdro").exists()
    again.share_base(one, config)
    copied = place / "again/red/gdro/seed-0/evaluation/base"
    files = {path.relative_to(copied): path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    base = place / "out/red/gdro/seed-0/evaluation/base"
    assert files == {path.relative_to(base): path.read_bytes() for path in base.rglob("*") if path.is_file()}
    assert any(path.suffix == ".parquet" for path in files)


def test_what_is_done_is_not_done_again_and_a_changed_setting_is_not_done(place: Path, spec: ComparisonSpec) -> None:
    bed = Comparison(spec, place / "out", workers=1)  # other jobs at once: the same runs
    assert [bed.is_done(job) for job in spec.plan(["red"])] == [True, False, True, True]
    other = Comparison(changed(place, "more.yaml", budget=90), place / "out", workers=1)
    assert not any(other.is_done(job) for job in other.spec.plan(["red"]))


@pytest.mark.parametrize("file", ["report.html", "summary.json", "checkpoints/stopped.json"])
def test_a_run_without_its_last_files_is_not_done(copy: Path, spec: ComparisonSpec, file: str) -> None:
    (copy / "red/gdro/seed-0" / file).unlink()
    bed = Comparison(spec, copy, workers=1)
    assert not bed.is_done(job(spec, "red/gdro/seed-0"))
    shutil.rmtree(copy / "red/longer")
    with pytest.raises(UserError, match="red/gdro/seed-0 is not finished; expected it first"):
        bed.start(job(spec, "red/longer/seed-0"))


@pytest.mark.parametrize(("task", "field"), [({"budget": 70}, "max_nfe"), ({"target_reward": 0.5}, "target_")])
def test_a_run_past_lowered_limits_is_refused(place: Path, copy: Path, task: dict[str, Any], field: str) -> None:
    less = changed(place, "less.yaml", **task)
    with pytest.raises(UserError, match=rf"train.{field}.* may have trained past it; delete .*red/gdro/seed-0 to run"):
        Comparison(less, copy, workers=1).start(job(less, "red/gdro/seed-0"))


def test_a_run_just_taken_on_and_one_with_more_budget_go_on(place: Path, copy: Path, spec: ComparisonSpec) -> None:
    shutil.rmtree(copy / "red/longer")
    bed = Comparison(spec, copy, workers=1)
    for _ in range(2):  # killed before it began, it starts again
        bed.start(job(spec, "red/longer/seed-0"))
        assert stopped_at(copy / "red/longer/seed-0/checkpoints", bed.config(job(spec, "red/gdro/seed-0")).train)
    more = changed(place, "more.yaml", budget=90)
    Comparison(more, copy, workers=1).start(job(more, "red/gdro/seed-0"))


def test_no_choice_while_a_candidate_may_yet_finish(copy: Path, spec: ComparisonSpec) -> None:
    failed = copy / "red/gdro/search/1" / FAILED
    bed = Comparison(spec, copy, workers=1)
    assert "nothing" in str(bed.failure(job(spec, "red/gdro/search/1")))
    failed.unlink()
    assert bed.candidates("red", "gdro")[1]["error"] == "not finished"
    # a seed that has begun keeps what was chosen for it
    assert bed.choices()["red"]["gdro"]["chosen"] == 0
    assert bed.is_done(job(spec, "red/gdro/seed-0"))
    shutil.rmtree(copy / "red/gdro/seed-0")
    assert bed.choices() == {}
    with pytest.raises(UserError, match="red/gdro/search: candidate 1 is not finished; expected"):
        bed.config(job(spec, "red/gdro/seed-0"))


def test_a_choice_is_not_made_again(copy: Path, spec: ComparisonSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gdro.tools.comparison.compare.choose", lambda candidates: 1)
    bed = Comparison(spec, copy, workers=1)
    assert bed.chosen("red", "longer") == spec.candidates("gdro")[0]
    shutil.rmtree(copy / "red/gdro/seed-0")
    assert bed.chosen("red", "longer") == spec.candidates("gdro")[1]


def test_runs_of_other_models_and_rewards_are_not_mixed(copy: Path, spec: ComparisonSpec) -> None:
    bed = Comparison(spec, copy, workers=1)
    bed.check_versions(spec.plan(["red"]))
    path = copy / "red/gdro/search/0" / MADE_WITH
    write_record(path, read_record(path) | {"judge my_rewards:calm": "older"})
    message = "judge my_rewards:calm is older in red/gdro/search/0, but .* in .*; expected one version"
    with pytest.raises(UserError, match=message):
        bed.check_versions(spec.plan(["red"]))
    before = (copy / "results.json").read_bytes()
    with pytest.raises(UserError, match=message):
        bed.write({}, results=None, readme=None, pictures=None)
    assert (copy / "results.json").read_bytes() == before


def test_status_starts_nothing_and_shows_the_results(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = read(place / "out" / "results.json")
    (place / "README.md").write_text("<!-- comparison:start --><!-- comparison:end -->")
    arguments = ["--readme", "README.md", "--pictures", "pictures", "--jobs", "2"]
    assert main(["compare", "comparison.yaml", "--out", "out", "--status", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["red gdro: search 1/2 (1 failed), seeds 0", "red longer: seeds 0"]
    assert lines[-1].startswith("red/gdro/search/1 failed: ")
    assert read(place / "out" / "results.json") == before
    assert "![spec-red: reward" in (place / "README.md").read_text()
    assert (place / "pictures" / "spec-red.svg").exists()


HOLD = (
    "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print('held', flush=True); input()"
)


@pytest.mark.slow
def test_status_writes_nothing_while_a_bench_is_at_work(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-S", "-c", HOLD, str(copy / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        (copy / "results.json").unlink()
        assert main(["compare", "comparison.yaml", "--out", str(copy), "--status"]) == 0
        other.communicate(b"\n")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "red longer: seeds 0"
    assert "another gdro process is using" in lines[-1]
    assert not (copy / "results.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none.yaml"], "none.yaml not found"),
        (["comparison.yaml", "--task", "rde"], 'no task of comparison.yaml; did you mean "red"?'),
        (["comparison.yaml", "--jobs", "0"], "argument --jobs: it is 0; expected an integer from 1 to 1024"),
        (["comparison.yaml", "--train.k", "3"], "unrecognized arguments: --train.k"),
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
