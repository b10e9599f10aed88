"""Whole runs on a very small real FLUX: files, resumption after SIGKILL in every stage, stages one by one, imports."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from safetensors.torch import load_file
from small_run import small_run, start

from gdro.cli import main

pytestmark = pytest.mark.slow

TIMED = {"images_per_second", "seconds", "digest"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, flux_folder: Path) -> Path:
    """A folder with a small run's files and one finished, uninterrupted run of them in `whole`."""
    folder = tmp_path_factory.mktemp("work")
    small_run(folder, flux_folder)
    code, err = finish(start(folder, "run", "small.yaml", "--out", "whole"))
    assert code == 0, err
    return folder


@pytest.fixture(autouse=True)
def here(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(work)
    monkeypatch.syspath_prepend(str(work))
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)


def finish(command: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = command.communicate(timeout=300)
    return command.returncode, err


def digests(folder: Path, pattern: str) -> dict[str, str]:
    files = sorted(path for path in folder.glob(pattern) if path.is_file())
    assert files, pattern
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def rows(run: Path) -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, object_hook=lambda o: {k: v for k, v in o.items() if k not in TIMED}) for line in lines]


def same_result(one: Path, other: Path) -> None:
    """Bit for bit: images, latents and embeddings, rewards, adapter, EMA and optimizer, exported files, figures."""
    for pattern in (
        "groups/*.parquet",
        "groups/*.safetensors",
        "rewards/*.parquet",
        "checkpoints/step-000006/*.safetensors",
        "adapter/**/*.safetensors",
        "evaluation.json",
    ):
        assert digests(one, pattern) == digests(other, pattern)
    assert rows(one) == rows(other)


def test_a_run_directory_holds_what_it_should(work: Path) -> None:
    whole = work / "whole"
    for name in ("config.yaml", "metrics.jsonl", "evaluation.json", "report.html", "summary.json"):
        assert (whole / name).is_file()
    for name in ("groups", "rewards", "checkpoints", "adapter"):
        assert (whole / name).is_dir()
    steps = [row for row in rows(whole) if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 7))
    needed = {"step", "loss", "loss_rank", "loss_top1", "drift_best", "drift_worst", "grad_norm"}
    assert all(needed <= row.keys() for row in steps)
    assert steps[0]["loss_rank"] == pytest.approx(np.log(6), abs=1e-3)  # k = 3: policy = reference, so ln 3!
    assert [row["step"] for row in rows(whole) if "validation" in row] == [0, 3, 6]


def test_the_summary_has_the_documented_shape(work: Path) -> None:
    summary = json.loads((work / "whole" / "summary.json").read_text())
    kinds = ["verdict", "alarm", "reward", "corrected", "judge", "seconds", "nfe", "steps", "rounds"]
    assert list(summary) == [*kinds, "objective", "model", "prompts", "seed", "digest"]
    for name in ("reward", "corrected"):
        assert list(summary[name]) == ["base", "tuned", "gain", "ci95"]
        assert summary[name]["gain"] == pytest.approx(summary[name]["tuned"] - summary[name]["base"])
        assert len(summary[name]["ci95"]) == 2
    assert all(list(summary["judge"][side]) == ["alignment", "coherence", "style"] for side in ("base", "tuned"))
    assert list(summary["seconds"]) == ["sample", "score", "train", "validate", "evaluate", "total"]
    # 4 prompts x 4 images x 2 steps; 6 steps of 2 groups x 3 images, each once without and once with gradient
    assert summary["nfe"] == {"sample": 32, "train": 6 * 6 * 4}
    assert (summary["steps"], summary["rounds"]) == (6, 1)
    assert all(value > 0 for value in summary["seconds"].values())
    assert summary["prompts"] == {"train": 4, "test": 2}


def test_groups_and_rewards_open_elsewhere(work: Path) -> None:
    files = sorted(map(str, (work / "whole" / "groups").glob("*.parquet")))
    images = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(work / "cache"))
    assert len(images) == 16
    assert images[0]["image"].size == (64, 32)
    rewards = pd.read_parquet(work / "whole" / "rewards" / "my_rewards.redness.parquet")
    assert sorted(rewards["image_id"]) == sorted(images["image_id"])


@pytest.mark.parametrize(
    "watched",
    [
        ["groups/groups-00000.parquet"],
        ["rewards/.my_rewards.redness/groups-00001.parquet", "checkpoints/step-000002"],
        ["validation/step-000003", "evaluation/tuned/groups-00000.parquet", "report.html"],
    ],
    ids=["sample", "score and train", "validation, evaluation and report"],
)
def test_a_killed_run_ends_as_one_never_stopped(work: Path, watched: list[str], tmp_path: Path) -> None:
    """SIGKILL as soon as a file appears, start again, kill at the next: the result is that of the whole run."""
    out = tmp_path / "killed"
    for name in watched:
        command = start(work, "run", "small.yaml", "--out", str(out), slow=True)
        while not (out / name).exists():
            assert command.poll() is None, f"ended before {name}: {command.communicate()}"
            time.sleep(0.002)
        command.kill()
        assert finish(command)[0] == -signal.SIGKILL
    code, err = finish(start(work, "run", "small.yaml", "--out", str(out)))
    assert code == 0, err
    same_result(work / "whole", out)


def test_ctrl_c_ends_with_130_and_how_to_go_on(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "interrupted"

    def heed_sigint() -> None:  # a shell that starts the tests in the background has it ignored, by its children too
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    command = start(work, "run", "small.yaml", "--out", str(out), slow=True, preexec=heed_sigint)
    while not (out / "rewards" / ".my_rewards.redness").exists():
        assert command.poll() is None
        time.sleep(0.01)
    command.send_signal(signal.SIGINT)
    code, err = finish(command)
    assert code == 130
    assert "Traceback" not in err
    assert err.splitlines()[-1] == f"gdro: interrupted; `gdro run small.yaml --out {out}` resumes where it stopped"


def test_stages_one_by_one_are_the_run(work: Path, tmp_path: Path) -> None:
    """Each stage in a process of its own, as a user types them; the later ones take the run's own config.yaml."""
    out = tmp_path / "staged"
    assert finish(start(work, "sample", "small.yaml", "--out", str(out)))[0] == 0
    script = "; ".join(
        f"assert main(['{stage}', '--out', {str(out)!r}]) == 0"
        for stage in ("score", "train", "evaluate", "export", "report")
    )
    command = start(work, program=["-c", f"from gdro.cli import main; {script}"])
    code, err = finish(command)
    assert code == 0, err
    same_result(work / "whole", out)


def test_a_finished_run_is_not_done_again(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = work / "whole"
    kept = ("groups/*", "rewards/*", "checkpoints/*/*", "evaluation.json", "metrics.jsonl")
    before = {path: path.stat().st_mtime_ns for pattern in kept for path in whole.glob(pattern)}
    assert main(["run", str(whole / "config.yaml"), "--out", str(whole)]) == 0
    err = capsys.readouterr().err
    for stage in ("sample", "train", "evaluate"):
        assert f"{stage}: finished before" in err
    assert {path: path.stat().st_mtime_ns for pattern in kept for path in whole.glob(pattern)} == before


def test_another_reward_scores_the_same_images(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "rescored"
    shutil.copytree(work / "whole", out)
    before = digests(out, "groups/*"), (out / "config.yaml").read_text()
    assert main(["score", "--out", str(out), "--reward", "my_rewards:blueness"]) == 0
    assert (digests(out, "groups/*"), (out / "config.yaml").read_text()) == before
    assert {path.name for path in (out / "rewards").glob("*.parquet")} == {
        "my_rewards.redness.parquet",
        "my_rewards.blueness.parquet",
    }


def test_longer_training_goes_on_and_is_evaluated_anew(work: Path, tmp_path: Path) -> None:
    out = tmp_path / "longer"
    shutil.copytree(work / "whole", out)
    evaluation = (out / "evaluation.json").read_text()
    assert main(["run", "--out", str(out), "--train.max_train_steps", "8"]) == 0
    assert [row["step"] for row in rows(out) if "loss" in row] == list(range(1, 9))
    assert rows(out)[: len(rows(work / "whole"))] == rows(work / "whole")
    weights = json.loads((out / "evaluation.json").read_text())["fingerprint"]
    best = json.loads((out / "checkpoints" / "best.json").read_text())["step"]
    assert (weights != json.loads(evaluation)["fingerprint"]) == (best > 6)


HOLDER = "from gdro.runner.directory import *\nwith alone(Path('whole')): print(flush=True); input()"


def test_two_processes_cannot_share_a_run_directory(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER],
        cwd=work,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    assert main(["run", "--out", "whole"]) == 2
    assert "another gdro process is using" in capsys.readouterr().err
    holder.kill()
    holder.wait()
    assert main(["report", "--out", "whole"]) == 0


def test_imported_images_are_trained_on(work: Path, tmp_path: Path) -> None:
    """A folder of images with rewards takes the place of sampling and scoring."""
    folder, out = tmp_path / "images", tmp_path / "imported"
    folder.mkdir()
    lines = []
    for i in range(8):
        value = 30 * i
        Image.new("RGB", (64, 32), (value, value, value)).save(folder / f"{i}.png")
        row = {"file_name": f"{i}.png", "prompt": f'a sign "{i // 4}"', "reward": value / 255, "group": f"g{i // 4}"}
        lines.append(json.dumps(row))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    assert main(["import", str(folder), "--config", "small.yaml", "--out", str(out)]) == 0
    assert main(["run", "--out", str(out)]) == 0
    assert (out / "rewards" / "imported.parquet").exists()
    assert json.loads((out / "summary.json").read_text())["prompts"] == {"train": 2, "test": 2}
    assert load_file(out / "adapter" / "pytorch_lora_weights.safetensors")
    assert not (out / "rewards" / "my_rewards.blueness.parquet").exists()
    assert main(["score", "--out", str(out), "--reward", "my_rewards:blueness"]) == 0
    assert (out / "rewards" / "my_rewards.blueness.parquet").exists()
