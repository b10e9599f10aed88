"""Which candidate of a method's search is taken: a rule on validation figures, the same for every method."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError
from gdro.evaluation.statistics import AXES
from gdro.training.log import read_metrics

JUDGE_FALL = 0.25
RULE = (
    f"the highest validation reward at the end among candidates whose judge mean fell by at most {JUDGE_FALL}; "
    "if every one fell further, the highest corrected score"
)


def validations(run: Path) -> list[dict[str, Any]]:
    """The validation figures in `run`/metrics.jsonl with their `step`, in order; [] if there are none."""
    rows = read_metrics(run / "metrics.jsonl")
    return [{"step": row["step"], **row["validation"]} for row in rows if "validation" in row]


def figures(rows: Sequence[dict[str, Any]], axes: Sequence[str]) -> dict[str, Any]:
    """A candidate's figures: reward, corrected score and mean of the judge's `axes` at the end, and its fall."""
    if len(rows) < 2:
        raise UserError("no validation after training; expected one, so a larger search.budget")
    first, last = rows[0], rows[-1]
    judged = [axis for axis in axes if axis in first and axis in last]
    judge = [sum(row[axis] for axis in judged) / len(judged) if judged else None for row in (first, last)]
    return {
        "reward": last["reward"],
        "corrected": last.get("corrected"),
        "judge": judge[1],
        "judge_fall": judge[0] - judge[1] if judge[0] is not None and judge[1] is not None else None,
        **{axis: last[axis] for axis in AXES if axis in last},
        "step": last["step"],
        "nfe": last["nfe"],
        "seconds": last["seconds"],
    }


def choose(candidates: Sequence[dict[str, Any]]) -> int:
    """The place of the candidate that RULE takes, the first of equals; failed ones carry "error" and are not taken.

    Raises UserError if all failed, or one is "left": it may yet finish.
    """
    for i, found in enumerate(candidates):
        if found.get("left"):
            raise UserError(
                f"candidate {i} is {found['error']}; expected every one finished or failed before the choice"
            )
    finished = [i for i, found in enumerate(candidates) if "error" not in found]
    if not finished:
        raise UserError(f"all {len(candidates)} candidates failed, the first with: {candidates[0]['error']}")
    sound = [i for i in finished if (candidates[i]["judge_fall"] or 0.0) <= JUDGE_FALL]
    field = "reward" if sound else "corrected"
    return max(sound or finished, key=lambda i: (candidates[i][field], -i))
