"""Finished evaluations whose images tell, pixel by pixel, what they are of; and a study of them served for real."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image

from gdro.common.prompts import Prompt
from gdro.groups.store import GroupWriter, ImageRow
from gdro.tools.arena.blind import Arena
from gdro.tools.arena.pairs import draw_pairs, open_models
from gdro.tools.arena.server import Server
from gdro.tools.arena.votes import Votes

WIDTH, HEIGHT = 64, 32
PROMPTS = (
    'a sign that says "hello"',
    "<script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\"> & <b>bold</b>",
    'لافتة مكتوب عليها "مرحبا" بجانب الباب',
    'שלט עם המילה "שלום" ליד הדלת',
    "a poster with the words “it's fine”\nand a second line </p></body>",
    "a blue cup on a table",
)
ARENA = (
    "import json, sys; from pathlib import Path; from gdro.tools.arena.server import arena; "
    "options = json.loads(sys.argv[1]); runs = [Path(run) for run in options.pop('runs')]; "
    "print(arena(runs, Path(options.pop('out')), **options))"
)


def color(model: int, group: int, index: int) -> tuple[int, int, int]:
    return 60 + 60 * model, 40 * group, 30 + 100 * index


def read_color(pixel: Sequence[int]) -> tuple[int, int, int]:
    """(model, group, index) of a color."""
    return (pixel[0] - 60) // 60, pixel[1] // 40, (pixel[2] - 30) // 100


def write_store(
    folder: Path, model: int, *, prompts: Sequence[str] = PROMPTS, images: int = 2, seed: int = 7, width: int = WIDTH
) -> Path:
    rows = [
        ImageRow(
            group_id=f"p{place}",
            index=index,
            prompt=Prompt(f"p{place}", text),
            image=Image.new("RGB", (width, HEIGHT), color(model, place, index)),
            latent=torch.zeros(1, 1),
            seed=seed,
            scheduler="FlowMatchEulerDiscreteScheduler",
            num_inference_steps=4,
            guidance_scale=3.5,
            max_sequence_length=16,
            height=HEIGHT,
            width=width,
            generator="telltale-generator",
            revision=f"telltale-revision-{model}",
            round=0,
        )
        for place, text in enumerate(prompts)
        for index in range(images)
    ]
    GroupWriter(folder).write_shard(0, rows, {f"p{place}": {"e": torch.zeros(1, 1)} for place in range(len(prompts))})
    return folder


def write_run(folder: Path, base: int = 0, tuned: int = 1, *, prompts: Sequence[str] = PROMPTS) -> Path:
    write_store(folder / "evaluation" / "base", base, prompts=prompts)
    write_store(folder / "evaluation" / "tuned", tuned, prompts=prompts)
    (folder / "evaluation.json").write_text("{}")
    return folder


@contextmanager
def serving(runs: Sequence[Path], out: Path, rater: str | None = None) -> Iterator[tuple[Server, Votes]]:
    """A study of every prompt once, served by a thread."""
    models = open_models(runs)
    out.mkdir()
    votes = Votes(out, begin=True)
    votes.begin({model.name: "d" for model in models}, draw_pairs(models, None, seed=0), 0)
    study = votes.study()
    assert study is not None
    with Server(("127.0.0.1", 0), Arena(models, votes, study), rater) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server, votes
        server.shutdown()
        thread.join()
    votes.close()


class Process:
    """`gdro arena` in a process of its own, up to the line with its address."""

    def __init__(self, runs: Sequence[Path], out: Path, **options: object) -> None:
        given = json.dumps({"runs": [str(run) for run in runs], "out": str(out), "port": 0, **options})
        self.process = subprocess.Popen(
            [sys.executable, "-c", ARENA, given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert self.process.stderr is not None
        line = self.process.stderr.readline()
        found = re.search(r"http://\S+", line)
        if found is None:
            self.process.kill()
            raise AssertionError(f"gdro arena did not start: {line}{self.process.stderr.read()}")
        self.url = found[0]

    def stop(self, signal: int) -> tuple[str, str]:
        """(stdout, stderr) after the signal."""
        self.process.send_signal(signal)
        return self.process.communicate(timeout=30)
