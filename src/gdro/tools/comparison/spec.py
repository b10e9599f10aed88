"""What a comparison file says: tasks, methods and their search, merged into the configuration of every run.

Each run's configuration is common < task < method < method.per_task[task] < chosen values (< quick), plus what the
spec itself decides: the seed, the budget (`train.max_nfe`) and the target (`train.target_reward`).
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gdro.common.errors import UserError, did_you_mean
from gdro.common.validation import MAX_SEED
from gdro.common.yaml import read_yaml
from gdro.rewards.registry import IN_UNIT
from gdro.runner.config import MAY_CHANGE, RunConfig, flat, validate

Fields = dict[str, Any]
# What the comparison sets itself in every run, and where a comparison file says it.
DECIDED = {
    "seed": "seeds",
    "train.max_nfe": "tasks.<task>.budget",
    "train.target_reward": "tasks.<task>.target_reward and stop_at_target",
}


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Task(_Section):
    """One task of the comparison."""

    target_reward: float = Field(
        ge=-1e6, le=1e6, description="The cost of a method is counted up to this validation reward."
    )
    budget: int = Field(ge=1, le=10**15, description="Model evaluations (sampling and training) a run may cost.")
    set: Fields = Field({}, description="Fields of the run's configuration.")


class Method(_Section):
    """One method: a row of the table."""

    title: str = Field(min_length=1, description="Its name in the table.")
    set: Fields = Field({}, description="Fields of the run's configuration.")
    per_task: dict[str, Fields] = Field({}, description="Task -> further fields.")
    search: dict[str, list[Any]] = Field({}, description="Dotted field -> values; every combination is a candidate.")
    stop_at_target: bool = Field(False, description="Stop at the first validation that reaches the task's target.")
    budget: float = Field(1.0, gt=0, le=1000, description="Of the task's budget.")
    continues: str | None = Field(None, description="A method whose finished runs this one takes on from.")


class Search(_Section):
    """How candidates are compared: on validation prompts, at a seed of their own."""

    seed: int = Field(100, ge=0, le=MAX_SEED)
    task: str | None = Field(None, description="The task searched on, for all of them; null: each its own.")
    budget: float = Field(0.25, gt=0, le=1, description="Of the task's budget, for each candidate.")
    set: Fields = {}
    per_task: dict[str, Fields] = {}


class Quick(_Section):
    """What --quick changes; it also takes the first seed only, and the first value of each search list."""

    budget: float = Field(0.1, gt=0, le=1, description="Of the task's budget.")
    set: Fields = {}
    per_task: dict[str, Fields] = {}


class _File(_Section):
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] = Field(min_length=1)
    common: Fields = {}
    tasks: dict[str, Fields] = Field(min_length=1)
    methods: dict[str, Fields] = Field(min_length=1)
    search: Fields = {}
    quick: Fields = {}


@dataclass(frozen=True)
class Job:
    """One run directory, `name` below the comparison's; started once the jobs `after` have ended."""

    name: str
    task: str
    method: str
    seed: int
    candidate: int | None  # None: a run with the chosen values
    after: tuple[str, ...]
    nfe: int  # what it may cost


@dataclass(frozen=True)
class ComparisonSpec:
    """A checked comparison file."""

    seeds: list[int]
    common: Fields
    tasks: dict[str, Task]
    methods: dict[str, Method]
    search: Search
    quick: Quick | None  # given where the comparison is to be quick

    def candidates(self, method: str) -> list[Fields]:
        """Every combination of the method's search lists, as dotted fields; one empty combination without a search."""
        lists = self.methods[self.methods[method].continues or method].search
        return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]

    def run_config(self, task: str, method: str, seed: int, values: Mapping[str, Any]) -> RunConfig:
        """The configuration of one seed with the chosen `values`; UserError names method and task."""
        target = self.tasks[task].target_reward if self.methods[method].stop_at_target else None
        parts = [*self._own(task, method), nested(values)]
        if self.quick is not None:
            parts += [self.quick.set, self.quick.per_task.get(task, {})]
        return self._config(task, method, parts, seed, self.budget(task, method), target)

    def search_config(self, task: str, method: str, values: Mapping[str, Any]) -> RunConfig:
        """The configuration of one candidate: the whole of its share is used, so that candidates compare."""
        parts = [*self._own(task, method), self.search.set, self.search.per_task.get(task, {}), nested(values)]
        return self._config(task, method, parts, self.search.seed, self.search_budget(task), None)

    def budget(self, task: str, method: str | None = None) -> int:
        """Model evaluations a run of the method may cost, those of the method it continues included; without a method
        the task's, of which a method may have another share."""
        share = 1.0 if method is None else self.methods[method].budget
        return max(1, round(self.tasks[task].budget * share * (1.0 if self.quick is None else self.quick.budget)))

    def searched(self, task: str) -> str:
        """The task whose search chooses the values for `task`."""
        return self.search.task or task

    def search_budget(self, task: str) -> int:
        return max(1, round(self.tasks[task].budget * self.search.budget))

    def plan(self, tasks: list[str]) -> list[Job]:
        """The jobs of `tasks`, the first seed of everything first; a method's search right before its first run."""
        jobs: list[Job] = []
        for place, seed in enumerate(self.seeds):
            for task in tasks:
                for name, method in self.methods.items():
                    search = self._search_jobs(self.searched(task), method.continues or name)
                    if place == 0:
                        jobs += [job for job in search if job not in jobs]
                    after: tuple[str, ...] = tuple(job.name for job in search)
                    cost = self.budget(task, name)
                    if method.continues is not None:
                        after = (run_name(task, method.continues, seed),)
                        parent = self.methods[method.continues]
                        cost -= 0 if parent.stop_at_target else self.budget(task, method.continues)
                    jobs.append(Job(run_name(task, name, seed), task, name, seed, None, after, max(1, cost)))
        return jobs

    def _search_jobs(self, task: str, method: str) -> list[Job]:
        count = len(self.candidates(method))
        if count == 1:  # nothing to choose from
            return []
        cost = self.search_budget(task)
        return [Job(f"{task}/{method}/search/{i}", task, method, self.search.seed, i, (), cost) for i in range(count)]

    def _own(self, task: str, method: str) -> list[Fields]:
        chosen = self.methods[method]
        parts = [self.common, self.tasks[task].set]
        for part in (self.methods[chosen.continues], chosen) if chosen.continues else (chosen,):
            parts += [part.set, part.per_task.get(task, {})]
        return parts

    def _config(
        self, task: str, method: str, parts: list[Fields], seed: int, budget: int, target: float | None
    ) -> RunConfig:
        decided = nested({"seed": seed, "train.max_nfe": budget, "train.target_reward": target})
        try:
            return validate(merged(*parts, decided))
        except UserError as error:
            raise UserError(f"methods.{method}, task {task}: {error}") from None


def run_name(task: str, method: str, seed: int) -> str:
    """The run directory of one seed, below the comparison's."""
    return f"{task}/{method}/seed-{seed}"


def load_spec(path: Path, *, quick: bool = False) -> ComparisonSpec:
    """The comparison in the file `path`, with every configuration checked; UserError for the first thing wrong."""
    file = _section(_File, read_yaml(path), f"{path}: ", "")
    spec = ComparisonSpec(
        seeds=file.seeds,
        common=file.common,
        tasks={name: _section(Task, value, f"{path}: ", f"tasks.{name}.") for name, value in file.tasks.items()},
        methods={name: _section(Method, v, f"{path}: ", f"methods.{name}.") for name, v in file.methods.items()},
        search=_section(Search, file.search, f"{path}: ", "search."),
        quick=_section(Quick, file.quick, f"{path}: ", "quick."),
    )
    try:
        _check(spec)
        spec = _quickened(spec) if quick else replace(spec, quick=None)
        _check_configurations(spec)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return spec


def merged(*parts: Mapping[str, Any]) -> Fields:
    """Nested mappings laid over one another, the later the stronger; lists and scalars are replaced whole."""
    out: Fields = {}
    for part in parts:
        for name, value in part.items():
            old = out.get(name)
            out[name] = merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def nested(values: Mapping[str, Any]) -> Fields:
    """Dotted fields as sections: {"train.k": 4} is {"train": {"k": 4}}."""
    parts: list[Fields] = []
    for name, value in values.items():
        for section in reversed(name.split(".")):
            value = {section: value}
        parts.append(value)
    return merged(*parts)


S = TypeVar("S", bound=_Section)


def _section(kind: type[S], data: Any, where: str, prefix: str) -> S:
    try:
        return kind.model_validate(data, strict=True)
    except ValidationError as error:
        problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])
    name = prefix + ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        hint = did_you_mean(name, [prefix + field for field in kind.model_fields])
        raise UserError(f'{where}unknown field "{name}"{hint}')
    if problem["type"] == "missing":
        raise UserError(f"{where}{name} is missing; expected a value")
    message = problem["msg"].removeprefix("Input should be ").removeprefix("a valid ")
    raise UserError(f"{where}{name.rstrip('.')} is {problem['input']!r}; expected {message}")


def _check(spec: ComparisonSpec) -> None:
    """What the parts must be to one another, before any configuration is merged."""
    repeated = sorted({seed for seed in spec.seeds if spec.seeds.count(seed) > 1})
    if repeated:
        raise UserError(f"seeds has {repeated[0]} more than once; expected different seeds")
    if spec.search.seed in spec.seeds:
        raise UserError(f"search.seed is {spec.search.seed}, which is one of seeds; expected a seed of its own")
    if spec.search.task is not None and spec.search.task not in spec.tasks:
        raise UserError(f'search.task is "{spec.search.task}"{did_you_mean(spec.search.task, list(spec.tasks))}')
    for name in (*spec.tasks, *spec.methods):
        if not name.replace("_", "").replace("-", "").isalnum():
            raise UserError(f"the name {name!r}; expected letters, digits, - and _ (it becomes a folder)")
    titles: dict[str, str] = {}
    for name, method in spec.methods.items():
        other = titles.setdefault(method.title, name)
        if other != name:
            raise UserError(f'methods.{name}.title is "{method.title}", as methods.{other}.title; expected another')
    parts = {"common": spec.common, "search.set": spec.search.set}
    parts |= {f"tasks.{name}.set": task.set for name, task in spec.tasks.items()}
    overlaid: list[tuple[str, dict[str, Fields]]] = [("search", spec.search.per_task)]
    if spec.quick is not None:
        parts["quick.set"] = spec.quick.set
        overlaid.append(("quick", spec.quick.per_task))
    for name, method in spec.methods.items():
        _check_method(spec, name, method)
        parts |= {f"methods.{name}.set": method.set, f"methods.{name}.search": nested(method.search)}
        overlaid.append((f"methods.{name}", method.per_task))
    for where, per_task in overlaid:
        for task, fields in per_task.items():
            if task not in spec.tasks:
                raise UserError(f'{where}.per_task: "{task}" is no task{did_you_mean(task, spec.tasks)}')
            parts[f"{where}.per_task.{task}"] = fields
    for where, fields in parts.items():
        for field, _ in flat(fields):
            if field in DECIDED:
                raise UserError(f"{where} sets {field}; expected it from {DECIDED[field]}, the same for every method")
    counts = {name: len(spec.candidates(name)) for name, m in spec.methods.items() if m.continues is None}
    first = next(iter(counts))
    for name, count in counts.items():
        if count != counts[first]:
            raise UserError(
                f"methods.{name}.search has {count} candidates and methods.{first}.search {counts[first]}; "
                "expected the same number for every method"
            )


def _check_method(spec: ComparisonSpec, name: str, method: Method) -> None:
    for field, values in method.search.items():
        if not values:
            raise UserError(f"methods.{name}.search.{field} is []; expected at least one value")
    if method.continues is None:
        return
    parents = [other for other, m in spec.methods.items() if m.continues is None]
    if method.continues not in parents:
        hint = did_you_mean(method.continues, parents)
        raise UserError(f'methods.{name}.continues: "{method.continues}" is no method that can be taken on from{hint}')
    if method.search:
        raise UserError(f"methods.{name}.search: it continues {method.continues}; expected that method's choice")
    parent = spec.methods[method.continues]
    goes_on = parent.stop_at_target and not method.stop_at_target  # past the target, to the end of the same budget
    if method.budget < parent.budget or (method.budget == parent.budget and not goes_on):
        raise UserError(
            f"methods.{name}.budget is {method.budget:g}; expected more than {parent.budget:g}, "
            f"what {method.continues} may have used"
        )


def _quickened(spec: ComparisonSpec) -> ComparisonSpec:
    methods = {
        name: method.model_copy(update={"search": {field: values[:1] for field, values in method.search.items()}})
        for name, method in spec.methods.items()
    }
    return replace(spec, seeds=spec.seeds[:1], methods=methods)


def _check_configurations(spec: ComparisonSpec) -> None:
    """Every configuration that may come up, so that a mistake is told of before the hours of work."""
    for task, settings in spec.tasks.items():
        for name, method in spec.methods.items():
            candidates = spec.candidates(name)
            for values in candidates:
                config = spec.run_config(task, name, spec.seeds[0], values)
                if len(candidates) > 1:
                    spec.search_config(task, name, values)
                _check_target(task, settings.target_reward, config)
                if config.train.validates is False:
                    raise UserError(f"methods.{name}, task {task}: train.validation_prompts is null; expected prompts")
                if method.continues is not None:
                    parent = spec.run_config(task, method.continues, spec.seeds[0], values)
                    _check_continues(name, task, config, parent)


def _check_target(task: str, target: float, config: RunConfig) -> None:
    if config.score.reward in IN_UNIT and config.evaluate.reward is None and not 0 < target < 1:
        raise UserError(f"tasks.{task}.target_reward is {target:g}; expected a number between 0 and 1")


def _check_continues(name: str, task: str, config: RunConfig, parent: RunConfig) -> None:
    """A continued run directory must keep to what it was begun with."""
    old = dict(flat(parent.model_dump(mode="json")))
    for field, value in flat(config.model_dump(mode="json")):
        if old.get(field) != value and field not in MAY_CHANGE and field not in DECIDED:
            raise UserError(f"methods.{name}, task {task}: sets {field} to {value!r}; a continued run must keep it")
