"""The paper's table for a human study, with intervals: whose images won, question by question.

Intervals are Wilson's, on an effective number of answers (Korn and Graubard's, for clustered samples): answers to one
prompt, or to prompts with one text, are not independent, so the effective number follows from the spread between texts.
In simulations with 20 and 60 prompts and a true share of 2 %, as small as some of the paper's, these cover it in 89 to
96 %, and a bootstrap over prompts in 34 to 93 %, as it shrinks to nothing if nobody wins. Wilson's intervals on all
answers cover it in 63 to 88 % if a prompt's answers agree.
"""

import math
from collections.abc import Sequence
from itertools import combinations

import numpy as np

from gdro.common.prompts import same_text
from gdro.tools.arena.votes import QUESTIONS, Study, Vote

Z = 1.959964  # 97.5 % quantile of the standard normal


def interval(wins: np.ndarray, answers: np.ndarray) -> tuple[float, float]:
    """95 % interval (0 to 1) of sum(wins) / sum(answers), both (P,), counts per prompt; NaN below two prompts."""
    kept = answers > 0
    wins, answers = wins[kept].astype(np.float64), answers[kept].astype(np.float64)
    prompts, total = len(wins), answers.sum()
    if prompts < 2:
        return math.nan, math.nan
    share = wins.sum() / total
    variance = prompts / (prompts - 1) * np.square(wins - answers * share).sum() / total**2
    # without any spread, a prompt's answers may or may not agree by chance: count each prompt once
    n = prompts if variance == 0 else min(max(share * (1 - share) / variance, 1.0), total)
    middle = (share + Z**2 / (2 * n)) / (1 + Z**2 / n)
    half = Z / (1 + Z**2 / n) * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return max(middle - half, 0.0), min(middle + half, 1.0)


def results(study: Study, votes: Sequence[Vote]) -> str:
    """The tables as Markdown: each model's wins, then wins, ties and losses for every two models, in %."""
    if not votes:
        return "no votes yet"
    texts = {p.group: same_text(p.prompt) for p in study.pairs.values()}  # prompts with one text are not independent
    places = {text: place for place, text in enumerate(dict.fromkeys(texts.values()))}

    def share(wins: Sequence[Vote], answers: Sequence[Vote]) -> str:
        counts = np.zeros((2, len(places)), dtype=np.int64)
        for row, some in enumerate((wins, answers)):
            for vote in some:
                counts[row, places[texts[study.pairs[vote.pair].group]]] += 1
        if not answers:
            return "–"
        low, high = interval(*counts)
        ends = "" if math.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]"
        return f"{100 * len(wins) / len(answers):.1f}{ends}"

    asked = {question: [vote for vote in votes if vote.question == question] for question in QUESTIONS}
    shares = [["wins, %", *QUESTIONS]]
    for model in study.models:
        met = {question: [vote for vote in some if model in (vote.a, vote.b)] for question, some in asked.items()}
        shares.append([model, *(share([v for v in some if v.winner == model], some) for some in met.values())])
    shares.append(["tie", *(share([v for v in some if v.winner is None], some) for some in asked.values())])

    rivals = [["question", "first", "second", "first wins, %", "tie, %", "second wins, %", "answers"]]
    for question, some in asked.items():
        for first, second in combinations(study.models, 2):
            meetings = [vote for vote in some if {vote.a, vote.b} == {first, second}]
            won = [share([v for v in meetings if v.winner == winner], meetings) for winner in (first, None, second)]
            rivals.append([question, first, second, *won, str(len(meetings))])

    raters = {vote.rater for vote in votes}
    decided = [vote for vote in votes if vote.winner is not None]
    lines = [
        f"{len(votes)} answers of {len(raters)} rater{'s' * (len(raters) != 1)} on {len({v.pair for v in votes})} of "
        f"{len(study.pairs)} pairs of images, {len(places)} distinct prompts",
        "",
        *_markdown(shares),
        "",
        *_markdown(rivals),
        "",
        "[95 % interval]: Wilson's, on the number of answers that are independent given the spread between prompts.",
        f"Image A, on a side drawn at random, won {share([v for v in decided if v.choice == 'a'], decided)} % of the "
        "decided answers: without a bias to one side about 50.",
    ]
    if len(study.models) > 2:
        lines.append(
            "A model's wins are out of the pairs that showed it; the paper's raters chose among all images at once, "
            "so only the order is comparable."
        )
    return "\n".join(lines)


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns also line up in a terminal."""
    cells = [[" ".join(cell.replace("|", "\\|").split()) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
