"""A run's configuration: one strict section per stage, dotted overrides, one-line errors, comparison on resume."""

import difflib
import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeGuard

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from gdro.common.errors import UserError, did_you_mean
from gdro.common.files import remake, write_bytes
from gdro.common.reading import read_bytes
from gdro.common.validation import MAX_SEED, expected, show
from gdro.common.yaml import dump_yaml, parse_yaml, read_yaml
from gdro.evaluation.measure import EvaluateConfig
from gdro.models.quantization import Quantization
from gdro.objectives.registry import ALL_HYPERPARAMETERS, name_of
from gdro.samplers.settings import Generation
from gdro.stages.score import ScoreConfig
from gdro.training.config import MAY_CHANGE as TRAIN_MAY_CHANGE
from gdro.training.config import RoundsConfig, TrainConfig

CONFIG = "config.yaml"
_MARK = b"# sha256 "
RECIPES = Path(__file__).parents[1] / "recipes"
KEPT = ".config.yaml"  # a copy that stays unchanged when a user edits config.yaml

# Fields about speed, duration or giving up, which change the result at a given step by rounding at most; all others are
# fixed once their stage has begun.
MAY_CHANGE = TRAIN_MAY_CHANGE | {
    "device",
    "compile",
    "distributed",
    "engine",
    "sample.batch_size",
    "sample.prompts_per_shard",
    "score.workers",
    "score.batch_size",
    "score.max_missing",
    "evaluate.batch_size",
}
# Validation uses these, so training that validates fixes them too.
VALIDATION = {
    f"evaluate.{name}" for name in ("images_per_prompt", "num_inference_steps", "judge", "reward", "corrected_axes")
}
# Former names of fields, for users with an old file.
RENAMED = {
    "quantisation": "quantization",
    "rounds.generator": "rounds.behavior_policy",
    "train.max_evaluations": "train.max_nfe",
    "train.regulariser": "train.regularizer",
}
# The top-level fields that every stage uses are fixed once any stage has begun.
STAGE_OF_SECTION = {"sample": "sample", "rounds": "sample", "score": "train", "train": "train", "evaluate": "evaluate"}


class SampleConfig(Generation):
    """Section `sample`."""

    prompts: str = Field(
        min_length=1, description="A .txt or .jsonl file, gdro:TASK:SPLIT[:COUNT] or tiny:TASK:SPLIT:COUNT[:SEED]."
    )


class RunConfig(BaseModel):
    """A whole run; `gdro run` takes it as YAML."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str = Field("tiny", min_length=1, description='"tiny", a folder in diffusers\' layout, or a Hub id.')
    seed: int = Field(0, ge=0, le=MAX_SEED, description="Determines everything random.")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: cuda if available.")
    distributed: Literal["ddp", "fsdp"] = Field(
        "ddp", description="With several processes, each has the whole model (ddp) or a share of its weights (fsdp)."
    )
    mixed_precision: Literal["no", "bf16"] = Field("no", description="Precision of the frozen weights.")
    quantization: Quantization | None = Field(
        None, description="Quantize the frozen weights: int8 or fp8 (torchao), nf4 (bitsandbytes, on a GPU), or null."
    )
    compile: bool = Field(False, description="Compile the transformer's blocks: takes minutes at first, then faster.")
    engine: Literal["local", "ray"] = Field(
        "local", description="Where groups are sampled and scored: this machine, or a Ray cluster (RAY_ADDRESS)."
    )
    sample: SampleConfig
    score: ScoreConfig = ScoreConfig()
    train: TrainConfig = TrainConfig()
    rounds: RoundsConfig = RoundsConfig()
    evaluate: EvaluateConfig


def load_config(source: str | Path, overrides: Mapping[str, Any] | Iterable[tuple[str, str]] = ()) -> RunConfig:
    """The configuration in the YAML file `source`, or the recipe of that name: "demo", "flux_ocr", ...

    overrides: values by dotted name, `{"train.k": 4, "train.objective": gdro.Rank(beta=5)}`, or pairs of a dotted name
    and YAML text, as on a command line. `train.objective` replaces the file's, including the hyperparameters that stand
    beside it. Raises UserError for the first problem.
    """
    data = read_yaml(_file(source))
    if {"tasks", "methods"} <= data.keys():
        raise UserError(f"{source} describes a comparison of methods, not a run; expected `gdro compare {source}`")
    if isinstance(overrides, Mapping):
        values = dict(overrides)
    else:
        values = {}
        for name, text in overrides:
            if name in values:
                raise UserError(f"--{name} is given twice; expected once")
            values[name] = parse_yaml(text, f"--{name}")
    if "train.objective" in values and isinstance(data.get("train"), dict):
        data["train"] = {field: value for field, value in data["train"].items() if field not in ALL_HYPERPARAMETERS}
    for name, value in values.items():
        _set(data, name, value)
    return validate(data)


def _file(source: str | Path) -> Path:
    named = {path.stem: path for path in RECIPES.glob("*.yaml")}.get(str(source))
    return Path(source) if named is None or Path(source).is_file() else named


def validate(data: dict[str, Any]) -> RunConfig:
    """`data` as a RunConfig, without coercion (no "4" for 4, no 2.0 for 2)."""
    try:
        config = RunConfig.model_validate(data, strict=True)
    except ValidationError as error:
        raise UserError(_first_problem(error)) from None
    _check_across(config)
    return config


def save_config(config: RunConfig, out: Path) -> None:
    """Write the resolved configuration to `out`/config.yaml, atomically, and a copy for later comparison."""
    text = dump_yaml(config.model_dump(mode="json")).encode()
    write_bytes(out / KEPT, _MARK + hashlib.sha256(text).hexdigest().encode() + b"\n" + text)
    write_bytes(out / CONFIG, text)


def saved_config(out: Path) -> RunConfig | None:
    """The configuration that gdro last wrote to `out`, ignoring later edits to config.yaml; None if there is none."""
    path = out / KEPT
    if not path.exists():
        return validate(read_yaml(out / CONFIG)) if (out / CONFIG).exists() else None
    mark, _, text = read_bytes(path, "the configuration that the run was begun with").partition(b"\n")
    again = remake(path, f"{CONFIG} takes its place")
    if mark != _MARK + hashlib.sha256(text).hexdigest().encode():
        raise UserError(f"{path}, gdro's copy of {CONFIG}, is damaged; expected it as gdro wrote it{again}")
    return validate(parse_yaml(text.decode(), str(path)))


def _saved(out: Path) -> Path:
    return out / KEPT if (out / KEPT).exists() else out / CONFIG


def check_unchanged(config: RunConfig, out: Path, begun: set[str]) -> None:
    """Raise UserError if the configuration would change the result of a stage already `begun` in `out`."""
    saved = saved_config(out) if begun else None
    if saved is None:
        return
    old = dict(flat(saved.model_dump(mode="json")))
    for name, value in flat(config.model_dump(mode="json")):
        section, dot, _ = name.partition(".")
        stages = {STAGE_OF_SECTION[section]} if dot else begun
        if name in VALIDATION and saved.train.validates:
            stages.add("train")
        if name in MAY_CHANGE or old.get(name) == value or not stages & begun:
            continue
        raise UserError(
            f"{name} is {show(value)} but {_saved(out)} has {show(old.get(name))}; "
            "expected the configuration the run was begun with, or another --out"
        )


def field_names(kind: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every field's dotted name, sections included."""
    names = [prefix + name for name in sorted(ALL_HYPERPARAMETERS)] if kind is TrainConfig else []
    for name, field in kind.model_fields.items():
        names.append(prefix + name)
        if _is_model(field.annotation):
            names += field_names(field.annotation, f"{prefix}{name}.")
    return names


def _check_across(config: RunConfig) -> None:
    """Rules across sections."""
    train, rounds, objective = config.train, config.rounds, config.train.objective
    name, images = f'objective "{name_of(objective)}"', config.sample.images_per_prompt
    refused = [
        (train.k > images, f"train.k is {train.k}; expected at most sample.images_per_prompt, which is {images}"),
        (
            train.target_reward is not None and not train.validates,
            f"train.target_reward is {train.target_reward}, but there is no validation to reach it; expected "
            "train.validation_prompts and train.validation_steps too",
        ),
        (
            train.images_per_pass is not None and train.group_gradient != "two_pass",
            f"train.images_per_pass is {train.images_per_pass}, but train.group_gradient is "
            f'"{train.group_gradient}"; expected null, or two_pass',
        ),
    ]
    for field, value in (("compile", config.compile), ("quantization", config.quantization)):
        what = f'{field} is {show(value)}, but distributed is "fsdp", whose sharded weights rule it out'
        refused.append((bool(value) and config.distributed == "fsdp", f"{what}; expected ddp, or {field} left out"))
    if rounds.train_steps is None:
        moving = config.sample.window in ("random", "sliding")
        what = f'sample.window is "{config.sample.window}", but rounds.train_steps is null, so there is one round'
        refused.append((moving, f"{what} and one window; expected fixed, or rounds.train_steps"))
        for field, kind in RoundsConfig.model_fields.items():
            value = getattr(rounds, field)
            what = f"rounds.{field} is {show(value)}, but rounds.train_steps is null, so there is one round"
            refused.append((value != kind.default, f"{what}; expected its optimizer steps"))
    elif train.resume_from_checkpoint != "latest":
        what = f"train.resume_from_checkpoint is {show(train.resume_from_checkpoint)}"
        refused.append((True, f"{what}; expected latest in a run of several rounds"))
    if "trajectories" in objective.needs:
        what = f"train.objective is {show(name_of(objective))}, which learns from stochastic steps"
        refused += [
            (
                config.sample.sampler == "ode",
                f'{what}, but sample.sampler is "ode"; expected flow_grpo, dance_grpo or flow_cps',
            ),
            (
                rounds.behavior_policy != "policy",
                f'rounds.behavior_policy is {show(rounds.behavior_policy)}; expected "policy" for {name}',
            ),
            (
                rounds.keep > 1,
                f"rounds.keep is {rounds.keep}; expected 1 for {name}, which learns from its own steps",
            ),
        ]
        for field in ("timestep", "logit_mean", "logit_std", "timestep_scope", "noise_scope", "reference_draws"):
            value, default = getattr(train, field), type(train).model_fields[field].default
            refused.append((value != default, f"train.{field} is {show(value)}; expected {show(default)} for {name}"))
    else:
        fixed = objective.fixed_k
        if train.timestep == "uniform":
            for field in ("logit_mean", "logit_std"):
                value, default = getattr(train, field), type(train).model_fields[field].default
                what = f'train.{field} is {show(value)}, but train.timestep is "uniform"'
                refused.append((value != default, f"{what}; expected logit_normal, or {show(default)}"))
        if train.reference_draws is not None:
            what, whose = f"train.reference_draws is {train.reference_draws}", getattr(objective, "reference", "base")
            refused += [
                (
                    objective.uses_reference != "error",
                    f"{what}; expected null for {name}, which "
                    + ("has no reference" if objective.uses_reference is None else "sees its reference's velocities"),
                ),
                (
                    whose != "base",
                    f"{what} and train.reference {show(whose)}, which moves; expected null, or base",
                ),
            ]
        refused += [
            (fixed is not None and train.k != fixed, f"train.k is {train.k}; expected {fixed} for {name}"),
            (
                train.timestep_fraction != 1,
                f"train.timestep_fraction is {train.timestep_fraction}; expected 1 for {name}, which has no trajectory",
            ),
        ]
    for wrong, message in refused:
        if wrong:
            raise UserError(message)


def _set(data: dict[str, Any], name: str, value: Any) -> None:
    *sections, field = name.split(".")
    for i, section in enumerate(sections):
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise UserError(f"{'.'.join(sections[: i + 1])} is {show(data)}; expected a section, for --{name}")
    data[field] = value


def flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every field; an objective's hyperparameters are named as they are set: train.beta."""
    for name, value in data.items():
        if prefix + name == "train.objective" and isinstance(value, dict):
            yield prefix + name, value["name"]
            yield from flat({field: other for field, other in value.items() if field != "name"}, prefix)
        elif isinstance(value, dict):
            yield from flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _first_problem(error: ValidationError) -> str:
    """One line for the first problem: dotted name, value found, what was expected."""
    problems = error.errors(include_url=False)
    problem = next((p for p in problems if p["type"] == "extra_forbidden"), problems[0])  # a typo explains the rest
    section, name = _locate(problem["loc"])
    if problem["type"] == "extra_forbidden":
        unknown = str(problem["loc"][-1])
        if name in RENAMED:
            return f'unknown field "{name}"; it is now "{RENAMED[name]}"'
        return f'unknown field "{name}"{_nearest(name, unknown, section)}'
    wanted = []
    for other in problems:
        if _locate(other["loc"])[1] == name and (text := expected(other)) not in wanted:
            wanted.append(text)
    if problem["type"] == "value_error" and name in RunConfig.model_fields and "." not in name:
        return f"{name}: {wanted[0]}"  # a rule across the fields of a section
    if problem["type"] == "missing":
        return f"{name} is missing; expected {wanted[0]}"
    return f"{name} is {show(problem['input'])}; expected {' or '.join(wanted)}"


def _locate(loc: tuple[int | str, ...]) -> tuple[type[BaseModel], str]:
    """(innermost section, dotted name) of pydantic's location, which may end in a union's branch or an index."""
    section: type[BaseModel] = RunConfig
    inside: type[BaseModel] | None = RunConfig
    names: list[str] = []
    for part in loc:
        if inside is None:
            break
        section = inside
        names.append(str(part))
        field = inside.model_fields.get(str(part))
        inside = field.annotation if field is not None and _is_model(field.annotation) else None
    return section, ".".join(names)


def _is_model(kind: Any) -> TypeGuard[type[BaseModel]]:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _nearest(name: str, unknown: str, section: type[BaseModel]) -> str:
    """The hint for an unknown field: a sibling of similar name, else a field of that name in another section."""
    siblings = [*section.model_fields, *(ALL_HYPERPARAMETERS if section is TrainConfig else ())]
    prefix = name.removesuffix(unknown)
    if not difflib.get_close_matches(unknown, siblings, n=1, cutoff=0.6):
        elsewhere = [full for full in field_names() if full.rpartition(".")[2] == unknown]
        if elsewhere:
            return f'; did you mean "{elsewhere[0]}"?'
    return did_you_mean(name, [prefix + sibling for sibling in siblings])


def savings(config: RunConfig, stage: str) -> list[str]:
    """Settings that reduce a stage's memory, cheapest first."""
    sizes = {
        "sample": ("sample.batch_size", config.sample.batch_size),
        "score": ("score.batch_size", config.score.batch_size),
        "validate": ("evaluate.batch_size", config.evaluate.batch_size),
        "evaluate": ("evaluate.batch_size", config.evaluate.batch_size),
    }
    found = []
    if stage in sizes and sizes[stage][1] > 1:
        found.append(f"{sizes[stage][0]} below {sizes[stage][1]}")
    if stage == "train":
        if config.train.group_gradient != "two_pass" or (config.train.images_per_pass or 1) > 1:
            found.append("train.group_gradient: two_pass with train.images_per_pass: 1")
        if not config.train.gradient_checkpointing:
            found.append("train.gradient_checkpointing: true")
    if config.mixed_precision == "no":
        found.append("mixed_precision: bf16")
    if config.quantization is None:
        found.append("quantization: int8")
    return [*found, "smaller images"]
