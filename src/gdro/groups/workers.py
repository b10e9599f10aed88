"""Scoring in several processes. Does not import torch, so workers start fast and stay small."""

import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import ModuleType
from typing import Protocol, TypeVar

import numpy as np
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.rewards.base import ImageFailure, Reward, Scores

Loaded = tuple[list[str], list[Image.Image], list[Prompt]]
"""Image ids, images, each image's prompt."""


class ScoreJob(Protocol):
    """Images to score; picklable."""

    def load(self) -> Loaded:
        """(image ids, images, each image's prompt)."""


J = TypeVar("J", bound=ScoreJob)


def score_images(reward: Reward, loaded: Loaded, batch_size: int) -> tuple[list[str], Scores]:
    """(image ids, scores), `batch_size` images or one group at a time. Raises ImageFailure naming the image."""
    ids, images, prompts = loaded
    values, evidence = [], []
    for part in _parts(ids, None if getattr(reward, "grouped", False) else batch_size):
        start = part.start
        try:
            scores = reward(images[part], prompts[part])
        except ImageFailure as failure:
            raise ImageFailure(failure.index, f'"{ids[start + failure.index]}": {failure.reason}') from failure
        except Exception as error:
            error.add_note(f'while "{ids[part][0]}" to "{ids[part][-1]}" were scored')
            raise
        values.append(scores.values)
        evidence += scores.evidence
    return ids, Scores(np.concatenate(values), evidence)


def _parts(ids: Sequence[str], size: int | None) -> Iterator[slice]:
    """Runs of `size` images, or one per group; ids are `<group>/<index>`, with each group's images adjacent."""
    start = 0
    while start < len(ids):
        stop = start + (size or 1)
        group = ids[start].rpartition("/")[0]
        while size is None and stop < len(ids) and ids[stop].rpartition("/")[0] == group:
            stop += 1
        yield slice(start, stop)
        start = stop


def score_all(
    reward: Reward, jobs: Sequence[J], batch_size: int, workers: int
) -> Iterator[tuple[J, list[str], Scores]]:
    """(job, image ids, scores) of every job, in the order they finish; a single worker is this process itself.

    Raises UserError if a worker process dies, or the reward cannot be sent to one.
    """
    if workers == 1:
        for job in jobs:
            yield job, *score_images(reward, job.load(), batch_size)
        return
    context = multiprocessing.get_context("spawn")  # forked processes inherit locks that torch and ONNX Runtime hold
    with ProcessPoolExecutor(workers, context, _start, (reward, batch_size)) as pool:
        with _apart_from_main():
            _check_sendable(reward)
            futures = {pool.submit(_score, job): job for job in jobs}
        try:
            for future in as_completed(list(futures)):
                yield futures[future], *future.result()
        except BrokenProcessPool:
            raise UserError(
                "score: a worker process died, perhaps out of memory; finished work is kept, run again or with fewer "
                "score.workers"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextmanager
def _apart_from_main() -> Iterator[None]:
    """Within it, new processes do not import the program's main module.

    Importing runs it again, so a script without `if __name__ == "__main__"` would start over in each of them.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _check_sendable(reward: Reward) -> None:
    try:
        pickle.dumps(reward)
    except Exception as error:  # anything, depending on the user's class
        raise UserError(
            f'reward "{reward.name}" cannot be sent to worker processes ({error}); expected score.workers 1, or its '
            "class in a module of its own rather than in the script or notebook"
        ) from error


_work: tuple[Reward, int]


def _start(reward: Reward, batch_size: int) -> None:
    global _work
    _work = reward, batch_size
    os.environ["OMP_NUM_THREADS"] = "1"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends the workers
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    """A killed parent cannot end its workers, which would wait for work forever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _score(job: ScoreJob) -> tuple[list[str], Scores]:
    reward, batch_size = _work
    return score_images(reward, job.load(), batch_size)
