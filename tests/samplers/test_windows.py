"""Windows of stochastic steps: inside the trainable ones, covering them, the same at every look."""

from typing import Any

import pytest

from gdro.samplers.windows import window_steps


def steps(window: Any, round: int = 0, seed: int = 0, num_steps: int = 10, **given: int) -> range:
    fields: dict[str, Any] = {"size": None, "start": None, "interval": None, **given}
    return window_steps(window, **fields, num_steps=num_steps, round=round, seed=seed)


def test_all_leaves_out_the_last_step():
    assert steps("all") == range(0, 9)
    assert steps("all", num_steps=2) == range(0, 1)


def test_fixed_stays():
    assert {steps("fixed", round, size=3, start=2) for round in range(5)} == {range(2, 5)}
    assert steps("fixed", size=9, start=0) == steps("all")


def test_random_is_drawn_for_each_round_and_covers_every_place():
    drawn = [steps("random", round, size=3) for round in range(200)]
    assert drawn == [steps("random", round, size=3) for round in range(200)]
    assert {window.start for window in drawn} == set(range(7))
    assert all(len(window) == 3 and window.stop <= 9 for window in drawn)
    assert drawn != [steps("random", round, seed=1, size=3) for round in range(200)]


def test_sliding_moves_on_and_begins_again():
    starts = [steps("sliding", round, size=4, interval=2).start for round in range(14)]
    assert starts == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 0, 0]


@pytest.mark.parametrize(
    ("window", "given", "message"),
    [
        ("fixed", {"size": 10, "start": 0}, "a window of 10 steps; expected 1 to 9, of 10 without the last"),
        ("fixed", {"size": 3, "start": 7}, "from step 7; expected it to start at 0 to 6"),
        ("fixed", {"size": 3}, "from step None"),
        ("random", {}, "a window of None steps"),
        ("random", {"size": 0}, "a window of 0 steps"),
        ("sliding", {"size": 3, "interval": 0}, "sliding every 0 rounds"),
        ("sliding", {"size": 3}, "sliding every None rounds"),
        ("moving", {"size": 3, "start": 0}, "window 'moving'; expected one of all, fixed, random, sliding"),
        ("all", {"num_steps": 1}, "of 1 without the last"),
    ],
)
def test_windows_outside_the_steps_are_refused(window: str, given: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        steps(window, **given)
