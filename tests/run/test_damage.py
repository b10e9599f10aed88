"""Damage to any file of a finished run: `gdro verify` names it, and no stage goes on from it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import small_run

from gdro.cli import main
from gdro.common.errors import UserError
from gdro.common.files import discard
from gdro.groups.store import GroupStore
from gdro.tools.verify import verify

pytestmark = pytest.mark.slow

HARMLESS = (".lock", "report.html", "README.md", ".png")  # nothing reads them


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, flux_folder: Path) -> Path:
    """A folder with a finished run in out/. Damage copies only."""
    folder = tmp_path_factory.mktemp("finished")
    here = Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        try:
            assert main(["run", str(small_run(folder, flux_folder)), "--out", "out"]) == 0
        finally:
            os.chdir(here)
    return folder


@pytest.fixture
def work(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The run, to be damaged, in the current folder."""
    shutil.copytree(finished, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.syspath_prepend(str(tmp_path / "work"))
    return Path("out")


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 8
    path.write_bytes(data)


def blank(path: Path, place: float) -> None:
    """Zeros where a page of the disk was lost."""
    data = path.read_bytes()
    start = int(place * len(data)) // 4096 * 4096
    path.write_bytes(data[:start] + bytes(len(data[start : start + 4096])) + data[start + 4096 :])


def cut(path: Path, place: float) -> None:
    path.write_bytes(path.read_bytes()[: int(place * path.stat().st_size)])


def remove(path: Path, place: float) -> None:
    path.unlink()


DAMAGES: tuple[tuple[Callable[[Path, float], None], float], ...] = (
    *((flip, 0.0), (blank, 0.0), (cut, 0.99), (flip, 0.3), (remove, 0.0), (flip, 0.7), (blank, 0.8), (cut, 0.5)),
    *((flip, 0.999), (cut, 0.0)),
)
ALIKE = ("out/evaluation/tuned", "-00001", "-00002", "step-000002", "step-000004")  # read as their neighbors are


def test_verify_names_every_damaged_file(work: Path) -> None:
    """Each kind of file by two of the damages in turn."""
    assert verify(work)[1] == []
    files = [path for path in sorted(work.rglob("*")) if path.is_file() and not path.name.endswith(HARMLESS)]
    files = [path for path in files if not any(part in str(path) for part in ALIKE)]
    assert len(files) > 25
    unnoticed = []
    for number, path in enumerate(files):
        whole = path.read_bytes()
        for damage, place in (DAMAGES[(2 * number + i) % len(DAMAGES)] for i in range(2)):
            damage(path, place)
            lines = verify(work)[1]
            if not any(path.name in line or f"{path.parent} holds no rewards" in line for line in lines):
                unnoticed.append(f"{damage.__name__} {path} at {place}")
            path.write_bytes(whole)
    assert unnoticed == []
    assert verify(work)[1] == []


def test_exit_codes_and_lines(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "out"]) == 0
    assert capsys.readouterr().out.endswith("checks, 0 failed\n")
    flip(work / "evaluation.json", 0.5)
    (work / "groups" / "groups-00003.parquet").unlink()
    assert main(["verify", "out"]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4  # the rewards lack their groups too
    assert any("evaluation.json is damaged" in line and "run `gdro evaluate` again" in line for line in lines)
    assert any("groups-00003.parquet is missing: run `gdro sample` again" in line for line in lines)
    assert lines[-1].endswith("checks, 3 failed")
    assert main(["verify", "nowhere"]) == 2
    assert "expected the folder of a run or a study" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "command", "later"),
    [
        ("groups/groups-00001.parquet", "score", ["rewards/my_rewards.redness.parquet"]),
        ("groups/_embeddings-00001.safetensors", "train", []),
        ("groups/_sampling.json", "sample", ["groups/groups-00003.parquet"]),
        ("rewards/my_rewards.redness.parquet", "train", []),
        ("checkpoints/step-000006/state.json", "train", []),
        ("checkpoints/step-000006/ema.safetensors", "export", []),
        ("checkpoints/stopped.json", "train", []),
        (".config.yaml", "train", []),
        ("metrics.jsonl", "report", []),
        ("evaluation.json", "report", []),
        ("metrics.jsonl", "train", ["checkpoints/stopped.json", "checkpoints/step-000006"]),
        ("seconds.json", "run", []),
    ],
)
def test_no_stage_goes_on_from_a_damaged_file(
    name: str, command: str, later: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for product in later:  # which would show that the stage is finished
        discard(work / product) if (work / product).is_dir() else (work / product).unlink()
    flip(work / name, 0.97 if name.endswith(".parquet") else 0.6)  # a footer, which every reader reads
    assert main([command, "out/config.yaml", "--out", "out"]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert Path(name).name in line
    assert "damaged" in line or "is not" in line


def test_text_of_other_prompts_is_refused(work: Path) -> None:
    """Whole files of another store: each is as it was written, but not for these images."""
    groups = work / "groups"
    for kind in ("_embeddings-0000{}.safetensors", "groups-0000{}.parquet"):
        other = shutil.copytree(groups, work.parent / kind[:3])
        shutil.copy(other / kind.format(0), other / kind.format(1))
        with pytest.raises(UserError, match=r"groups-00001|_embeddings-00001"):
            GroupStore(other)


def test_a_best_checkpoint_is_known_without_the_file_that_names_it(work: Path) -> None:
    """best.json is for people: the last checkpoint knows, so its loss changes nothing."""
    before = (work / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()
    (work / "checkpoints" / "best.json").unlink()
    shutil.rmtree(work / "adapter")
    assert main(["export", "out/config.yaml", "--out", "out"]) == 0
    assert (work / "adapter" / "pytorch_lora_weights.safetensors").read_bytes() == before
    assert main(["train", "out/config.yaml", "--out", "out"]) == 0
    assert (work / "checkpoints" / "best.json").exists()
