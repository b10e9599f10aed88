"""`gdro verify`: rereads every file that a stage of a run reads, to the last byte, and compares it with its digest.

Files that no stage reads are left out: the report, the model card and its images, tensorboard's files, logs.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError
from gdro.common.prompts import prompt_lines
from gdro.common.reading import reading
from gdro.common.sealed import AGAIN, check_footer, check_pages, find_record, forget, read_record
from gdro.common.yaml import dump_yaml
from gdro.groups import scores as rewards
from gdro.groups.importing import BEGUN
from gdro.groups.sampling import STARTED
from gdro.groups.shard import whole
from gdro.groups.store import GroupStore, check_shard, groups_name
from gdro.models.adapter_file import check_adapter
from gdro.runner.config import CONFIG, KEPT, RunConfig, saved_config
from gdro.runner.state import RunState
from gdro.tools.arena.votes import FILE, Votes
from gdro.training.checkpoint import checkpoint_path, load_checkpoint, steps_saved
from gdro.training.log import LOG, read_metrics

RESTART = "`gdro run` with the run's configuration rewrites it"


def verify(folder: Path) -> tuple[int, list[str]]:
    """(number of checks, one line per failure) for a run or a human study.

    Raises UserError if `folder` is neither.
    """
    forget()
    if (folder / FILE).exists():
        found = Findings()
        found.check(lambda: Votes(folder).close())
    elif any((folder / name).exists() for name in (KEPT, CONFIG, "groups")):
        found = _RunFindings(folder)
    else:
        raise UserError(f"{folder} holds neither {CONFIG} nor {FILE}; expected the folder of a run or a study")
    return found.checked, found.lines


class Findings:
    """What was checked, and one line for everything damaged or missing."""

    def __init__(self) -> None:
        self.checked = 0
        self.lines: list[str] = []

    def check(self, read: Callable[..., Any], *arguments: Any) -> Any:
        """What `read` returns for `arguments`; if it fails, None, after adding a line that says why."""
        try:
            value = read(*arguments)
        except UserError as error:
            self.expect(False, str(error))
            return None
        self.expect(True, "")
        return value

    def expect(self, right: bool, line: str) -> None:
        """Count a check; add `line` unless it is `right`."""
        self.checked += 1
        if not right and line not in self.lines:  # several may need one file
            self.lines.append(line)


class _RunFindings(Findings):
    """Findings for a run directory. A file counts as missing only if something made later exists."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.trained = bool(steps_saved(folder / "checkpoints"))
        self.evaluated = any((folder / name).exists() for name in ("evaluation.json", "summary.json", "report.html"))
        config = self._config()
        for groups in (folder / "groups", *sorted(folder.glob("rounds/*/groups"))):
            if groups.exists() or self.trained:
                self._store(groups, groups.parent / "rewards", finished=self.trained)
        measured = [folder / "evaluation" / side for side in ("base", "tuned")] if self.evaluated else []
        measured += [path for path in folder.glob("evaluation/*") if not path.name.startswith(".")]
        for groups in (*dict.fromkeys(measured), *sorted(folder.glob("validation/step-*"))):
            self._store(groups, groups / "rewards", finished=self.evaluated)
        self._training()
        self._results()
        if config is not None:
            self._prompts(config)

    def _config(self) -> RunConfig | None:
        config: RunConfig | None = self.check(saved_config, self.folder)
        kept, own = self.folder / KEPT, self.folder / CONFIG
        self.expect(kept.exists(), f"{kept} is missing: {RESTART}")
        if config is not None and kept.exists():
            written = dump_yaml(config.model_dump(mode="json")).encode()
            same = own.exists() and own.read_bytes() == written
            self.expect(same, f"{own} is not the configuration in {KEPT}: edited, damaged or missing; {RESTART}")
        return config

    def _store(self, groups: Path, scores: Path, *, finished: bool) -> None:
        """Check a store of groups, including its pages, and the rewards of its images."""
        files = sorted(scores.glob("*.parquet"))
        self.expect(bool(files) or not finished, f"{scores} holds no rewards: run `gdro score` again")
        for path in self._planned(groups):
            self.expect(path.exists() or not (finished or files), f"{path} is missing: run `gdro sample` again")
        sound = True
        for path in sorted(groups.glob("groups-*.parquet")):
            sound &= self.check(_check_pages, path, whole(path)) is not None
            sound &= self.check(check_shard, path) is not None
        store: GroupStore | None = self.check(GroupStore, groups) if sound else None
        for group in store.group_ids if store is not None else ():
            self.check(_open, store, group)
        for path in files:
            if self.check(_check_pages, path, rewards.WHOLE) is not None and store is not None:
                self.check(rewards.read_rewards, path, store)
        self.check(find_record, scores / "standard.json")

    def _planned(self, groups: Path) -> list[Path]:
        """The files that a store was planned to have when it was begun."""
        imported = (groups / BEGUN).exists()
        begun = self.check(read_record, groups / (BEGUN if imported else STARTED))
        if begun is None:
            return []
        return [groups / groups_name(i) for i in range(begun["files"] if imported else len(begun["shards"]))]

    def _training(self) -> None:
        folder, log = self.folder / "checkpoints", self.folder / LOG
        steps = steps_saved(folder)
        found = [self.check(load_checkpoint, checkpoint_path(folder, step)) for step in steps]
        best = self.check(find_record, folder / "best.json")
        stopped = self.check(find_record, folder / "stopped.json")
        rows = self.check(read_metrics, log)
        if self.evaluated:
            self.expect(stopped is not None, f"{folder / 'stopped.json'} is missing: {AGAIN['stopped.json']}")
            done = stopped is None or stopped["step"] in steps
            self.expect(done, f"{folder} lacks the last step's checkpoint: run `gdro train` again")
        if not found or found[-1] is None:
            return
        last = found[-1]
        if best != last.memory["best"]:
            self.expect(False, f"{folder / 'best.json'} is missing, or differs from {last.path}: {AGAIN['best.json']}")
        if last.memory["best"] is not None:
            path = checkpoint_path(folder, last.memory["best"]["step"])
            self.expect(path.exists(), f"{path} is missing, the best checkpoint: train again in another --out")
        if rows is not None:
            count, written = sum(row["step"] <= last.step for row in rows), last.memory["rows"]
            what = f"{log} holds {count} rows up to step {last.step}, but {written} were written"
            self.expect(count == written, f"{what}: train again in another --out")

    def _results(self) -> None:
        names = ["evaluation.json", "summary.json"] if self.evaluated else []
        if self.trained:
            names.append("seconds.json")
        for name in names:
            self.check(read_record, self.folder / name)
        for adapter in (self.folder / "adapter", self.folder / "adapter" / "raw"):
            if self.evaluated or adapter.exists():
                self.check(check_adapter, adapter)

    def _prompts(self, config: RunConfig) -> None:
        """Check that the prompts used are those that the configuration names."""
        named = self.check(lambda: RunState(config, self.folder).prompts)
        for split in named or ():
            path = self.folder / "prompts" / f"{split}.jsonl"
            same = path.exists() and path.read_bytes() == prompt_lines(named[split])
            self.expect(same, f"{path} is missing, or its prompts are not those the configuration names; {RESTART}")


def _check_pages(path: Path, expected: str) -> bool:
    with reading(path, expected):
        check_footer(path)
        check_pages(path)
    return True


def _open(store: GroupStore, group: str) -> None:
    store.images(group)
    store.latents(group)
