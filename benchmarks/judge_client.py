"""The judge's client against a server that fails one request in five, killed -9 five times; and its requests a second.

    python benchmarks/judge_client.py [--requests 10000] [--kills 5] [--concurrency 32] [--out FILE]

Every image's pixels say which it is, and the server's scores follow from them, so a score given to another image would
show. The server is the tests' (`tests/rewards/fake_endpoint.py`), in this process; clients are processes of their own.
"""

import argparse
import json
import os
import random
import resource
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fake_endpoint import Asked, FakeEndpoint, Said  # type: ignore[import-not-found]

from gdro.common.prompts import Prompt
from gdro.rewards.judges.unified import POINTWISE, unified_reward

BATCH = 500  # images a call


def picture(index: int, side: int) -> Image.Image:
    return Image.new("RGB", (side, side), (index >> 16, index >> 8 & 255, index & 255))


def axes(index: int) -> tuple[float, float, float]:
    """Scores of that image, 1.00 to 5.00."""
    alignment, coherence, style = ((index * k) % 401 / 100 + 1 for k in (1, 7, 13))
    return alignment, coherence, style


def reply(index: int) -> str:
    lines = zip(("Alignment", "Coherence", "Style"), axes(index), strict=True)
    return "\n".join(f"{name} Score (1-5): {value:.2f}" for name, value in lines)


class Judge:
    """What the server says: each image's scores, but to a share of the requests something else."""

    def __init__(self, failing: float, slow: float) -> None:
        self.failing, self.slow = failing, slow
        self.asked: list[int] = []  # images, as they came
        self.answered: set[int] = set()
        self.faults: Counter[str] = Counter()

    def __call__(self, asked: Asked) -> Said:
        red, green, blue = asked.images[0].getpixel((0, 0))
        index = red << 16 | green << 8 | blue
        asked.body["messages"].clear()  # 10,000 of them need not stay in memory
        self.asked.append(index)
        chance = random.Random(asked.number)
        if chance.random() >= self.failing:
            self.answered.add(index)
            return Said(reply(index))
        faults = {
            "500": Said(status=500, raw=b"{}"),
            "429": Said(status=429, raw=b"{}", headers={"Retry-After": "1"}),
            "reset": Said(reset=True),
            "slow": Said(reply(index), delay=self.slow),
            "garbage": Said("A fine picture."),
            "truncated": Said(reply(index)[:-1], finish_reason="length"),
            "nan": Said(reply(index)[:-4] + "nan"),
        }
        name = chance.choice(list(faults))
        self.faults[name] += 1
        return faults[name]


def client(url: str, cache: str, out: str, requests: int, concurrency: int, timeout: float, side: int) -> None:
    """Score all images; write [index, score or null] of each and the seconds it took."""
    reward = unified_reward(url=url, model="judge", cache=cache, concurrency=concurrency, timeout=timeout)
    start, used, rows = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF), []
    for first in range(0, requests, BATCH):
        part = range(first, min(first + BATCH, requests))
        scores = reward([picture(i, side) for i in part], [Prompt(str(i), "a picture") for i in part])
        rows += [[i, None if np.isnan(v) else v] for i, v in zip(part, scores.values.tolist(), strict=True)]
    now = resource.getrusage(resource.RUSAGE_SELF)
    cpu = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    Path(out).write_text(json.dumps({"rows": rows, "seconds": time.perf_counter() - start, "cpu_seconds": cpu}))


def start_client(folder: Path, url: str, *settings: float) -> subprocess.Popen[bytes]:
    where = [url, str(folder / "judge.sqlite"), str(folder / "scores.json")]
    return subprocess.Popen([sys.executable, __file__, "client", *where, *map(str, settings)])


def kept(folder: Path, requests: int) -> set[int]:
    """The images whose replies are in the client's file of replies."""
    endpoint = unified_reward(url="http://localhost", model="judge").endpoint
    with sqlite3.connect(folder / "judge.sqlite") as file:
        keys = {key for (key,) in file.execute("SELECT key FROM replies")}
    ask = POINTWISE["2.0"].question
    return {i for i in range(requests) if endpoint._key(ask(Prompt(str(i), "a picture"), picture(i, 8))) in keys}


def killed(folder: Path, *, requests: int, kills: int, concurrency: int, timeout: float = 5.0) -> dict[str, Any]:
    """Score `requests` images; the client is killed when certain numbers of them were answered, and begun again."""
    judge = Judge(failing=0.2, slow=2 * timeout)
    moments = sorted(random.Random(0).sample(range(requests // 20, requests * 19 // 20), kills))
    kept_then: list[tuple[int, set[int]]] = []  # at each kill: requests so far, images whose reply was kept
    start = time.perf_counter()
    with FakeEndpoint(judge) as server:
        for moment in moments:
            process = start_client(folder, server.url, requests, concurrency, timeout, 8)
            while len(judge.answered) < moment:
                if process.poll() is not None:
                    raise RuntimeError(f"the client ended by itself, with {process.returncode}")
                time.sleep(0.005)
            process.kill()
            process.wait()
            kept_then.append((len(judge.asked), kept(folder, requests)))
        if start_client(folder, server.url, requests, concurrency, timeout, 8).wait() != 0:
            raise RuntimeError("the client failed")
    rows = json.loads((folder / "scores.json").read_text())["rows"]
    if [index for index, _ in rows] != list(range(requests)):
        raise RuntimeError("not one row an image")
    scored = [(index, score) for index, score in rows if score is not None]
    return {
        "images": requests,
        "kills": len(moments),
        "scored": len(scored),
        "missing": requests - len(scored),
        "wrong": sum(abs(score - sum(axes(index)) / 3) > 1e-9 for index, score in scored),
        "requests": len(judge.asked),
        "faults": dict(judge.faults),
        "kept_at_kills": [len(images) for _, images in kept_then],
        "asked_again_though_kept": sum(
            index in images for requests_then, images in kept_then for index in judge.asked[requests_then:]
        ),
        "concurrency": concurrency,
        "seconds": round(time.perf_counter() - start, 1),
    }


def rate(folder: Path, *, requests: int, concurrency: int, side: int) -> dict[str, Any]:
    """Requests a second to a server that answers at once, and the client's own time; then again, from the cache."""
    result: dict[str, Any] = {"images": requests, "side": side, "concurrency": concurrency}
    with FakeEndpoint(Judge(failing=0.0, slow=0.0)) as server:
        for what in ("asked", "cached"):
            if start_client(folder, server.url, requests, concurrency, 60, side).wait() != 0:
                raise RuntimeError("the client failed")
            took = json.loads((folder / "scores.json").read_text())
            result[f"{what}_per_second"] = round(requests / took["seconds"], 1)
            result[f"{what}_cpu_ms"] = round(1000 * took["cpu_seconds"] / requests, 3)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "judge_client.json")
    args = parser.parse_args()
    results: dict[str, Any] = {"cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as folder:
        results["killed"] = killed(Path(folder), requests=args.requests, kills=args.kills, concurrency=args.concurrency)
    results["rate"] = []
    for side, count in ((64, 2000), (512, 300), (1024, 64)):
        with tempfile.TemporaryDirectory() as folder:
            results["rate"].append(rate(Path(folder), requests=count, concurrency=args.concurrency, side=side))
    args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))


if __name__ == "__main__":
    if sys.argv[1:2] == ["client"]:
        url, cache, out, requests, concurrency, timeout, side = sys.argv[2:]
        client(url, cache, out, int(requests), int(concurrency), float(timeout), int(side))
    else:
        main()
