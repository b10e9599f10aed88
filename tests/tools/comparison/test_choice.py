"""The rule that takes a candidate, and the figures it rests on."""

from pathlib import Path
from typing import Any

import pytest

from gdro.common.errors import UserError
from gdro.tools.comparison.choice import choose, figures, validations
from tests.run_files import write_metrics


def candidate(reward: float, corrected: float | None = 1.0, fall: float | None = 0.0) -> dict[str, Any]:
    return {"reward": reward, "corrected": corrected, "judge_fall": fall}


def row(step: int, reward: float, judge: float | None) -> dict[str, Any]:
    axes = {} if judge is None else {"alignment": 1.0, "coherence": judge, "style": judge + 0.5, "corrected": reward}
    cost = {"nfe": {"sample": 10, "train": step}, "seconds": {"sample": 1.0, "score": 0.5, "train": 2.0}}
    return {"step": step, "reward": reward, **axes, **cost}


def test_the_highest_reward_among_those_the_judge_saw_hold() -> None:
    assert choose([candidate(0.5), candidate(0.9, fall=0.26), candidate(0.7, fall=0.25), candidate(0.6)]) == 2
    assert choose([candidate(0.5, fall=None), candidate(0.6, fall=None)]) == 1  # no judge was asked
    assert choose([candidate(0.6), candidate(0.6)]) == 0


def test_the_highest_corrected_score_if_every_one_fell() -> None:
    assert choose([candidate(0.9, 0.1, 0.5), candidate(0.7, 0.3, 0.4)]) == 1


def test_a_failed_candidate_is_never_taken() -> None:
    assert choose([{"error": "the loss is nan"}, candidate(0.1, fall=1.0)]) == 1
    with pytest.raises(UserError, match="all 2 candidates failed, the first with: a"):
        choose([{"error": "a"}, {"error": "b"}])


def test_nothing_is_chosen_while_a_candidate_may_yet_finish() -> None:
    with pytest.raises(UserError, match="candidate 1 is not finished"):
        choose([candidate(0.9), {"error": "not finished", "left": True}])


def test_figures_compare_the_last_validation_with_the_first_on_the_axes_that_count() -> None:
    found = figures([row(0, 0.4, 4.0), row(5, 0.9, 1.0), row(9, 0.7, 3.5)], ("coherence", "style"))
    assert (found["reward"], found["judge"], found["judge_fall"], found["step"]) == (0.7, 3.75, 0.5, 9)
    assert figures([row(0, 0.4, None), row(5, 0.9, None)], ("coherence",))["judge_fall"] is None
    with pytest.raises(UserError, match="no validation after training"):
        figures([row(0, 0.4, 4.0)], ("coherence",))


def test_validations_are_read_from_the_log_a_cut_line_left_out(tmp_path: Path) -> None:
    lines = [
        {"step": 0, "validation": {"reward": 0.4}},
        {"step": 1, "loss": 1.0},
        {"step": 1, "validation": {"reward": 1}},
    ]
    write_metrics(tmp_path / "metrics.jsonl", lines, '{"step": 2, "valid')
    assert validations(tmp_path) == [{"step": 0, "reward": 0.4}, {"step": 1, "reward": 1}]
    assert validations(tmp_path / "none") == []
    (tmp_path / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"metrics.jsonl:1 is damaged"):
        validations(tmp_path)
