"""Several processes: the same groups, losses and adapter as one, whatever their number; an end of one ends the run."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import Ended, Job, launch
from run_files import rows, weights
from small_run import small_run

pytestmark = pytest.mark.slow

MOODY = """

import os
from pathlib import Path


def moody(images, prompts):
    mood = os.environ.get("MOOD") if os.environ.get("RANK") == "1" else None
    if mood == "refuse":
        return [float("nan")] * len(images)
    if mood == "die" and Path("killed/checkpoints/step-000002").exists():
        os.kill(os.getpid(), 9)
    return redness(images, prompts)
"""
ONLINE = """
sample: {sampler: flow_grpo, num_inference_steps: 3}
train: {objective: flow_grpo, max_train_steps: 2, validation_steps: 0, validation_prompts: null}
rounds: {train_steps: 1, prompts: 3}
"""
MIXED = """
sample: {buckets: [[32, 32]]}
train: {reference_draws: 2, group_gradient: two_pass, images_per_pass: 2, max_train_steps: 4, validation_steps: 0}
"""


def configured(folder: Path, model: Path) -> None:
    """Files of three prompts and of one, so that two processes have unequal shares and of four two have none."""
    path = small_run(folder, model)
    data: dict[str, Any] = yaml.safe_load(path.read_text())
    data["sample"] |= {"prompts_per_shard": 3, "batch_size": 4}
    data["train"] |= {"groups_per_step": 4, "learning_rate": 2e-3}
    data["score"]["reward"] = "my_rewards:moody"
    path.write_text(yaml.safe_dump(data))
    for name, sections in (("online", ONLINE), ("mixed", MIXED)):
        changed = {section: data.get(section, {}) | fields for section, fields in yaml.safe_load(sections).items()}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data | changed))
    with open(folder / "my_rewards.py", "a") as file:
        file.write(MOODY)


def gdro(out: str, *more: str, config: str = "small.yaml", until: str = "train") -> list[str]:
    return ["run", config, "--out", out, "--until", until, *more]


def told(ended: Ended) -> list[str]:
    """The lines that say why a run ended, of all its processes."""
    return [line for line in ended.said.splitlines() if line.startswith("gdro: ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, flux_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    configured(folder, flux_folder)
    return folder


@pytest.fixture(scope="module")
def killed(folder: Path) -> subprocess.CompletedProcess[str]:
    """A run under torchrun, one of whose processes is killed while it is validated at step 3."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "gdro"]
    return subprocess.run(
        [*launcher, *gdro("killed", "--sample.prompts_per_shard", "1")],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MOOD": "die"},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def ended(folder: Path, killed: subprocess.CompletedProcess[str]) -> dict[str, Ended]:
    short, fsdp = ("--train.max_train_steps", "3"), ("--distributed", "fsdp")
    return launch(
        folder,
        {
            "one": Job(0, gdro("one", until="evaluate")),
            "two": Job(2, gdro("two", until="evaluate")),
            "four": Job(4, gdro("four")),
            "fsdp": Job(2, gdro("fsdp", *fsdp, "--train.gradient_checkpointing", "true", until="evaluate")),
            "begun by one": Job(0, gdro("up", *short)),
            "ended by two": Job(2, gdro("up")),
            "online one": Job(0, gdro("online-one", config="online.yaml")),
            "online two": Job(2, gdro("online-two", config="online.yaml")),
            "online fsdp": Job(2, gdro("online-fsdp", *fsdp, config="online.yaml")),
            "mixed one": Job(0, gdro("mixed-one", config="mixed.yaml")),
            "mixed fsdp": Job(2, gdro("mixed-fsdp", *fsdp, config="mixed.yaml")),
            "killed goes on": Job(0, gdro("killed")),
            "three": Job(3, gdro("three")),
            "refusing": Job(2, gdro("refusing", until="score"), {"MOOD": "refuse"}),
            "not for several": Job(2, ["rewards"]),
        },
    )


@pytest.mark.parametrize("name", ["two", "four", "fsdp"])
def test_groups_and_rewards_are_the_same_bits(ended: dict[str, Ended], folder: Path, name: str) -> None:
    assert ended[name].codes == [0] * len(ended[name].codes), ended[name].said
    for inside in ("groups", "rewards"):
        files = {path.name: path.read_bytes() for path in (folder / "one" / inside).iterdir()}
        assert {path.name for path in (folder / name / inside).iterdir()} == files.keys()
        assert all((folder / name / inside / file).read_bytes() == data for file, data in files.items())


@pytest.mark.parametrize(
    ("whole", "name"),
    [
        ("one", "two"),
        ("one", "four"),
        ("one", "fsdp"),
        ("one", "up"),
        ("online-one", "online-two"),
        ("online-one", "online-fsdp"),
        ("mixed-one", "mixed-fsdp"),
    ],
)
def test_losses_and_adapter_are_those_of_one_process(
    ended: dict[str, Ended], folder: Path, whole: str, name: str
) -> None:
    """Also of a run that goes on with another number, and where the groups of a step do not go round."""
    failed = {
        job: one.said for job, one in ended.items() if job.startswith(("ended", "online", "mixed")) and any(one.codes)
    }
    assert not failed
    one, other = rows(folder / whole), rows(folder / name)
    assert len(one) == len(other)
    for expected, found in zip(one, other, strict=True):
        if "validation" in expected:
            expected, found = expected["validation"], found["validation"]
            assert found["nfe"] == expected["nfe"]
        figures = expected.keys() - {"images_per_second", "seconds", "nfe", "alarm"}
        assert {key: found[key] for key in figures} == pytest.approx({key: expected[key] for key in figures}, abs=1e-4)
    last = one[-1]["step"]
    expected, found = weights(folder / whole, last), weights(folder / name, last)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-3, atol=2e-5, equal_nan=True, msg=key)
    moved = [value.abs().max() for key, value in expected.items() if ".lora_B." in key and key.startswith("adapter")]
    assert min(moved) > 1e-3, "every layer has learned more than the tolerance"


def test_each_process_writes_its_share_of_a_checkpoint(ended: dict[str, Ended], folder: Path) -> None:
    sizes = {
        name: [path.stat().st_size for path in (folder / "four/checkpoints/step-000006").glob(f"{name}-*-of-00004.*")]
        for name in ("adapter", "ema", "optimizer")
    }
    assert [len(parts) for parts in sizes.values()] == [4, 4, 4]
    assert max(sizes["optimizer"]) < 0.4 * sum(sizes["optimizer"])


@pytest.mark.parametrize("name", ["two", "fsdp"])
def test_evaluation_is_that_of_one_process(ended: dict[str, Ended], folder: Path, name: str) -> None:
    one, other = (yaml.safe_load((folder / out / "evaluation.json").read_text()) for out in ("one", name))
    assert other["base"] == one["base"]
    for result in ("reward", "corrected"):
        assert other["results"][result]["tuned"] == pytest.approx(one["results"][result]["tuned"], abs=1e-4)


def test_only_the_first_process_speaks(ended: dict[str, Ended]) -> None:
    said = ended["four"].said
    assert said.count("2 files for 4 processes; a smaller sample.prompts_per_shard keeps all busy") == 1
    assert said.count("train: 6/6 step") == 1


def test_groups_that_do_not_go_round_are_refused_before_anything_is_done(ended: dict[str, Ended], folder: Path) -> None:
    assert told(ended["three"]) == ["gdro: train.groups_per_step is 4; expected a multiple of the 3 processes"]
    assert ended["three"].codes[0] == 2
    assert 0 not in ended["three"].codes
    assert not (folder / "three" / "groups").exists()


def test_a_mistake_met_by_one_process_ends_all_with_its_one_line(ended: dict[str, Ended]) -> None:
    codes, said = ended["refusing"].codes, ended["refusing"].said
    assert codes[1] == 2
    assert codes[0] not in (0, 2)
    (line,) = told(ended["refusing"])
    assert '"train3/' in line
    assert "expected a finite number" in line
    assert "Traceback" not in said


def test_commands_of_one_process_are_refused(ended: dict[str, Ended]) -> None:
    said = "gdro: WORLD_SIZE is 2, but gdro rewards is one process; expected it without a launcher"
    assert told(ended["not for several"]) == [said]


def test_a_killed_process_ends_the_run_under_torchrun_and_the_run_goes_on(
    killed: subprocess.CompletedProcess[str], ended: dict[str, Ended], folder: Path
) -> None:
    assert killed.returncode == 1
    assert f"Signal {signal.SIGKILL.value} (SIGKILL)" in killed.stderr
    assert ended["killed goes on"].codes == [0], ended["killed goes on"].said
    assert "train: 2/6 step done earlier, resuming" in ended["killed goes on"].said
    one, other = weights(folder / "one", 6), weights(folder / "killed", 6)
    for key, value in one.items():
        torch.testing.assert_close(other[key], value, rtol=1e-3, atol=2e-5, msg=key)
