"""`engine: ray` on a cluster of this machine: the same files as a local run's, whichever workers are lost."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from small_run import small_run

from gdro.common.errors import UserError
from gdro.models.replica import Replica
from gdro.runner import pipeline
from gdro.runner import state as run_state
from gdro.runner.config import load_config

if find_spec("ray") is None:
    pytest.skip('needs pip install "gdro[ray]"', allow_module_level=True)
import ray

from gdro.runner import ray_engine

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:ray")]

DEADLY = """
import os
import signal


def deadly(images, prompts):
    if os.getpid() != {driver}:
        try:
            os.close(os.open({flag!r}, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), signal.SIGKILL)
    return redness(images, prompts)


def murderous(images, prompts):
    if os.getpid() != {driver}:
        os.kill(os.getpid(), signal.SIGKILL)
    return redness(images, prompts)


def picky(images, prompts):
    with open({calls!r}, "a") as file:
        file.writelines(f"{{prompt.id}}\\n" for prompt in prompts)
    if prompts[0].id == "train2":
        raise KeyError("no such color")
    return [0.5] * len(images)
"""


@dataclass(frozen=True, kw_only=True)
class DeadlyReplica(Replica):
    """Its first model, wherever that is, kills its process halfway through a file of groups."""

    flag: Path

    def load(self) -> Any:
        model = super().load()
        decode = model.decode

        def deadly(*arguments: Any) -> Any:
            images = decode(*arguments)
            try:
                os.close(os.open(self.flag, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return images
            os.kill(os.getpid(), signal.SIGKILL)

        model.decode = deadly
        return model


@pytest.fixture(scope="module")
def config(flux_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """That of a run of 4 files of 4 images, in the current folder. There is a cluster of two workers."""
    folder = tmp_path_factory.mktemp("ray")
    path = small_run(folder, flux_folder)
    with open(folder / "my_rewards.py", "a") as file:
        file.write(DEADLY.format(driver=os.getpid(), flag=str(folder / "scored"), calls=str(folder / "calls.txt")))
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    sys.modules.pop("my_rewards", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(folder)
        patch.setattr(ray_engine.torch, "get_num_threads", lambda: 1)
        patch.delenv("RAY_ADDRESS", raising=False)
        ray.init("local", num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
        yield path
        ray.shutdown()
        sys.modules.pop("my_rewards", None)


def do(config: Path, out: Path, stage: str, **fields: str) -> None:
    overrides = [(name.replace("__", "."), value) for name, value in fields.items()]
    pipeline.run(load_config(config, overrides), out, (stage,))


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def local(config: Path) -> Path:
    """Sampled and scored without Ray."""
    out = config.with_name("local")
    do(config, out, "sample")
    do(config, out, "score", score__reward="my_rewards:deadly")
    return out


def test_a_worker_lost_while_sampling_changes_nothing(
    config: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    flag = tmp_path / "sampled"
    monkeypatch.setattr(run_state, "Replica", partial(DeadlyReplica, flag=flag))
    do(config, tmp_path, "sample", engine="ray")
    assert flag.exists()
    assert files(tmp_path / "groups") == files(local / "groups")
    told = capfd.readouterr().err
    assert "sample: 16/16 img (100 %)" in told
    assert told.count("a worker was lost") == 1


def test_a_worker_lost_while_scoring_changes_nothing(config: Path, local: Path, tmp_path: Path):
    shutil.copytree(local, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "rewards")
    do(config, tmp_path, "score", engine="ray", score__reward="my_rewards:deadly", score__workers="2")
    assert config.with_name("scored").exists()
    assert files(tmp_path / "rewards") == files(local / "rewards")


def test_a_mistake_ends_the_run_with_its_line(config: Path, local: Path, tmp_path: Path):
    """The one a local run ends with; it is not tried again."""
    calls, said = config.with_name("calls.txt"), []
    for engine in ("local", "ray"):
        out = tmp_path / engine
        shutil.copytree(local, out)
        calls.unlink(missing_ok=True)
        with pytest.raises(UserError) as error:
            do(config, out, "score", engine=engine, score__reward="my_rewards:picky")
        said.append((str(error.value), error.value.__notes__))
        assert calls.read_text().split().count("train2") == 4
    assert said[0] == said[1]


def test_what_kills_every_worker_ends_the_run(
    config: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(local, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(ray_engine, "ATTEMPTS", 1)
    with pytest.raises(UserError, match=r"^score: one worker after another died"):
        do(config, tmp_path, "score", engine="ray", score__reward="my_rewards:murderous")


def test_a_run_goes_on_on_the_cluster_at_its_address(config: Path, local: Path, tmp_path: Path):
    """What is there already is kept."""
    shutil.copytree(local, tmp_path, dirs_exist_ok=True)
    kept, lost = tmp_path / "groups" / "groups-00000.parquet", tmp_path / "groups" / "groups-00002.parquet"
    lost.unlink()
    before = kept.stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-m", "gdro", "sample", str(config), "--out", str(tmp_path), "--engine", "ray"],
        env=os.environ | {"RAY_ADDRESS": ray.get_runtime_context().gcs_address, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "sample: 12/16 img done earlier, resuming" in done.stderr
    assert kept.stat().st_mtime_ns == before
    assert files(tmp_path / "groups") == files(local / "groups")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "somewhere"])
def test_an_address_without_a_cluster_is_refused(address: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(UserError, match=f"^RAY_ADDRESS is {address}: .*; expected HOST:PORT"):
        ray_engine.connect()
