"""Corrected score and paired bootstrap, against closed forms and known distributions."""

import math

import numpy as np
import pytest

from gdro.evaluation.statistics import (
    compare,
    corrected_axes,
    corrected_score,
    pair_means,
    relative_change,
    resampled_means,
    text_numbers,
)

NORMAL_975 = 1.959964


def distinct(count: int) -> list[str]:
    return [str(i) for i in range(count)]


def test_corrected_score_is_reward_times_quality_above_three_plus_a_fifth() -> None:
    reward = np.array([[1.0, 0.5], [0.0, 1.0]])
    axes = {
        "alignment": np.array([[5.0, 4.0], [5.0, 1.0]]),
        "coherence": np.array([[4.0, 4.0], [5.0, 2.0]]),
        "style": np.array([[3.0, 4.0], [5.0, 3.0]]),
    }
    expected = [[1.0 * (4 - 3) + 0.2, 0.5 * (4 - 3) + 0.2], [0.2, 1.0 * (2 - 3) + 0.2]]
    np.testing.assert_allclose(corrected_score(reward, axes, corrected_axes("ocr")), expected)


def test_geneval_leaves_alignment_out() -> None:
    axes = {"alignment": np.array([5.0]), "coherence": np.array([4.0]), "style": np.array([3.0])}
    for name in ("geneval", "geneval-soft", "geneval_strict"):
        assert corrected_score(np.ones(1), axes, corrected_axes(name))[0] == pytest.approx(0.5 + 0.2)
    assert corrected_axes("ocr-strict") == ("alignment", "coherence", "style")


def test_the_paper_s_base_row_fits_the_formula() -> None:
    """FLUX.1-dev on OCR: .5843 raw and .4486 corrected is u = 3 + .2486 / .5843 = 3.4255."""
    u = np.array([3 + (0.4486 - 0.2) / 0.5843])
    assert corrected_score(np.array([0.5843]), {"coherence": u}, ["coherence"])[0] == pytest.approx(0.4486)


def test_bootstrap_distribution_of_the_mean_has_the_closed_form_moments() -> None:
    """Resampling P values with replacement: the mean's expectation is the sample mean, its variance s_P^2 / P."""
    values = np.random.default_rng(0).exponential(size=(60, 1))
    draws = resampled_means(values, np.arange(60), samples=20_000, seed=1)
    variance = values.var() / 60
    assert draws.mean() == pytest.approx(values.mean(), abs=4 * math.sqrt(variance / 20_000))
    assert draws.var() == pytest.approx(variance, rel=0.05)


def test_interval_covers_the_true_gain_of_gaussian_data_95_times_in_100() -> None:
    """200 data sets of 60 prompts: coverage 0.95 has standard error 0.015; the percentile method loses about .01."""
    covered = 0
    for i in range(200):
        rng = np.random.default_rng(i)
        base = rng.normal(0.5, 0.3, 60)
        tuned = base + rng.normal(0.1, 0.2, 60)
        low, high = compare({"r": (base, tuned)}, distinct(60), samples=1000, seed=0)["r"].ci95
        covered += low <= 0.1 <= high
    assert 0.89 <= covered / 200 <= 0.99


def test_interval_is_the_normal_one_for_many_prompts() -> None:
    rng = np.random.default_rng(3)
    base = rng.normal(size=1000)
    tuned = base + rng.normal(0.2, 0.5, 1000)
    result = compare({"r": (base, tuned)}, distinct(1000), samples=10_000, seed=0)["r"]
    half = NORMAL_975 * (tuned - base).std() / math.sqrt(1000)
    assert result.gain == pytest.approx((tuned - base).mean())
    assert result.ci95 == pytest.approx((result.gain - half, result.gain + half), rel=0.05)


def test_pairing_removes_the_spread_between_prompts() -> None:
    """A constant gain on prompts of very different difficulty is certain when paired, uncertain when not."""
    base = np.random.default_rng(0).normal(0, 10, 50)
    paired = compare({"r": (base, base + 0.1)}, distinct(50), samples=2000, seed=0)["r"]
    assert paired.ci95 == pytest.approx((0.1, 0.1))
    shuffled = np.random.default_rng(1).permutation(base + 0.1)
    low, high = compare({"r": (base, shuffled)}, distinct(50), samples=2000, seed=0)["r"].ci95
    assert low < -1
    assert high > 1


def test_prompts_are_the_unit_not_images() -> None:
    """Four copies of each image add no information, so they must not narrow the interval."""
    rng = np.random.default_rng(0)
    base, tuned = rng.normal(size=(40, 1)), rng.normal(size=(40, 1))
    once = compare({"r": pair_means(base, tuned)}, distinct(40), samples=2000, seed=0)["r"]
    copies = pair_means(np.repeat(base, 4, axis=1), np.repeat(tuned, 4, axis=1))
    assert compare({"r": copies}, distinct(40), samples=2000, seed=0)["r"].ci95 == pytest.approx(once.ci95)


def test_texts_are_the_unit_not_prompts() -> None:
    """A text repeated in other case and spacing is one unit: eight texts eight times give the interval of eight, one
    text 64 times gives none, and texts of unequal number count with all their prompts."""
    rng = np.random.default_rng(0)
    base, tuned = rng.normal(size=(2, 8))
    texts = [f"A Sign  {i}" for i in range(8)]
    once = compare({"r": (base, tuned)}, texts, samples=2000, seed=0)["r"]
    again = [text if turn % 2 else f" {' '.join(text.lower().split())}" for turn in range(8) for text in texts]
    assert text_numbers(again).tolist() == list(range(8)) * 8
    eight = compare({"r": (np.tile(base, 8), np.tile(tuned, 8))}, again, samples=2000, seed=0)["r"]
    assert eight.gain == pytest.approx(once.gain)
    assert eight.ci95 == pytest.approx(once.ci95)
    relative = relative_change(np.tile(base, 8), np.tile(tuned, 8), again, samples=2000, seed=0)
    assert relative == pytest.approx(relative_change(base, tuned, texts, samples=2000, seed=0))

    many = rng.normal(size=(2, 64))
    one = compare({"r": (many[0], many[1])}, ["a sign", "A  sign"] * 32, samples=100, seed=0)["r"]
    assert one.gain == pytest.approx((many[1] - many[0]).mean())
    assert one.to_json()["ci95"] == [None, None]
    assert np.isnan(relative_change(many[0], many[1], ["a sign"] * 64, samples=100, seed=0)[1])

    zero, unequal = np.zeros(4), np.array([0.0, 0.0, 0.0, 1.0])  # drawn twice or once each: 0, 1/4 or 1
    uneven = compare({"r": (zero, unequal)}, ["a", "a", "a", "b"], samples=2000, seed=0)["r"]
    assert (uneven.gain, uneven.ci95) == (0.25, (0.0, 1.0))


def test_the_same_seed_gives_the_same_interval_and_metrics_do_not_disturb_each_other() -> None:
    rng = np.random.default_rng(0)
    a, b, c = rng.normal(size=(3, 30))
    alone = compare({"r": (a, b)}, distinct(30), samples=1500, seed=7)["r"]
    assert compare({"x": (b, c), "r": (a, b)}, distinct(30), samples=1500, seed=7)["r"].ci95 == pytest.approx(
        alone.ci95
    )
    assert compare({"r": (a, b)}, distinct(30), samples=1500, seed=8)["r"].ci95 != alone.ci95


def test_one_prompt_has_a_gain_and_no_interval() -> None:
    result = compare({"r": (np.array([0.2]), np.array([0.5]))}, distinct(1), samples=100, seed=0)["r"]
    assert result.gain == pytest.approx(0.3)
    assert result.to_json()["ci95"] == [None, None]


def test_missing_scores_are_left_out_on_both_sides() -> None:
    """Image (0, 1) has no tuned score: its base score must not count either. Prompt 1 has none at all."""
    base = np.array([[1.0, 100.0], [5.0, np.nan], [2.0, 2.0]])
    tuned = np.array([[2.0, np.nan], [np.nan, 1.0], [4.0, 6.0]])
    first, second = pair_means(base, tuned)
    np.testing.assert_array_equal(first, [1, np.nan, 2])
    np.testing.assert_array_equal(second, [2, np.nan, 5])
    result = compare({"r": (first, second)}, distinct(3), samples=500, seed=0)["r"]
    assert (result.base, result.tuned) == (1.5, 3.5)
    assert result.ci95 == (1.0, 3.0)


def test_nothing_but_missing_scores_is_not_a_number_and_json_null() -> None:
    empty = np.full(4, np.nan)
    result = compare({"r": (empty, empty)}, distinct(4), samples=100, seed=0)["r"].to_json()
    assert result == {"base": None, "tuned": None, "gain": None, "ci95": [None, None]}


def test_relative_change_and_its_interval() -> None:
    base = np.random.default_rng(0).uniform(0.4, 0.6, 50)
    assert relative_change(base, 0.4 * base, distinct(50), samples=500, seed=0) == pytest.approx((-0.6, -0.6, -0.6))
    assert math.isnan(relative_change(np.zeros(5), np.ones(5), distinct(5), samples=10, seed=0)[0])
