"""Rewards, judges and comparators by name: what each needs and how to make it from the configuration.

A spec is a name, `module:function`, or a section `{name: ..., option: ...}`; the options are the keyword parameters of
the name's factory. `score.reward` may also be a list of such sections, each with a `weight`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from inspect import signature
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError, validate_call

from gdro.common.errors import UserError, did_you_mean
from gdro.common.validation import expected, show
from gdro.rewards.base import Comparator, Judge, Reward
from gdro.rewards.derived import DerivedReward, Scorer, Term, parse_transforms
from gdro.rewards.pointwise import Pointwise
from gdro.rewards.user import UserJudge, UserReward
from gdro.rewards.winrate import WinRate

Spec = str | dict[str, Any]
OF_TERMS = {"weight", "transform", "standardize"}  # options that every reward has, besides its own
IN_UNIT = ("ocr", "ocr_strict", "geneval", "geneval_strict")  # rewards that lie in [0, 1]


@dataclass(frozen=True)
class Entry:
    """What a name stands for; `factory` is module:function, imported only when used."""

    factory: str
    about: str
    hardware: Literal["cpu", "gpu", "endpoint"] = "cpu"  # gpu: also runs without one, slowly
    fields: tuple[str, ...] = ()  # required of a prompt, besides its text
    extra: str | None = None  # the gdro extra that installs its imports


REWARDS = {
    "ocr": Entry("gdro.rewards.ocr.reward:ocr", "text read against the prompt's quoted target (Flow-GRPO's rule)"),
    "ocr_strict": Entry("gdro.rewards.ocr.reward:ocr_strict", "the same, but junk around the target counts"),
    "geneval": Entry(
        "gdro.rewards.geneval.reward:geneval",
        "objects, counts, colors, positions: share that is right",
        "gpu",
        ("tag", "include"),
        "geneval",
    ),
    "geneval_strict": Entry(
        "gdro.rewards.geneval.reward:geneval_strict",
        "the official GenEval verdict, 0 or 1",
        "gpu",
        ("tag", "include"),
        "geneval",
    ),
    "pickscore": Entry("gdro.rewards.neural.clip:pickscore", "human preference (PickScore v1), logit / 26", "gpu"),
    "clipscore": Entry(
        "gdro.rewards.neural.clip:clipscore", "agreement with prompt (CLIP ViT-L/14), logit / 30", "gpu"
    ),
    "hpsv2": Entry("gdro.rewards.neural.clip:hpsv2", "human preference (HPS v2.1), cosine", "gpu"),
    "image_reward": Entry(
        "gdro.rewards.neural.image_reward:image_reward", "human preference (ImageReward), standardized", "gpu"
    ),
    "aesthetic": Entry(
        "gdro.rewards.neural.clip:aesthetic", "LAION's aesthetic predictor v2, rating / 10; prompt unused", "gpu"
    ),
    "safety": Entry("gdro.rewards.neural.clip:safety", "agreement with a safer prompt (SafeDiffusion-R1)", "gpu"),
    "jpeg_compressibility": Entry("gdro.rewards.jpeg:jpeg_compressibility", "size as JPEG, -kB / 500"),
    "jpeg_incompressibility": Entry("gdro.rewards.jpeg:jpeg_incompressibility", "size as JPEG, kB"),
    "unified_reward": Entry("gdro.rewards.judges.unified:unified_reward", "UnifiedReward's grade, 1 to 5", "endpoint"),
    "win_rate": Entry("gdro.rewards.registry:win_rate", "share of its group that an image beats (Pref-GRPO)"),
}
JUDGES = {
    "unified_judge": Entry("gdro.rewards.judges.unified:unified_judge", "UnifiedReward's three axes", "endpoint"),
    "tiny": Entry("gdro.tiny.judge:tiny_judge", "the tiny world's images against its ground truth"),
}
COMPARATORS = {
    "unified_pairs": Entry("gdro.rewards.judges.unified:unified_pairs", "UnifiedReward on pairs of images", "endpoint"),
}


def load_reward(spec: Spec | list[Spec], field: str = "score.reward") -> Scorer:
    """The reward for a spec, or the weighted sum for a list of them. Loads no weights; UserError names the field.

    A section's `weight`, `transform` and `standardize` belong to `gdro.rewards.derived`; the rest are the reward's own.
    """
    if isinstance(spec, list):
        if not spec:
            raise UserError(f"{field} is an empty list; expected at least one reward")
        terms = [_term(one, f"{field}.{i}", several=len(spec) > 1) for i, one in enumerate(spec)]
        if len({term.reward.name for term in terms}) < len(terms):
            raise UserError(f"{field} names a reward twice; expected each once, with the sum of the weights")
        return DerivedReward(tuple(terms))
    if isinstance(spec, dict) and OF_TERMS & set(spec):
        return DerivedReward((_term(spec, field, several=False),))
    return _base_reward(spec, field)


def listing() -> str:
    """A readable table of every name, what it needs and its options."""
    lines = []
    for kind, entries in (("reward", REWARDS), ("judge", JUDGES), ("comparator", COMPARATORS)):
        for name, entry in entries.items():
            module, _, function = entry.factory.partition(":")
            options = signature(getattr(import_module(module), function)).parameters.values()
            needs = [entry.hardware, *(f"field {field}" for field in entry.fields)]
            needs += [f'pip install "gdro[{entry.extra}]"'] if entry.extra else []
            shown = [p.name if p.default is p.empty else f"{p.name}={show(p.default)}" for p in options]
            lines += [f"{name} ({kind}; {', '.join(needs)}): {entry.about}", f"    {', '.join(shown) or 'no options'}"]
    return "\n".join(lines)


def title(spec: Spec | list[Spec]) -> str:
    """A spec's name or names, for display."""
    if isinstance(spec, list):
        return "+".join(map(title, spec))
    return str(spec["name"]) if isinstance(spec, dict) else spec


def load_judge(spec: Spec, field: str = "evaluate.judge") -> Judge:
    """A judge by name or, for a user's own function, `module:function`; UserError names the field."""
    name, options = _named(spec, field)
    if ":" in name:
        _no_options(options, field)
        return UserJudge(name, field)
    return _make(JUDGES, "judge", name, options, field)


def load_comparator(spec: Spec, field: str) -> Comparator:
    """The comparator for a spec: a pairwise judge or any pointwise reward; UserError names the field."""
    name, options = _named(spec, field)
    if name in COMPARATORS:
        return _make(COMPARATORS, "comparator", name, options, field)
    if name not in REWARDS and ":" not in name:
        raise UserError(f'{field}: "{name}" is not a comparator{did_you_mean(name, [*COMPARATORS, *REWARDS])}')
    reward = _base_reward(spec, field)
    if getattr(reward, "grouped", False):
        raise UserError(f'{field}: "{name}" compares the images of a group itself; expected a pointwise reward')
    return Pointwise(reward)


def win_rate(
    *, comparator: str | dict[str, Any], pairs: int | None = None, both_orders: bool = True, seed: int = 0
) -> WinRate:
    """The win-rate reward (Pref-GRPO, 2508.20751).

    comparator: a pairwise judge or any pointwise reward, by name or {name: ..., ...}. pairs: per group; null: all.
    both_orders: ask a judge about (a, b) and (b, a), which halves its position bias.
    """
    if pairs is not None and pairs < 2:
        raise UserError(f"score.reward.pairs is {pairs}; expected at least 2, or null for all pairs")
    return WinRate(load_comparator(comparator, "score.reward.comparator"), pairs, both_orders, seed)


def _term(spec: Spec, field: str, *, several: bool) -> Term:
    options = dict(spec) if isinstance(spec, dict) else {"name": spec}
    weight, transform = options.pop("weight", 1.0), options.pop("transform", None)
    standardize = options.pop("standardize", several)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0 < abs(weight) < float("inf"):
        raise UserError(f"{field}.weight is {show(weight)}; expected a number other than 0")
    if not isinstance(standardize, bool):
        raise UserError(f"{field}.standardize is {show(standardize)}; expected true or false")
    reward = _base_reward(options, field)
    return Term(reward, float(weight), parse_transforms(transform, f"{field}.transform"), standardize)


def _base_reward(spec: Spec, field: str) -> Reward:
    name, options = _named(spec, field)
    if ":" in name:
        _no_options(options, field)
        return UserReward(name, field)
    return _make(REWARDS, "reward", name, options, field)


def _named(spec: Spec, field: str) -> tuple[str, dict[str, Any]]:
    options = dict(spec) if isinstance(spec, dict) else {"name": spec}
    if "name" not in options:
        raise UserError(f'{field} has no name; expected a name, or a section such as {{name: "ocr"}}')
    name = options.pop("name")
    if not isinstance(name, str) or not name:
        raise UserError(f'{field} has the name {show(name)}; expected a name, or a section such as {{name: "ocr"}}')
    return name, options


def _no_options(options: Mapping[str, Any], field: str) -> None:
    if options:
        raise UserError(f"{field}.{next(iter(options))}: your own function takes no options; expected only a name")


def _make(entries: Mapping[str, Entry], kind: str, name: str, options: Mapping[str, Any], field: str) -> Any:
    if name not in entries:
        raise UserError(f'{field}: "{name}" is neither a {kind} nor module:function{did_you_mean(name, entries)}')
    module, _, function = entries[name].factory.partition(":")
    factory: Callable[..., Any] = getattr(import_module(module), function)
    known = list(signature(factory).parameters)
    for option in options:
        if option not in known:
            valid = [*known, *(OF_TERMS if kind == "reward" else ())]
            hint = did_you_mean(option, valid) if valid else ""
            raise UserError(f'{field}.{option}: {kind} "{name}" has no such option{hint}')
    try:
        return validate_call(config=ConfigDict(strict=True, arbitrary_types_allowed=True))(factory)(**options)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, (field, *problem["loc"])))
        if problem["type"].startswith("missing"):
            raise UserError(f'{where} is missing; {kind} "{name}" requires it') from None
        raise UserError(f"{where} is {show(problem['input'])}; expected {expected(problem)}") from None
