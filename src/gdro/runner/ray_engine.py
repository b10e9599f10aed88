"""`engine: ray`: files of groups and their scores, made by the workers of a Ray cluster and written by this process.

A worker does the same unit of work as a local run, in a folder of its own, and returns the bytes of the files. So the
store is where the run is and has one writer, machines need no shared file system, and a lost worker, or even machine,
leaves nothing half done: Ray gives its unit to another, which makes the same bits. The only module that imports ray.
"""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from socket import create_connection, gethostname
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from gdro.common.device import telling
from gdro.common.errors import UserError
from gdro.common.files import write_bytes
from gdro.common.progress import say
from gdro.groups import scoring
from gdro.groups.sampling import ShardJob, make_shard
from gdro.groups.scores import read_scored
from gdro.groups.shard import Shard, read_shard
from gdro.models.base import FlowModel
from gdro.models.replica import Replica
from gdro.rewards.base import Reward

# Ray reads these when it is imported.
if not os.environ.get("RAY_ADDRESS"):  # otherwise a one-machine cluster would be open to others, as it is on Linux
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # it reports Ray Data's own way of starting actors as an error
import ray
import ray.data

ATTEMPTS = 5  # per unit, before it is blamed for killing its workers
PLACE = "place"  # the column with the unit's index


def make_shards(replica: Replica, jobs: Sequence[ShardJob], made: Callable[[int], None]) -> None:
    """Make files of groups, each on a GPU of its own or, without GPUs, on as many cores as torch has threads here.

    `made` is called with the number of images in each finished file. Raises UserError for a worker's UserError.
    """
    connect()
    gpus = 0 if replica.device == "cpu" else int(ray.cluster_resources().get("GPU", 0))
    if replica.device == "cuda" and not gpus:
        raise UserError('device is "cuda", but the Ray cluster offers no GPU; expected "auto" or "cpu"')
    threads = min(torch.get_num_threads(), max(_cores()))
    pool = {"num_gpus": 1} if gpus else {"num_cpus": threads}
    size = gpus or sum(cores // threads for cores in _cores())
    asked = _put(replica), ray.put(list(jobs)), threads
    for place, files in _results(_places(len(jobs)), _Sampler, asked, min(size, len(jobs)), **pool):
        job = jobs[place]
        for name, content in files:
            write_bytes(job.folder / name, content)
        made(len(job.prompts) * job.settings.images_per_prompt)


def score_files(
    reward: Reward,
    shards: Sequence[Shard],
    parts: Path,
    scored: Callable[[np.ndarray], None],
    *,
    workers: int,
    batch_size: int,
) -> None:
    """Like `scoring.score_files`, each file on a core of its own; `workers` 0 means as many as there are cores.

    The files are read here and sent. Workers do not see GPUs.
    """
    connect()
    size = workers or (sum(_cores()) if reward.parallel else 1)
    paths = [shard.path for shard in shards]

    def read(batch: dict[str, np.ndarray]) -> pa.Table:
        return pa.table(
            {PLACE: batch[PLACE], "file": pa.array([paths[i].read_bytes() for i in batch[PLACE]], pa.large_binary())}
        )

    files = _places(len(shards)).map_batches(read, batch_size=1, num_cpus=0, label_selector=_here())
    asked = _put(reward), reward.version, [path.name for path in paths], batch_size
    for _, found in _results(files, _Scorer, asked, min(size, len(shards)), batch_format="pyarrow", num_cpus=1):
        for name, content in found:
            write_bytes(parts / name, content)
            scored(read_scored(parts / name, 0)["score"].to_numpy())


# ---- in the workers


@dataclass(frozen=True)
class RayJob:
    """What every worker needs to know; `folder` is where the run was started."""

    attempts: Any  # the actor that counts them
    limit: int
    folder: str


class _Worker:
    """Does units of work, one at a time.

    It loads what it needs with the first unit, so a failure counts as that unit's and is reported in one line.
    """

    def __init__(self, job: RayJob) -> None:
        self._job = job
        with suppress(OSError):  # another machine need not have it
            os.chdir(job.folder)

    def answer(self, place: int, what: str, work: Callable[[Path], None]) -> pa.Table:
        """A row with the files that `work` writes to its folder, or with the user's mistake."""
        mistake: list[str] | None = None
        files: dict[str, bytes] = {}
        attempt = ray.get(self._job.attempts.begin.remote(place))
        try:
            if attempt > self._job.limit:
                raise UserError(
                    f"{what}: one worker after another died, perhaps out of memory; finished work is kept, run again "
                    "with more memory for each"
                )
            with TemporaryDirectory(prefix="gdro-") as folder, telling(what, [f"a smaller {what}.batch_size"]):
                work(Path(folder))
                # groups-* after the _* files it refers to: they must be written in this order
                files = {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}
        except UserError as error:
            mistake = [str(error), *getattr(error, "__notes__", ())]
        row = {
            PLACE: pa.array([place]),
            "attempt": pa.array([attempt]),
            "mistake": pa.array([mistake], pa.list_(pa.string())),
            "names": pa.array([list(files)], pa.list_(pa.string())),
            "files": pa.array([list(files.values())], pa.list_(pa.large_binary())),
        }
        return pa.table(row)


class _Sampler(_Worker):
    def __init__(self, job: RayJob, replica: Any, shards: Any, threads: int) -> None:
        super().__init__(job)
        self._replica, self._shards, self._threads = replica, shards, threads

    @cached_property
    def model(self) -> FlowModel:
        torch.set_num_threads(self._threads)  # another number would change rounding
        model: FlowModel = _get(self._replica).load()
        return model

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        place = int(batch[PLACE][0])

        def work(folder: Path) -> None:
            shard: ShardJob = ray.get(self._shards)[place]
            if self.model.fingerprint != shard.fingerprint:
                raise UserError(
                    f"model: {self.model.name} has the weights {self.model.fingerprint} on {gethostname()}, "
                    f"{shard.fingerprint} where the run is; expected the same files on every machine"
                )
            make_shard(replace(shard, folder=folder), self.model, lambda: None)

        return self.answer(place, "sample", work)


class _Scorer(_Worker):
    def __init__(self, job: RayJob, reward: Any, version: str, names: Sequence[str], batch_size: int) -> None:
        super().__init__(job)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray would show a worker without a GPU all of them
        self._reward, self._version, self._names, self._batch_size = reward, version, names, batch_size

    @cached_property
    def reward(self) -> Reward:
        reward: Reward = _get(self._reward)
        if reward.version != self._version:
            raise UserError(
                f"score.reward: {reward.name} is of version {reward.version} on {gethostname()}, {self._version} where "
                "the run is; expected the same on every machine"
            )
        return reward

    def __call__(self, batch: pa.Table) -> pa.Table:
        place = batch[PLACE][0].as_py()

        def work(folder: Path) -> None:
            with TemporaryDirectory(prefix="gdro-") as groups:
                path = Path(groups) / self._names[place]
                path.write_bytes(batch["file"][0].as_buffer())
                scoring.score_files(
                    self.reward, [read_shard(path)], folder, lambda _: None, workers=1, batch_size=self._batch_size
                )

        return self.answer(place, "score", work)


@ray.remote(num_cpus=0)
class _Attempts:
    """How often each unit was begun: Ray would retry one that kills its workers forever."""

    def __init__(self) -> None:
        self._begun: Counter[int] = Counter()

    def begin(self, place: int) -> int:
        self._begun[place] += 1
        return self._begun[place]


# ---- the cluster


def connect() -> None:
    """Join the cluster at RAY_ADDRESS or, if that is not set, start one on this machine, on loopback.

    Raises UserError if there is no cluster.
    """
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
        if address:
            host, _, port = address.rpartition(":")
            try:
                create_connection((host, int(port)), timeout=10).close()  # Ray would wait for minutes
                ray.init(address, **quiet)
            except (OSError, ValueError, RuntimeError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"RAY_ADDRESS is {address}: {reason}; expected HOST:PORT of a cluster that this machine is part "
                    "of, with its RAY_AUTH_MODE and token"
                ) from None
        else:
            ray.init("local", _node_ip_address="127.0.0.1", include_dashboard=False, **quiet)
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False


def _put(value: Any) -> Any:
    return ray.put(ray.cloudpickle.dumps(value))


def _get(reference: Any) -> Any:
    """The value given to `_put`. Unpickled here, because Ray would retry if unpickling raised an error there."""
    return ray.cloudpickle.loads(ray.get(reference))


def _cores() -> list[int]:
    """Cores of each machine in the cluster that has any; UserError if none has."""
    found = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]]
    if not any(found):
        raise UserError("engine: the Ray cluster offers no CPU core; expected at least one")
    return [cores for cores in found if cores]


def _here() -> dict[str, str]:
    """The label that selects this machine in the cluster."""
    return {"ray.io/node-id": ray.get_runtime_context().get_node_id()}


def _places(count: int) -> ray.data.Dataset:
    return ray.data.from_items([{PLACE: place} for place in range(count)], override_num_blocks=count)


def _results(
    units: ray.data.Dataset, worker: type[_Worker], asked: tuple[Any, ...], size: int, **pool: Any
) -> Iterator[tuple[int, list[tuple[str, pa.Buffer]]]]:
    """(place, [(name, content) of each file]) of every unit, as they finish, from a pool of `size` workers.

    Raises UserError for the first mistake that a worker reports.
    """
    attempts = _Attempts.options(label_selector=_here()).remote()  # type: ignore[attr-defined]
    job = RayJob(attempts, ATTEMPTS, os.getcwd())
    compute = ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1)
    results = units.map_batches(worker, fn_constructor_args=(job, *asked), batch_size=1, compute=compute, **pool)
    for table in results.iter_batches(batch_size=None, batch_format="pyarrow"):
        for row in range(len(table)):
            mistake = table["mistake"][row].as_py()
            if mistake is not None:
                error = UserError(mistake[0])
                for note in mistake[1:]:
                    error.add_note(note)
                raise error
            if table["attempt"][row].as_py() > 1:
                say("ray: a worker was lost; its work was redone")
            contents = [content.as_buffer() for content in table["files"][row].values]
            yield table[PLACE][row].as_py(), list(zip(table["names"][row].as_py(), contents, strict=True))
