"""The comparison: every method on the same base, prompts, reward, seeds and machine; table, page and figures of it.

A job is a run directory below the comparison's and a `gdro run` of its own, so it resumes as any run does. Methods are
tuned by the same search on validation prompts; test prompts are met only by the runs with the chosen values.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError, did_you_mean
from gdro.common.files import discard, sweep, write_bytes, write_json
from gdro.common.sealed import find_record, write_record
from gdro.common.yaml import dump_yaml, read_yaml
from gdro.evaluation.statistics import corrected_axes
from gdro.rewards.registry import title
from gdro.runner.config import RunConfig, flat, saved_config, validate
from gdro.runner.directory import Clock, alone
from gdro.tools.comparison.agreement import MADE_WITH, Versions, check_agreement, made_with, measured_by, recorded
from gdro.tools.comparison.choice import RULE, choose, figures, validations
from gdro.tools.comparison.results import collect
from gdro.tools.comparison.running import FAILED, LOG, run_jobs
from gdro.tools.comparison.spec import ComparisonSpec, Job, load_spec, run_name
from gdro.tools.comparison.table import markdown, put_into
from gdro.training.checkpoint import steps_saved, stopped_at

OVERHEAD = ("evaluate", "export", "report")  # stages that are no part of a method's cost
NOT_FINISHED = "not finished"
JOB = "job.yaml"  # the configuration a job is started with
LAST_FILES = ("summary.json", "report.html")  # of the pipeline
# What a run directory that is taken on leaves behind: what belongs to its process or speaks of its adapter.
LEFT_BEHIND = (".lock", LOG, JOB, "adapter", "evaluation.json", *LAST_FILES)


def compare(
    path: Path,
    out: Path,
    *,
    quick: bool = False,
    status: bool = False,
    workers: int | None = None,
    task: str | None = None,
    results: Path | None = None,
    readme: Path | None = None,
    pictures: Path | None = None,
) -> tuple[str, bool]:
    """Do what the comparison file `path` asks for in the folder `out`; it resumes where it stopped.

    Returns lines that say what came out, and whether no job failed. `status` starts nothing and shows the results so
    far; while another process works in `out` it writes none. `results`, `readme` and `pictures` are further places for
    the figures, the table (between markers) and the plots. Raises UserError before any work for a bad file, and where
    runs were begun with another base model, reward or judge than those begun now would be.
    """
    spec = load_spec(path, quick=quick)
    if task is not None and task not in spec.tasks:
        raise UserError(f'--task is "{task}", no task of {path}{did_you_mean(task, spec.tasks)}')
    bed = Comparison(spec, out, default_workers(spec) if workers is None else workers)
    jobs = spec.plan([task] if task else list(spec.tasks))
    failed: dict[str, str] = {}
    lines = bed.status(jobs) if status else []
    with ExitStack() as stack:
        try:
            stack.enter_context(alone(out))
        except UserError as error:
            if not status:
                raise
            return "\n".join([*lines, f"no results were written: {error}"]), True
        if not status:
            bed.check_versions(jobs)
            with bed.clock.running("compare"):
                failed = run_jobs(jobs, out, workers=bed.workers, is_done=bed.is_done, start=bed.start)
        shown = bed.failures() | failed
        lines += [str(file) for file in bed.write(shown, results=results, readme=readme, pictures=pictures)]
    lines += [f"{job.name} failed: {shown[job.name]}" for job in jobs if job.name in shown]
    return "\n".join(lines), not failed


def default_workers(spec: ComparisonSpec) -> int:
    """As many jobs at once as there are cores; one where they would share a GPU."""
    import torch

    devices = {spec.run_config(t, m, 0, spec.candidates(m)[0]).device for t in spec.tasks for m in spec.methods}
    if devices != {"cpu"} and torch.cuda.is_available():
        return 1
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Comparison:
    """The comparison in its folder: which job is done, how one starts, what came out."""

    def __init__(self, spec: ComparisonSpec, out: Path, workers: int) -> None:
        self.spec, self.out, self.workers = spec, out, workers
        self.clock = Clock(out / "seconds.json")
        self._versions: Versions = {}

    # ---- jobs

    def config(self, job: Job) -> RunConfig:
        """The job's configuration; UserError while the method's choice cannot be made."""
        if job.candidate is not None:
            values = self.spec.candidates(job.method)[job.candidate]
            config = self.spec.search_config(job.task, job.method, values)
        else:
            config = self.spec.run_config(job.task, job.method, job.seed, self.chosen(job.task, job.method))
        if self.workers == 1:
            return config
        return config.model_copy(update={"score": config.score.model_copy(update={"workers": 1})})

    def is_done(self, job: Job) -> bool:
        """Whether the job's last files are there, made with the configuration it would have now."""
        run = self.out / job.name
        saved = saved_config(run)
        if saved is None or _key(saved) != _key(self.config(job)):
            return False
        if stopped_at(run / "checkpoints", saved.train) is None:
            return False
        return job.candidate is not None or all((run / name).exists() for name in LAST_FILES)

    def failure(self, job: Job) -> str | None:
        """The one line the job last ended with, if that was a failure under the configuration it would have now."""
        found = find_record(self.out / job.name / FAILED)
        if found is None:
            return None
        try:
            tried = validate(read_yaml(self.out / job.name / JOB))
            return str(found["error"]) if _key(tried) == _key(self.config(job)) else None
        except UserError:  # no choice could be made, or the file is an older gdro's
            return None

    def failures(self) -> dict[str, str]:
        """Job -> how it failed, of all that did and were not started again."""
        found = {job.name: self.failure(job) for job in self.spec.plan(list(self.spec.tasks))}
        return {name: error for name, error in found.items() if error is not None}

    def start(self, job: Job) -> list[str]:
        """Prepare the job's run directory; the arguments of `gdro` that do it."""
        config, run = self.config(job), self.out / job.name
        self._check_limits(job, config)
        if job.candidate is None and not (run / "config.yaml").exists():
            before = self._before(job)
            if before is not None:
                if not self.is_done(before):
                    raise UserError(f"{before.name} is not finished; expected it first")
                take_on(self.out / before.name, run)
            self.share_base(job, config)
        if not (run / MADE_WITH).exists():
            write_record(run / MADE_WITH, made_with(config, self._versions))
        write_bytes(run / JOB, dump_yaml(config.model_dump(mode="json")).encode())
        until = [] if job.candidate is None else ["--until", "train"]
        return ["run", str(run / JOB), "--out", str(run), *until]

    def _before(self, job: Job) -> Job | None:
        """The job whose finished run this one continues."""
        parent = self.spec.methods[job.method].continues
        return None if parent is None else replace(job, name=run_name(job.task, parent, job.seed), method=parent)

    def _check_limits(self, job: Job, config: RunConfig) -> None:
        """Refuse a run that may have trained past limits lowered since: it would pass for one under them."""
        run = self.out / job.name
        saved = saved_config(run)
        if saved is None or not steps_saved(run / "checkpoints"):
            return
        before = self._before(job)
        if before is not None and _key(saved) == _key(self.config(before)):  # just taken on
            return
        for field in ("max_nfe", "target_reward"):
            old, new = getattr(saved.train, field), getattr(config.train, field)
            if new is not None and (old is None or old > new):
                what = f"train.{field} is {new}, but {run} was begun with {'none' if old is None else old}"
                raise UserError(f"{what} and may have trained past it; delete {run} to run it again")

    def check_versions(self, jobs: Sequence[Job]) -> None:
        """Raise UserError if a run was begun with another model, reward or judge than `jobs` begun now would be."""
        names = [job.name for job in self.spec.plan(list(self.spec.tasks))]
        records = [(name, versions) for name in names for versions in recorded(self.out / name)]
        for job in jobs:
            values = self.spec.candidates(job.method)[job.candidate or 0]
            if job.candidate is None:
                config = self.spec.run_config(job.task, job.method, job.seed, values)
            else:
                config = self.spec.search_config(job.task, job.method, values)
            records.append(("what is installed", made_with(config, self._versions)))
        check_agreement(records)

    def share_base(self, job: Job, config: RunConfig) -> None:
        """The base's evaluation images are every method's: copied, with their rewards, from a run that is evaluated.

        The store they make knows the weights and settings it is of, so evaluation finds it finished, or starts over.
        """
        target = self.out / job.name / "evaluation" / "base"
        for method in self.spec.methods:
            donor = self.out / run_name(job.task, method, job.seed)
            if target.exists() or not (donor / "evaluation.json").exists():
                continue
            saved = saved_config(donor)
            if saved is not None and _base_key(saved) == _base_key(config):
                target.parent.mkdir(parents=True, exist_ok=True)
                sweep(target.parent)
                half = target.with_name(".base.tmp")
                shutil.copytree(donor / "evaluation" / "base", half)
                half.rename(target)

    # ---- choices

    def chosen(self, task: str, method: str) -> dict[str, Any]:
        """The values of the method's searched fields in its runs."""
        method = self.spec.methods[method].continues or method
        values = self.spec.candidates(method)
        return values[0] if len(values) == 1 else values[self._choice(task, method)]

    def _choice(self, task: str, method: str) -> int:
        """The candidate a seed of the method was begun with, else the one to take: what was begun is not rechosen."""
        searched = self.spec.searched(task)
        for other in (name for name in self.spec.tasks if self.spec.searched(name) == searched):
            for seed in self.spec.seeds:
                saved = saved_config(self.out / run_name(other, method, seed))
                if saved is None:
                    continue
                for place, values in enumerate(self.spec.candidates(method)):
                    if _of(saved, values) == _of(self.spec.run_config(other, method, seed, values), values):
                        return place
        try:
            return choose(self.candidates(task, method))
        except UserError as error:
            raise UserError(f"{searched}/{method}/search: {error}") from None

    def candidates(self, task: str, method: str) -> list[dict[str, Any]]:
        """Every candidate's values and figures; "error" in place of figures for one that has none, and "left" if it may
        yet have them."""
        found = []
        for job in self.spec.plan([task]):
            if job.candidate is None or job.method != method:
                continue
            run, config = self.out / job.name, self.config(job)
            candidate: dict[str, Any] = {"values": self.spec.candidates(method)[job.candidate]}
            found.append(candidate)
            if not self.is_done(job):
                error = self.failure(job)
                candidate |= {"error": NOT_FINISHED, "left": True} if error is None else {"error": error}
                continue
            try:
                axes = config.evaluate.corrected_axes or corrected_axes(title(measured_by(config)))
                candidate |= figures(validations(run), axes)
            except UserError as problem:
                candidate["error"] = str(problem)
        return found

    def choices(self) -> dict[str, Any]:
        """Task -> method -> what was searched and chosen, for the methods whose choice is made or cannot be."""
        found: dict[str, Any] = {}
        for task in self.spec.tasks:
            for name, method in self.spec.methods.items():
                if method.continues is not None or len(self.spec.candidates(name)) == 1:
                    continue
                candidates = self.candidates(task, name)
                chosen: int | None = None
                try:
                    chosen = self._choice(task, name)
                except UserError:
                    if any("left" in candidate for candidate in candidates):
                        continue
                found.setdefault(task, {})[name] = {"rule": RULE, "chosen": chosen, "candidates": candidates}
        return found

    # ---- results

    def status(self, jobs: list[Job]) -> list[str]:
        """A line a method: how much of its search and which of its seeds are done, left or failed."""
        failed = self.failures()
        lines = []
        for task, name in dict.fromkeys((job.task, job.method) for job in jobs):
            own = [job for job in jobs if (job.task, job.method) == (task, name)]
            search = [self.is_done(job) for job in own if job.candidate is not None]
            lost = sum(job.name in failed for job in own if job.candidate is not None)
            seeds = [
                f"{job.seed}{'' if self._is_run(job) else ' (failed)' if job.name in failed else ' (left)'}"
                for job in own
                if job.candidate is None
            ]
            tried = f"search {sum(search)}/{len(search)}{f' ({lost} failed)' if lost else ''}, " if search else ""
            lines.append(f"{task} {name}: {tried}seeds {', '.join(seeds)}")
        return lines

    def _is_run(self, job: Job) -> bool:
        try:
            return self.is_done(job)
        except UserError:  # no choice could be made
            return False

    def write(
        self, failed: dict[str, str], *, results: Path | None, readme: Path | None, pictures: Path | None
    ) -> list[Path]:
        """Write what the finished jobs say, in the comparison's folder and wherever else asked; the files written.

        Raises UserError, and writes nothing, if they do not agree on model, reward and judge.
        """
        plan = self.spec.plan(list(self.spec.tasks))
        check_agreement((job.name, one) for job in plan if self._is_run(job) for one in recorded(self.out / job.name))
        runs = {job.name: job for job in plan if job.candidate is None}
        choices = self.choices()
        found = collect(
            self.spec,
            self.out,
            lambda name: self._is_run(runs[name]),
            choices=choices,
            failed=failed,
            settings={
                "jobs": self.workers,
                "threads": "one thread" if self.workers > 1 else "all threads",
                "wall_seconds": round(sum(self.clock.seconds.values())),
                "spec": self._described(),
            },
        )
        text = markdown(found)
        files = [self.out / "choices.json", self.out / "results.json", self.out / "table.md"]
        write_json(files[0], choices)
        write_json(files[1], found)
        write_bytes(files[2], text.encode())
        from gdro.tools.comparison.page import write_page
        from gdro.tools.comparison.plots import write_pictures

        files.append(write_page(found, self.out))
        if results is not None:
            write_json(results, found)
            files.append(results)
        drawn: list[Path] = []
        if pictures is not None:
            for name, task in found["tasks"].items():
                drawn += write_pictures(name, task, pictures)
        if readme is not None:
            links = [
                f"![{path.stem}: reward and corrected score against model evaluations]"
                f"({Path(os.path.relpath(path, readme.parent)).as_posix()})"
                for path in drawn
                if path.suffix == ".png"
            ]
            put_into(readme, "\n\n".join([text.strip(), *links]))
            files.append(readme)
        return files + drawn

    def _described(self) -> dict[str, Any]:
        spec = self.spec
        return {
            "seeds": spec.seeds,
            "common": spec.common,
            "tasks": {name: task.model_dump() for name, task in spec.tasks.items()},
            "methods": {name: method.model_dump() for name, method in spec.methods.items()},
            "search": spec.search.model_dump(),
            "quick": None if spec.quick is None else spec.quick.model_dump(),
        }


def take_on(parent: Path, run: Path) -> None:
    """Make `run` a copy of the finished run directory `parent`; under other limits its training continues."""
    half = run.with_name(f".{run.name}.tmp")
    discard(half)
    shutil.copytree(parent, half, ignore=shutil.ignore_patterns(*LEFT_BEHIND))
    discard(half / "evaluation" / "tuned")
    seconds = find_record(half / "seconds.json") or {}
    write_record(half / "seconds.json", {name: value for name, value in seconds.items() if name not in OVERHEAD})
    if run.exists():  # holds a log at most: it was never begun
        discard(run)
    half.rename(run)


def _of(config: RunConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration's own values of the fields in `values`."""
    return {field: value for field, value in flat(config.model_dump(mode="json")) if field in values}


def _key(config: RunConfig) -> str:
    """Equal for equal configurations; scoring processes change no score, and go with the jobs at once."""
    data = config.model_dump(mode="json")
    del data["score"]["workers"]
    return json.dumps(data, sort_keys=True)


def _base_key(config: RunConfig) -> str:
    """Equal for runs whose base model is evaluated alike."""
    data = config.model_dump(mode="json")
    names = ("guidance_scale", "max_sequence_length", "height", "width", "buckets", "scheduler")
    sample = {name: data["sample"][name] for name in names}
    parts = [sample, data["evaluate"], data["score"]["reward"]]
    return json.dumps(
        [*parts, *(data[name] for name in ("model", "seed", "device", "mixed_precision"))], sort_keys=True
    )
