"""The score stage: every image once, whatever the batch, the workers, an interruption or an extension."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from pydantic import ValidationError

from gdro.common.errors import UserError
from gdro.common.prompts import Prompt
from gdro.groups.scores import read_header, read_rewards, write_rewards
from gdro.groups.store import GroupStore, GroupWriter, ImageRow
from gdro.rewards.base import Scores
from gdro.rewards.registry import load_reward
from gdro.rewards.winrate import WinRate
from gdro.stages.score import ScoreConfig, score

SIZES = {"a": 3, "b": 2, "c": 4, "d": 3, "e": 1}
SHARDS = [["a", "b"], ["c"], ["d", "e"]]
BRIGHTNESS = """
def brightness(images, prompts):
    with open("calls.txt", "a") as file:
        file.writelines(f"{prompt.id}\\n" for prompt in prompts)
    return [image.getpixel((0, 0))[0] / 100 for image in images]
"""


def picture(value: int, word: str = "") -> Image.Image:
    image = Image.new("RGB", (64, 32), (value, 200, 200))
    ImageDraw.Draw(image).text((8, 6), word, font=ImageFont.load_default(18), fill="black")
    return image


def write_shard(folder: Path, i: int, groups: list[str], offset: int = 0) -> None:
    """Image n of a group is n + 1 (+ offset) bright; its prompt asks for HELP, which it shows if n is even."""
    rows = [
        ImageRow(
            group_id=group,
            index=n,
            prompt=Prompt(f"prompt-{group}", 'a sign that says "help"'),
            image=picture(n + 1 + offset, "HELP" if n % 2 == 0 else ""),
            latent=torch.zeros(1, 1),
            seed=0,
            scheduler="s",
            num_inference_steps=1,
            guidance_scale=1.0,
            max_sequence_length=1,
            height=32,
            width=64,
            generator="g",
            revision="r",
            round=0,
        )
        for group in groups
        for n in range(SIZES[group])
    ]
    GroupWriter(folder).write_shard(i, rows, {group: {"t": torch.zeros(1, 1)} for group in groups})


@pytest.fixture
def groups(tmp_path: Path) -> Path:
    for i, shard in enumerate(SHARDS):
        write_shard(tmp_path / "groups", i, shard)
    return tmp_path / "groups"


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Callable[[str], str]:
    """Writes a module of rewards into the current directory and returns its name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    name = "own_" + "".join(c if c.isalnum() else "_" for c in request.node.name)

    def write(source: str) -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def calls() -> list[str]:
    path = Path("calls.txt")
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


def brightness_of(store: GroupStore) -> dict[str, list[float]]:
    return {g: [(n + 1) / 100 for n in range(SIZES[g])] for g in store.group_ids}


@pytest.mark.parametrize(
    ("batch_size", "workers"), [(1, 1), (5, 1), (64, 0), pytest.param(3, 2, marks=pytest.mark.slow)]
)
def test_every_image_is_scored_once(
    groups: Path, tmp_path: Path, own: Callable[[str], str], batch_size: int, workers: int
) -> None:
    reward = load_reward(f"{own(BRIGHTNESS)}:brightness")
    config = ScoreConfig(reward="x", batch_size=batch_size, workers=workers)
    path = score(config, reward, groups, tmp_path / "rewards")
    assert path == tmp_path / "rewards" / f"{reward.name}.parquet"
    assert sorted(calls()) == sorted(f"prompt-{g}" for g, size in SIZES.items() for _ in range(size))
    store = GroupStore(groups)
    rewards = read_rewards(path, store)
    assert {g: r.tolist() for g, r in rewards.items()} == brightness_of(store)
    assert all(r.dtype == torch.float64 for r in rewards.values())
    table = pq.read_table(path)
    assert table["image_id"].to_pylist() == [i for g in store.group_ids for i in store.image_ids(g)]
    assert set(table["version"].to_pylist()) == {reward.version}
    assert [p.name for p in (tmp_path / "rewards").iterdir()] == [path.name]


def test_rerun_scores_nothing_and_an_extension_only_what_is_new(
    groups: Path, tmp_path: Path, own: Callable[[str], str]
) -> None:
    reward = load_reward(f"{own(BRIGHTNESS)}:brightness")
    config, out = ScoreConfig(), tmp_path / "rewards"
    (groups / "groups-00002.parquet").rename(tmp_path / "later.parquet")
    path = score(config, reward, groups, out)
    assert len(calls()) == 9
    before = path.read_bytes()
    score(config, reward, groups, out)
    assert calls() == []
    assert path.read_bytes() == before
    (tmp_path / "later.parquet").rename(groups / "groups-00002.parquet")
    score(config, reward, groups, out)
    assert sorted(calls()) == ["prompt-d"] * 3 + ["prompt-e"]
    store = GroupStore(groups)
    assert {g: r.tolist() for g, r in read_rewards(path, store).items()} == brightness_of(store)


def test_new_images_and_new_versions_are_scored_again(groups: Path, tmp_path: Path, own: Callable[[str], str]) -> None:
    name = own(BRIGHTNESS)
    config, out = ScoreConfig(), tmp_path / "rewards"
    path = score(config, load_reward(f"{name}:brightness"), groups, out)
    calls()
    write_shard(groups, 1, SHARDS[1], offset=50)
    with pytest.raises(UserError, match=r"has rewards for a different groups-00001.parquet"):
        read_rewards(path, GroupStore(groups))
    score(config, load_reward(f"{name}:brightness"), groups, out)
    assert calls() == ["prompt-c"] * 4
    assert read_rewards(path, GroupStore(groups))["c"].tolist() == [0.51, 0.52, 0.53, 0.54]
    own(BRIGHTNESS + "# another version\n")
    score(config, load_reward(f"{name}:brightness"), groups, out)
    assert len(calls()) == 13


@pytest.mark.slow
def test_ocr_in_workers_equals_ocr_here(groups: Path, tmp_path: Path) -> None:
    """The evidence too; the words in the pictures are read."""
    reward = load_reward("ocr")
    here = score(ScoreConfig(workers=1), reward, groups, tmp_path / "here")
    there = score(ScoreConfig(workers=2, batch_size=4), reward, groups, tmp_path / "there")
    assert pq.read_table(here).equals(pq.read_table(there))
    assert read_rewards(here, GroupStore(groups))["c"].tolist() == [1.0, 0.0, 1.0, 0.0]
    evidence = json.loads(pq.read_table(here)["evidence"][0].as_py())
    assert evidence["text"].lower() == "help"
    assert evidence["confidence"] > 0.5


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_name_the_image_and_keep_what_is_finished(
    groups: Path, tmp_path: Path, own: Callable[[str], str], workers: int
) -> None:
    """Group d's second image is NaN until the function is mended; the mended one has another version."""
    name = own(
        "def f(images, prompts):\n"
        "    d = [p.id == 'prompt-d' and i.getpixel((0, 0))[0] == 2 for i, p in zip(images, prompts)]\n"
        "    return [float('nan') if bad else 1.0 for bad in d]\n"
    )
    with pytest.raises(UserError, match=rf'"d/1": reward "{name}:f" returned nan; expected a finite number'):
        score(ScoreConfig(workers=workers, batch_size=2), load_reward(f"{name}:f"), groups, tmp_path / "rewards")
    assert not (tmp_path / "rewards" / f"{name}.f.parquet").exists()


@pytest.mark.slow
def test_what_the_function_raises_names_the_images(groups: Path, tmp_path: Path, own: Callable[[str], str]) -> None:
    name = own("def f(images, prompts):\n    raise ZeroDivisionError('mine')\n")
    with pytest.raises(UserError, match="raised ZeroDivisionError: mine") as error:
        score(ScoreConfig(workers=2, batch_size=2), load_reward(f"{name}:f"), groups, tmp_path / "rewards")
    assert re.fullmatch(r'while "(\w)/0" to "\1/1" were scored', *error.value.__notes__)


@dataclass
class Moody:
    """Answers nothing, or everything."""

    answers: bool
    silent_on: frozenset[str] = frozenset()
    name, version, parallel = "moody", "1", False

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        shown = [f"{prompt.id}/{image.getpixel((0, 0))[0] - 1}" for image, prompt in zip(images, prompts, strict=True)]
        with open("asked.txt", "a") as file:
            file.writelines(f"{image}\n" for image in shown)
        values = [1.0 if self.answers and image not in self.silent_on else np.nan for image in shown]
        return Scores(np.array(values), [{"missing": "asleep"} for _ in images])


def test_where_no_image_has_a_score_the_next_run_asks_again(
    groups: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for limit in (0.1, 1.0):
        with pytest.raises(UserError, match=r'"moody" gave 13 of 13 images no score; for the first it says .*asleep'):
            score(ScoreConfig(max_missing=limit), Moody(answers=False), groups, tmp_path / "rewards")
        assert not list((tmp_path / "rewards").rglob("*.parquet"))
    path = score(ScoreConfig(), Moody(answers=True), groups, tmp_path / "rewards")
    assert all((values == 1).all() for values in read_rewards(path, GroupStore(groups)).values())


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "lost"), [(0.0, 0), (0.05, 1), (0.1, 1), (0.16, 2), (0.3, 3), (1.0, 12)])
def test_a_share_of_missing_scores_is_tolerated_and_above_it_only_files_with_gaps_are_scored_again(
    groups: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    limit: float,
    lost: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    images = [f"prompt-{group}/{i}" for group in "edcba" for i in range(SIZES[group])]
    config = ScoreConfig(max_missing=limit)
    path = score(config, Moody(True, frozenset(images[:lost])), groups, tmp_path / "rewards")
    scores = np.concatenate([values.numpy() for values in read_rewards(path, GroupStore(groups)).values()])
    assert np.isnan(scores).sum() == lost
    assert (f"{lost} of 13 images have no score" in capsys.readouterr().err) == bool(lost)
    (tmp_path / "asked.txt").unlink()

    again = tmp_path / "again"
    said = rf"gave {lost + 1} of 13 images no score; .*asleep.* at most {100 * limit:g} % \(score.max_missing\)"
    with pytest.raises(UserError, match=said):
        score(config, Moody(True, frozenset(images[: lost + 1])), groups, again)
    (tmp_path / "asked.txt").unlink()
    path = score(config, Moody(True), groups, again)
    assert all((values == 1).all() for values in read_rewards(path, GroupStore(groups)).values())
    lacking = [shard for shard in SHARDS if {f"prompt-{g}" for g in shard} & {i[:-2] for i in images[: lost + 1]}]
    asked = {line[:-2] for line in (tmp_path / "asked.txt").read_text().split()}
    assert asked == {f"prompt-{group}" for shard in lacking for group in shard}


@dataclass(frozen=True)
class HalfAsleep:
    """Compares only where the first image is the darkest of its group."""

    name, version = "half_asleep", "1"

    def check(self, prompts: Sequence[Prompt]) -> None: ...

    def compare(self, pairs: Sequence[tuple[Image.Image, Image.Image, Prompt]]) -> list[float | None]:
        return [0.5 if first.getpixel((0, 0))[0] == 1 else None for first, _, _ in pairs]


def test_a_win_rate_is_missing_by_the_share_of_its_comparisons(groups: Path, tmp_path: Path) -> None:
    """Of a group of K all but the first know one of their K - 1 comparisons: K - 2 are lost, and an image alone is."""
    with pytest.raises(UserError, match=f"gave {1 + 0 + 2 + 1 + 1} of 13 images no score"):
        score(ScoreConfig(), WinRate(HalfAsleep(), None, False, 0), groups, tmp_path / "rewards")


def test_prompt_without_target_is_refused_before_scoring(groups: Path, tmp_path: Path) -> None:
    store = GroupWriter(groups)
    row = ImageRow(
        "z", 0, Prompt("z", "no quotes"), picture(1), torch.zeros(1, 1), 0, "s", 1, 1.0, 1, 32, 64, "g", "r", 0
    )
    store.write_shard(3, [row], {"z": {"t": torch.zeros(1, 1)}})
    with pytest.raises(UserError, match=r'reward "ocr": prompt "z"'):
        score(ScoreConfig(), load_reward("ocr"), groups, tmp_path / "rewards")


@pytest.mark.parametrize("values", [{"workers": -1}, {"batch_size": 0}, {"rewrad": "ocr"}, {"batch_size": "many"}])
def test_bad_configuration_is_refused(values: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        ScoreConfig(**values)


def damage(path: Path, change: Callable[[pa.Table], pa.Table]) -> None:
    changed, header = change(pq.read_table(path)), read_header(path)
    last = len(header.contents) - 1
    write_rewards(path, header, [*(changed.slice(i, 1) for i in range(last)), changed.slice(last)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.slice(1), r'no reward for image "a/0"'),
        (lambda t: pa.concat_tables([t, t.slice(0, 1)]), r'two rewards for image "a/0"'),
        (lambda t: t.set_column(4, "score", pa.array([float("nan")] * len(t))), r'reward nan for image "a/0"'),
        (
            lambda t: pa.concat_tables([t, t.slice(0, 1).set_column(0, "image_id", pa.array(["x/0"]))]),
            r'image "x/0", which is not among the groups',
        ),
    ],
)
def test_rewards_with_gaps_or_strangers_are_refused(
    groups: Path, tmp_path: Path, own: Callable[[str], str], change: Callable[[pa.Table], pa.Table], message: str
) -> None:
    path = score(ScoreConfig(), load_reward(f"{own(BRIGHTNESS)}:brightness"), groups, tmp_path / "rewards")
    damage(path, change)
    with pytest.raises(UserError, match=message):
        read_rewards(path, GroupStore(groups))


def test_damaged_rewards_are_named(groups: Path, tmp_path: Path, own: Callable[[str], str]) -> None:
    reward = load_reward(f"{own(BRIGHTNESS)}:brightness")
    path = score(ScoreConfig(), reward, groups, tmp_path / "rewards")
    path.write_bytes(path.read_bytes()[:-20])
    for call in (
        lambda: read_rewards(path, GroupStore(groups)),
        lambda: score(ScoreConfig(), reward, groups, path.parent),
    ):
        with pytest.raises(UserError, match=rf"{path.name} is damaged or truncated"):
            call()
    with pytest.raises(UserError, match="not found"):
        read_rewards(tmp_path / "none.parquet", GroupStore(groups))
    with pytest.raises(UserError, match="is not a file of rewards"):
        read_rewards(groups / "groups-00000.parquet", GroupStore(groups))


KILLED = """
    import sys
    from pathlib import Path
    from gdro.rewards.registry import load_reward
    from gdro.stages.score import ScoreConfig, score

    if __name__ == "__main__":
        config = ScoreConfig(workers=2, batch_size=1)
        score(config, load_reward(sys.argv[1]), Path("groups"), Path("rewards"))
"""


def processes_of(text: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if text in (folder / "environ").read_bytes().decode(errors="replace"):
                    found.append(int(folder.name))
            except OSError:
                pass
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for orphans in /proc")
def test_killed_and_started_again(groups: Path, tmp_path: Path, own: Callable[[str], str]) -> None:
    """SIGKILL after the first finished file: the rerun keeps it, ends with the rows of an undisturbed run, and the
    killed run's workers end by themselves."""
    name = own(
        "import time\n"
        + textwrap.dedent(BRIGHTNESS)
        + "\ndef slow(images, prompts):\n"
        + "    time.sleep(0.3)\n"
        + "    return brightness(images, prompts)\n"
    )
    (tmp_path / "main.py").write_text(textwrap.dedent(KILLED))
    mark = f"GDRO_TEST_MARK={tmp_path}"
    command = [sys.executable, "main.py", f"{name}:slow"]
    environment = {**os.environ, "GDRO_TEST_MARK": str(tmp_path), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    parts = tmp_path / "rewards" / f".{name}.slow"
    deadline = time.monotonic() + 120
    while not list(parts.glob("*.parquet")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while processes_of(mark):
        assert time.monotonic() < deadline, "orphans"
        time.sleep(0.05)

    kept = sum(pq.read_metadata(part).num_rows for part in parts.glob("*.parquet"))
    assert 0 < kept < 13
    calls()
    path = score(ScoreConfig(workers=1), load_reward(f"{name}:slow"), groups, tmp_path / "rewards")
    assert len(calls()) == 13 - kept
    undisturbed = score(ScoreConfig(workers=1), load_reward(f"{name}:slow"), groups, tmp_path / "undisturbed")
    assert path.read_bytes() == undisturbed.read_bytes()
    assert not parts.exists()


UNGUARDED = """
    import gdro

    class Dark:
        name, version, parallel = "dark", "1", False
        def check(self, prompts): pass
        def __call__(self, images, prompts): raise AssertionError

    print("begun")
    path = gdro.score_groups(gdro.load_reward("my_rewards:brightness"), "groups", workers=2, batch_size=1)
    print(len(gdro.GroupStore("groups").group_ids), path)
    for scored in (lambda: gdro.load_reward("__main__:Dark"), lambda: gdro.score_groups(Dark(), "groups", workers=2)):
        try:
            scored()
        except gdro.UserError as error:
            print(error)
"""


@pytest.mark.slow
def test_a_script_without_a_main_guard_scores_in_processes_too(groups: Path, tmp_path: Path) -> None:
    """What only it defines, other processes cannot have: said in one line."""
    (tmp_path / "script.py").write_text(textwrap.dedent(UNGUARDED))
    (tmp_path / "my_rewards.py").write_text(BRIGHTNESS)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    begun, scored, function, reward = done.stdout.splitlines()
    assert begun == "begun"
    assert scored == f"5 {Path('rewards', 'my_rewards.brightness.parquet')}"
    assert function.startswith('score.reward: "__main__:Dark" is in the script or notebook that runs')
    assert reward.startswith('reward "dark" cannot be sent to worker processes')
