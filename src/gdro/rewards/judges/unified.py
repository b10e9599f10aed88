"""UnifiedReward (Wang et al. 2025, 2503.05236) behind an endpoint: scores for an image (reward and judge) and a pair.

Reply formats are those of the published models; a reply in another format, or with a value out of range, is missing.
The parsers are pure functions from a reply to its content, or None if it cannot be read.
"""

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

from gdro.common.errors import UserError
from gdro.common.files import fingerprint
from gdro.common.prompts import Prompt
from gdro.rewards.base import AXES, Scores
from gdro.rewards.judges import unified_prompts as texts
from gdro.rewards.judges.answers import answer, labeled
from gdro.rewards.judges.endpoint import Endpoint, Question

SUM_TOLERANCE = 0.02  # of an axis's two relative scores, which "must sum to exactly 1.0"


def parse_axes(reply: str) -> dict[str, float] | None:
    """`Alignment Score (1-5): X`, `Coherence Score (1-5): Y`, `Style Score (1-5): Z`, amid any other text."""
    said = answer(reply) or ""
    found = {axis: labeled(rf"{axis} score \(1-5\)", said, 1, 5) for axis in AXES}
    axes = {axis: grade for axis, grade in found.items() if grade is not None}
    return axes if len(axes) == len(AXES) else None


def parse_final(reply: str) -> dict[str, float] | None:
    """`Final Score: X`, X from 1 to 5."""
    grade = labeled("final score", answer(reply) or "", 1, 5)
    return None if grade is None else {"final": grade}


def parse_relative(reply: str) -> float | None:
    """2.0's pairs: for each axis `Image 1: X`, `Image 2: Y` in [0, 1], X + Y = 1; the greater mean wins."""
    sections = re.split(r"\b(alignment|coherence|style) score[*_\s]*:", answer(reply) or "", flags=re.IGNORECASE)
    bodies = {name.lower(): body for name, body in zip(sections[1::2], sections[2::2], strict=True)}  # the last of each
    lead = 0.0
    for axis in AXES:
        first, second = (labeled(f"image {n}", bodies.get(axis, ""), 0, 1) for n in (1, 2))
        if first is None or second is None or abs(first + second - 1) > SUM_TOLERANCE:
            return None
        lead += first - second
    return 0.5 if math.isclose(lead, 0, abs_tol=1e-6) else float(lead > 0)


def parse_think(reply: str) -> float | None:
    """`Image 1 is better` or `Image 2 is better` (or a tie), after any thoughts, in `<answer>` if there is one."""
    said = re.sub(r"[*_`]", "", answer(reply) or "")
    better = set(re.findall(r"\bimage\s*([12])\s+is\s+better\b", said, re.IGNORECASE))
    tie = re.search(r"\bequally\s+good\b|\btie\b", said, re.IGNORECASE)
    if tie:
        return None if better else 0.5
    return float(better == {"1"}) if len(better) == 1 else None


def parse_winner(reply: str) -> float | None:
    """Flex's JSON, only by the overall `"winner": "Image 1"`: categories may have their own winners."""
    winner = _overall_winner(answer(reply) or "").strip().lower()
    if re.fullmatch(r"tie|equal|both|neither|draw", winner):
        return 0.5
    which = re.fullmatch(r"(?:image\s*)?([12])(?: is better)?\.?", winner)
    return None if which is None else float(which[1] == "1")


def _overall_winner(said: str) -> str:
    """The outermost object's last "winner"; empty if it has none."""
    try:
        value = json.loads(said[said.find("{") : said.rfind("}") + 1])
        return str(value.get("winner", ""))
    except (ValueError, AttributeError, RecursionError):
        pass  # its long reasons are often not quite valid JSON, so go by its braces
    winner, depth, place = "", 0, 0
    for found in re.finditer(r'(?<!\\)"winner"\s*:\s*"([^"\n]*)"', said):
        depth += said.count("{", place, found.start()) - said.count("}", place, found.start())
        place = found.start()
        winner = found[1] if depth <= 1 else winner
    return winner


@dataclass(frozen=True)
class _Form:
    """A question and the parser of its reply."""

    text: str
    parse: Callable[[str], Any]

    def question(self, prompt: Prompt, *images: Image.Image) -> Question:
        return Question(self.text.replace("{prompt}", prompt.text), images)


POINTWISE = {
    "2.0": _Form(texts.POINT_2, parse_axes),
    "1.x": _Form(texts.POINT_1, parse_final),
    "1.x_words": _Form(texts.POINT_1_WORDS, parse_axes),
}
PAIRWISE = {
    "think": _Form(texts.PAIR_THINK, parse_think),
    "2.0": _Form(texts.PAIR_2, parse_relative),
    "flex": _Form(texts.PAIR_FLEX, parse_winner),
}
RULE = "2"  # version of the parsers; part of every version


@dataclass(frozen=True)
class UnifiedReward:
    """Mean of the axes weighted by `weights`, or the final score; 1 to 5, NaN where missing.

    Evidence: `reply` and `scores` by axis (or `final`), or `missing`, the reason.
    """

    endpoint: Endpoint
    form: str
    weights: Mapping[str, float]
    template: str | None = None
    name: ClassVar[str] = "unified_reward"
    parallel: ClassVar[bool] = False  # it already sends many requests at once

    @property
    def version(self) -> str:
        return fingerprint(self.name, RULE, _form(POINTWISE, self).text, dict(self.weights), self.endpoint.version)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if the endpoint does not answer or the template cannot be read; any prompt will do."""
        _form(POINTWISE, self)
        self.endpoint.check()

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        values, evidence = [], []
        for scores, reply in _point(self, images, prompts):
            if scores is None:
                values.append(math.nan)
                evidence.append({"missing": reply.reason})
                continue
            total = sum(self.weights[key] for key in scores)
            values.append(sum(self.weights[key] * score for key, score in scores.items()) / total)
            evidence.append({"reply": reply.text, "scores": scores})
        return Scores(np.asarray(values, np.float64), evidence)


@dataclass(frozen=True)
class UnifiedJudge:
    """UnifiedReward's three axes as a judge for evaluation."""

    endpoint: Endpoint
    form: str
    template: str | None = None
    name: ClassVar[str] = "unified_judge"

    @property
    def version(self) -> str:
        return fingerprint(self.name, RULE, _form(POINTWISE, self).text, self.endpoint.version)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if the endpoint does not answer or the template cannot be read; any prompt will do."""
        _form(POINTWISE, self)
        self.endpoint.check()

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> dict[str, np.ndarray]:
        found = [scores or {} for scores, _ in _point(self, images, prompts)]
        return {axis: np.array([scores.get(axis, math.nan) for scores in found], np.float64) for axis in AXES}


@dataclass(frozen=True)
class UnifiedPairs:
    """UnifiedReward's preference between two images of a prompt."""

    endpoint: Endpoint
    form: str
    template: str | None = None
    name: ClassVar[str] = "unified_pairs"

    @property
    def version(self) -> str:
        return fingerprint(self.name, RULE, _form(PAIRWISE, self).text, self.endpoint.version)

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raise UserError if the endpoint does not answer or the template cannot be read."""
        _form(PAIRWISE, self)
        self.endpoint.check()

    def compare(self, pairs: Sequence[tuple[Image.Image, Image.Image, Prompt]]) -> list[float | None]:
        """Per pair: 1.0 if the first image is better, 0.0 if the second is, 0.5 for a tie, None if missing.

        Only in the order given; judges favor a position, so ask in both orders.
        """
        form = _form(PAIRWISE, self)
        questions = [form.question(prompt, first, second) for first, second, prompt in pairs]
        return [preference for preference, _ in self.endpoint.ask(questions, form.parse)]


def _form(forms: Mapping[str, _Form], asker: UnifiedReward | UnifiedJudge | UnifiedPairs) -> _Form:
    own = forms[asker.form]
    return _Form(texts.template_text(own.text, asker.template), own.parse)


def _point(asker: UnifiedReward | UnifiedJudge, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> list[Any]:
    form = _form(POINTWISE, asker)
    return asker.endpoint.ask([form.question(p, image) for image, p in zip(images, prompts, strict=True)], form.parse)


def unified_reward(
    *,
    url: str,
    model: str,
    version: Literal["2.0", "1.x", "1.x_words"] = "2.0",
    alignment: float = 1.0,
    coherence: float = 1.0,
    style: float = 1.0,
    template: str | None = None,
    api_key_env: str | None = None,
    revision: str | None = None,
    concurrency: int = 8,
    timeout: float = 120.0,
    attempts: int = 5,
    max_tokens: int = 1024,
    cache: str | None = None,
) -> UnifiedReward:
    """Weighted mean of the axes, or the final score of "1.x"; replies of "1.x_words" start with a list of words.

    `alignment`, `coherence`, `style` are the axes' weights; `template` is a file with the question's wording; see
    `gdro.rewards.judges.endpoint.Endpoint` for the rest.
    """
    weights = {"alignment": alignment, "coherence": coherence, "style": style}
    if version == "1.x":
        if set(weights.values()) != {1.0}:
            raise UserError('unified_reward: version "1.x" has one score; expected no alignment, coherence, style')
        weights = {"final": 1.0}
    if not all(0 <= w < math.inf for w in weights.values()) or not any(weights.values()):
        raise UserError(f"unified_reward: weights {list(weights.values())}; expected none below 0 and some above")
    endpoint = Endpoint(
        url, model, api_key_env, revision, concurrency, timeout, attempts, max_tokens, temperature=0.0, cache=cache
    )
    return UnifiedReward(endpoint, version, weights, template)


def unified_judge(
    *,
    url: str,
    model: str,
    version: Literal["2.0", "1.x_words"] = "2.0",
    template: str | None = None,
    api_key_env: str | None = None,
    revision: str | None = None,
    concurrency: int = 8,
    timeout: float = 120.0,
    attempts: int = 5,
    max_tokens: int = 1024,
    cache: str | None = None,
) -> UnifiedJudge:
    """The judge; see `gdro.rewards.judges.endpoint.Endpoint` for the settings."""
    endpoint = Endpoint(
        url, model, api_key_env, revision, concurrency, timeout, attempts, max_tokens, temperature=0.0, cache=cache
    )
    return UnifiedJudge(endpoint, version, template)


def unified_pairs(
    *,
    url: str,
    model: str,
    form: Literal["think", "2.0", "flex"] = "think",
    template: str | None = None,
    api_key_env: str | None = None,
    revision: str | None = None,
    concurrency: int = 8,
    timeout: float = 120.0,
    attempts: int = 5,
    max_tokens: int = 4096,
    cache: str | None = None,
) -> UnifiedPairs:
    """The comparison of pairs; see `gdro.rewards.judges.endpoint.Endpoint` for the settings."""
    endpoint = Endpoint(
        url, model, api_key_env, revision, concurrency, timeout, attempts, max_tokens, temperature=0.0, cache=cache
    )
    return UnifiedPairs(endpoint, form, template)
