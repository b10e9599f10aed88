"""Runs of `gdro` in several processes that find each other as under torchrun, from one import of everything.

`launch` starts this file once; it forks the processes of each job in turn, with the launcher's environment variables.
"""

import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Job:
    """`gdro ARGUMENTS` in so many processes; 0: in one that no launcher started."""

    processes: int
    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    codes: list[int]  # of each process; minus the signal that ended it
    said: str  # stderr of all


def launch(folder: Path, jobs: dict[str, Job]) -> dict[str, Ended]:
    """Do the jobs one after the other in `folder`."""
    plain = [[job.processes, list(job.arguments), job.environment] for job in jobs.values()]
    done = subprocess.run(
        [sys.executable, __file__],
        input=json.dumps(plain),
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
        check=True,
    )
    return {name: Ended(**ended) for name, ended in zip(jobs, json.loads(done.stdout), strict=True)}


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _ended(processes: int, arguments: list[str], environment: dict[str, str]) -> dict[str, object]:
    log, port = Path("processes.log"), _free_port()
    log.write_bytes(b"")
    children = []
    for rank in range(max(1, processes)):
        child = os.fork()
        if child:
            children.append(child)
            continue
        launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        launcher |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update(environment | ({name: str(value) for name, value in launcher.items()} if processes else {}))
        handle = os.open(log, os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        code = 1
        try:
            from gdro.cli import main

            code = main(arguments)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    return {"codes": codes, "said": log.read_text()}


if __name__ == "__main__":
    import diffusers  # noqa: F401
    import transformers  # noqa: F401
    from diffusers import FluxPipeline  # noqa: F401

    import gdro.models.flux
    import gdro.runner.pipeline
    import gdro.stages.export  # noqa: F401

    print(json.dumps([_ended(*job) for job in json.load(sys.stdin)]))
