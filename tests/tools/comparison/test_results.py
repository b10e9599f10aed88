"""Curves, costs to a target, intervals over seeds; and the table, the page and the plots of them."""

import math
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gdro.common.errors import UserError
from gdro.common.sealed import write_record
from gdro.tools.comparison.page import write_page
from gdro.tools.comparison.plots import colors, mean_curve, write_pictures
from gdro.tools.comparison.results import (
    compare_to_first,
    cost_ratio,
    cost_to_reach,
    curve,
    over_seeds,
    run_results,
    summarize,
    t_quantile,
)
from gdro.tools.comparison.table import END, HEAD, START, geneval_rows, markdown, put_into, rows, search_note, searches
from tests.run_files import write_metrics


def validation(step: int, reward: float, nfe: int) -> dict[str, Any]:
    return {
        "step": step,
        "reward": reward,
        "corrected": 2 * reward,
        "nfe": {"sample": 100, "train": nfe - 100},
        "seconds": {"sample": 1.0, "score": 2.0, "train": nfe / 100},
    }


def run(
    folder: Path, rewards: list[float], *, geneval: bool = False, outcome: str = "improved", alarm: bool = False
) -> dict[str, Any]:
    """Write what a finished run directory holds of figures, and read it as the comparison does."""
    (folder / "checkpoints").mkdir(parents=True)
    last = {"base": 0.4, "tuned": rewards[-1], "gain": rewards[-1] - 0.4, "ci95": [0.0, 0.1]}
    sign = {"base": 0.2, "tuned": 0.1, "gain": -0.1, "ci95": [-0.2, 0.0], "relative": -0.5, "relative_ci95": [-1, 0]}
    evaluation: dict[str, Any] = {
        "results": dict.fromkeys(("reward", "corrected", "alignment", "coherence", "style"), last),
        "image_stats": {"layout_diversity": sign},
        "verdict": {"outcome": outcome, "headline": "", "lines": []},
        "alarm": {"step": 2, "on": alarm, "excess": 0.03},
    }
    if geneval:
        evaluation["geneval"] = {side: {"counting": 0.5, "overall": 0.6} for side in ("base", "tuned")}
    summary = {
        "nfe": {"sample": 100, "train": 300},
        "seconds": {"sample": 1.0, "score": 2.0, "train": 30.0, "evaluate": 9.0},
    }
    write_record(folder / "evaluation.json", evaluation)
    write_record(folder / "summary.json", summary)
    write_record(folder / "checkpoints" / "stopped.json", {"step": 2, "reason": "target_reward"})
    points = [validation(step, reward, 200 * (step + 1)) for step, reward in enumerate(rewards)]
    lines = [{"step": p.pop("step"), "validation": p} for p in points]
    write_metrics(folder / "metrics.jsonl", lines)
    return run_results(folder, target=0.6)


def results(tmp_path: Path, title: str = "GDRO <b>|x", *, geneval: bool = False) -> dict[str, Any]:
    methods: dict[str, Any] = {}
    for name, ends in (("gdro", [[0.4, 0.5, 0.7], [0.4, 0.6, 0.7]]), ("slow", [[0.4, 0.45, 0.5], [0.4, 0.5, 0.6]])):
        seeds = {str(i): run(tmp_path / name / str(i), end, geneval=geneval) for i, end in enumerate(ends)}
        methods[name] = {
            "title": title if name == "gdro" else name,
            "continues": None,
            "budget": 1000,
            "choice": None,
            "seeds": seeds,
            "over_seeds": summarize(seeds),
            "failed": {},
        }
    methods["lost"] = {
        **methods["slow"],
        "title": "lost",
        "seeds": {},
        "over_seeds": None,
        "failed": {"0": "no <disk>"},
    }
    compare_to_first(methods)
    task = {
        "target_reward": 0.6,
        "budget": 1000,
        "searched_on": "ocr",
        "base": summarize(methods["gdro"]["seeds"], "base"),
        "methods": methods,
    }
    settings = {"jobs": 2, "threads": "one thread", "quick": False, "wall_seconds": 60, "spec": {}}
    return {"tasks": {"ocr": task}, "seeds": [0, 1], "machine": {}, "versions": {}, **settings}


def test_the_cost_to_a_target_is_linear_between_validations() -> None:
    points = curve(
        [validation(0, 0.4, 200), validation(5, 0.5, 400), validation(9, 0.7, 800), validation(12, 0.9, 900)]
    )
    assert points[1] == {"step": 5, "reward": 0.5, "corrected": 1.0, "nfe": 400, "seconds": 7.0}
    assert cost_to_reach(points, 0.6, "nfe") == pytest.approx(600)
    assert cost_to_reach(points, 0.6, "seconds") == pytest.approx(9.0)
    assert cost_to_reach(points, 0.5, "nfe") == 400
    assert cost_to_reach(points, 0.3, "nfe") == 200
    assert cost_to_reach(points, 0.95, "nfe") is None


def test_the_first_crossing_counts_even_if_the_reward_falls_again() -> None:
    points = curve([validation(i, r, 100 * (i + 1)) for i, r in enumerate([0.4, 0.7, 0.5, 0.8])])
    assert cost_to_reach(points, 0.6, "nfe") == pytest.approx(100 + 100 * 2 / 3)


def test_t_quantiles_are_the_tables() -> None:
    for degrees, value in {1: 12.706, 2: 4.303, 5: 2.571, 6: 2.447, 9: 2.262, 30: 2.042, 1000: 1.962}.items():
        assert t_quantile(degrees) == pytest.approx(value, abs=2e-3)


def test_the_interval_over_seeds_is_students() -> None:
    found = over_seeds([0.7, 0.8, 0.9])
    half = 4.3027 * 0.1 / 3**0.5
    assert found["mean"] == pytest.approx(0.8)
    assert found["ci95"] == pytest.approx([0.8 - half, 0.8 + half])
    assert over_seeds([0.7, None]) == {"mean": 0.7, "ci95": None, "n": 1}
    assert over_seeds([None]) == {"mean": None, "ci95": None, "n": 0}


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = []
    for values in rng.normal(1.0, 2.0, size=(2000, 3)):
        low, high = over_seeds(list(values))["ci95"]
        hits.append(low <= 1.0 <= high)
    assert np.mean(hits) == pytest.approx(0.95, abs=0.015)


def test_a_seed_that_never_got_there_makes_the_mean_a_lower_bound(tmp_path: Path) -> None:
    one, other = run(tmp_path / "a", [0.4, 0.6]), run(tmp_path / "b", [0.4, 0.5])
    found = summarize({"0": one, "1": other})["to_target"]["nfe"]
    assert (found["mean"], found["reached"], found["lower_bound"], found["ci95"]) == (400, 1, True, None)
    assert other["to_target"] == {"nfe": None, "seconds": None}


def spent(cost: float | None, most: float = 900.0) -> dict[str, Any]:
    return {"to_target": {"nfe": cost}, "spent": {"nfe": most}}


def test_the_ratio_of_costs_is_paired_by_seed() -> None:
    first = {"0": spent(100), "1": spent(400), "2": spent(50)}
    found = cost_ratio({"0": spent(200), "1": spent(3200), "3": spent(1)}, first, "nfe")
    half = 12.7062 * np.std([math.log(2), math.log(8)], ddof=1) / 2**0.5
    assert found is not None
    assert found["mean"] == pytest.approx(4.0)  # the geometric mean of 2 and 8
    assert found["ci95"] == pytest.approx([4 * math.exp(-half), 4 * math.exp(half)])
    assert (found["n"], found["lower_bound"]) == (2, False)


def test_a_ratio_with_an_unreached_target_is_a_bound_and_one_to_a_bound_is_none() -> None:
    bound = cost_ratio({"0": spent(200), "1": spent(None)}, {"0": spent(100), "1": spent(100)}, "nfe")
    assert bound is not None
    assert (bound["mean"], bound["lower_bound"], bound["ci95"]) == (pytest.approx(18**0.5), True, None)
    assert cost_ratio({"0": spent(200)}, {"0": spent(None)}, "nfe") is None
    assert cost_ratio({"0": spent(200)}, {"1": spent(100)}, "nfe") is None


def test_a_method_with_another_budget_says_so(tmp_path: Path) -> None:
    task = results(tmp_path)["tasks"]["ocr"]
    task["methods"]["slow"]["budget"] = 2000
    assert [row[0] for row in rows(task)] == ["base", "GDRO <b>|x", "slow (budget 2,000)", "lost"]


def test_table_and_page_say_what_was_searched_and_on_what(tmp_path: Path) -> None:
    found = results(tmp_path, title="GDRO")
    assert search_note(found) == ""
    values = [{"train.k": k, "train.beta": beta} for k in (2, 4) for beta in (1.0, 3.0)]
    choice = {"rule": "the best", "chosen": 1, "candidates": [{"values": v, "error": "x"} for v in values]}
    ocr = found["tasks"]["ocr"]
    for method in ocr["methods"].values():
        method["seeds"] = {}  # their images are not there
    ocr["methods"]["gdro"]["choice"] = choice
    line = "GDRO (ocr): 4 candidates, train.k 2, 4; train.beta 1.0, 3.0; chosen 2, 3.0"
    assert searches(found) == [line]
    assert "on each task's own validation prompts" in markdown(found)
    found["tasks"]["other"] = ocr  # searched on ocr too
    text, page = markdown(found), write_page(found, tmp_path).read_text()
    for shown in (text, page):
        assert "chosen once, on validation prompts of ocr, for every task" in shown
        assert shown.count(line) == 1


def test_the_table_has_the_base_then_the_methods(tmp_path: Path) -> None:
    found = rows(results(tmp_path)["tasks"]["ocr"])
    assert [row[0] for row in found] == ["base", "GDRO <b>|x", "slow", "lost"]
    assert all(len(row) == len(HEAD) for row in found)
    assert found[0][1] == "0.400 ± 0.000"
    costs = [row[HEAD.index("model evaluations to target (k)")] for row in found]
    assert costs == ["–", "0.5 ± 0.6 (×1)", "> 0.6 (×> 1.3)", "–"]
    assert found[1][HEAD.index("layout diversity")] == "-50 %"
    assert found[1][HEAD.index("seconds: generate · score · train")] == "1 · 2 · 30"
    assert found[3][1] == "failed: no <disk>"


def test_markdown_and_page_escape_what_the_file_says(tmp_path: Path) -> None:
    found = results(tmp_path)
    text = markdown(found)
    assert "GDRO &lt;b&gt;\\|x" in text
    assert {line.replace("\\|", "").count("|") for line in text.splitlines() if line.startswith("|")} == {len(HEAD) + 1}
    for method in found["tasks"]["ocr"]["methods"].values():
        method["seeds"] = {}  # their images are not there
    page = write_page(found, tmp_path).read_text()
    assert "GDRO &lt;b&gt;|x" in page
    assert "<b>|x" not in page
    assert "lost, seed 0, failed: no &lt;disk&gt;" in page
    assert "http" not in page


def test_geneval_runs_carry_the_official_summary(tmp_path: Path) -> None:
    found = results(tmp_path, geneval=True)
    official = geneval_rows(found["tasks"]["ocr"])
    assert official[0] == ["method", "counting", "overall"]
    assert official[1] == ["base", "0.500 ± 0.000", "0.600 ± 0.000"]
    assert "Official GenEval summary" in markdown(found)
    assert geneval_rows(results(tmp_path / "ocr")["tasks"]["ocr"]) == []


def test_the_readme_keeps_everything_else(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"before\n{START}\nold\n{END}\nafter\n")
    put_into(path, "new\n")
    put_into(path, "newer\n")
    assert path.read_text() == f"before\n{START}\nnewer\n{END}\nafter\n"
    path.write_text(f"{END} {START}")
    with pytest.raises(UserError, match="no one place for the table"):
        put_into(path, "new")
    with pytest.raises(UserError, match="expected a Markdown file"):
        put_into(tmp_path / "none.md", "new")


def test_the_plots_mean_is_over_seeds_that_go_on() -> None:
    long = [{"nfe": 10, "reward": 0.2}, {"nfe": 20, "reward": 0.4}, {"nfe": 30, "reward": 0.9}]
    cost, reward = mean_curve([long, [{"nfe": 12, "reward": 0.4}, {"nfe": 22, "reward": 0.6}]], "reward")
    assert cost.tolist() == [11, 21]
    assert reward.tolist() == pytest.approx([0.3, 0.5])


def test_pictures_are_files_of_their_own(tmp_path: Path) -> None:
    task = results(tmp_path)["tasks"]["ocr"]
    task["methods"]["slow"]["continues"] = "gdro"
    task["methods"]["slow"]["title"] = "costs $5 or $\\oops"  # no mathematics
    palette = colors(task["methods"])
    assert palette["slow"] == palette["gdro"] != palette["lost"]
    svg, png = write_pictures("ocr", task, tmp_path)
    assert ET.fromstring(svg.read_text()).tag.endswith("svg")
    assert png.read_bytes().startswith(b"\x89PNG")
    again = tmp_path / "again"
    assert write_pictures("ocr", task, again)[0].read_bytes() == svg.read_bytes()
    assert write_pictures("ocr", {**task, "methods": {"lost": task["methods"]["lost"]}}, tmp_path) == []


def test_the_alarm_stands_beside_the_verdict(tmp_path: Path) -> None:
    found = [run(tmp_path / str(i), [0.4, 0.7], alarm=i < 2) for i in range(3)]
    task = results(tmp_path / "whole")["tasks"]["ocr"]
    for seeds, cell in ((found[2:], "improved"), (found[:1], "improved (alarm)"), (found, "improved (alarm 2 of 3)")):
        task["methods"]["gdro"]["over_seeds"] |= {
            name: summarize({str(i): one for i, one in enumerate(seeds)})[name] for name in ("verdicts", "alarms")
        }
        assert rows(task)[1][HEAD.index("verdict")] == cell
