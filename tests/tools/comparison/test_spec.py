"""The comparison file: merging, the order of jobs, refusals in one line."""

from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import yaml

from gdro.common.errors import UserError
from gdro.objectives.forward.gdro import Gdro, Rank
from gdro.runner.config import flat
from gdro.tools.comparison.spec import load_spec, merged, nested


def spec_data() -> dict[str, Any]:
    run: dict[str, Any] = {
        "sample": {"prompts": "train.jsonl", "num_inference_steps": 2, "images_per_prompt": 4},
        "train": {"k": 3, "validation_prompts": "validation.jsonl", "learning_rate": 1e-3},
        "evaluate": {"prompts": "test.jsonl"},
    }
    return {
        "seeds": [0, 1],
        "common": run,
        "tasks": {"ocr": {"target_reward": 0.6, "budget": 1000}, "other": {"target_reward": 0.5, "budget": 500}},
        "methods": {
            "gdro": {
                "title": "GDRO",
                "stop_at_target": True,
                "set": {"train": {"objective": "gdro", "beta": 3.0}},
                "per_task": {"other": {"train": {"beta": 4.0}}},
                "search": {"train.learning_rate": [1e-4, 1e-3], "train.gamma": [0.5]},
            },
            "rank": {
                "title": "Rank",
                "set": {"train": {"objective": "rank"}},
                "search": {"train.learning_rate": [1e-4, 1e-2]},
            },
            "rank_over": {
                "title": "Rank, longer",
                "continues": "rank",
                "budget": 2.0,
                "set": {"train": {"export": "last"}},
            },
        },
        "search": {"seed": 7, "budget": 0.5, "set": {"sample": {"images_per_prompt": 3}}},
        "quick": {"budget": 0.1, "per_task": {"ocr": {"sample": {"prompts": "few.jsonl"}}}},
    }  # fmt: skip


def write(folder: Path, data: Any) -> Path:
    path = folder / "comparison.yaml"
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    return path


def test_later_parts_win_and_lists_are_replaced_whole() -> None:
    one, other = {"a": {"b": 1, "c": [1, 2]}, "d": 1}, {"a": {"c": [3]}, "d": {"e": 2}}
    assert merged(one, other) == {"a": {"b": 1, "c": [3]}, "d": {"e": 2}}
    assert one == {"a": {"b": 1, "c": [1, 2]}, "d": 1}
    values = {"train.k": 4, "train.beta": 2.0, "seed": 1}
    assert nested(values) == {"train": {"k": 4, "beta": 2.0}, "seed": 1}
    assert dict(flat(nested(values))) == values


def test_a_run_is_common_task_method_per_task_choice(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, spec_data()))
    assert spec.candidates("gdro") == [
        {"train.learning_rate": 1e-4, "train.gamma": 0.5},
        {"train.learning_rate": 1e-3, "train.gamma": 0.5},
    ]
    config = spec.run_config("ocr", "gdro", 1, spec.candidates("gdro")[0])
    assert (config.seed, config.train.objective, config.train.learning_rate) == (1, Gdro(beta=3.0), 1e-4)
    assert (config.train.max_nfe, config.train.target_reward) == (1000, 0.6)
    assert spec.run_config("other", "gdro", 1, {}).train.objective == Gdro(beta=4.0)

    tried = spec.search_config("ocr", "gdro", spec.candidates("gdro")[1])
    assert (tried.seed, tried.train.max_nfe, tried.train.target_reward) == (7, 500, None)
    assert tried.sample.images_per_prompt == 3


def test_a_continued_run_has_the_choice_and_more_budget(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, spec_data()))
    values = spec.candidates("rank_over")[1]
    config = spec.run_config("ocr", "rank_over", 0, values)
    assert (config.train.objective, config.train.learning_rate, config.train.export) == (Rank(), 1e-2, "last")
    assert (config.train.max_nfe, config.train.target_reward) == (2000, None)


def test_a_run_that_stopped_at_the_target_may_go_on_within_its_budget(tmp_path: Path) -> None:
    data = spec_data()
    data["methods"]["gdro_on"] = {"title": "GDRO, whole budget", "continues": "gdro"}
    spec = load_spec(write(tmp_path, data))
    config = spec.run_config("ocr", "gdro_on", 0, {})
    assert (config.train.max_nfe, config.train.target_reward) == (1000, None)
    assert spec.plan(["ocr"])[7].nfe == 1000  # its parent may have stopped at once


def test_one_search_may_serve_every_task(tmp_path: Path) -> None:
    data = spec_data()
    data["search"]["task"] = "other"
    spec = load_spec(write(tmp_path, data))
    searches = [job.name for job in spec.plan(["ocr", "other"]) if job.candidate is not None]
    assert searches == [f"other/{name}/search/{i}" for name in ("gdro", "rank") for i in (0, 1)]
    assert {job.name: job.after for job in spec.plan(["ocr"])}["ocr/rank/seed-1"] == tuple(searches[2:])
    data["search"]["task"] = "otter"
    with pytest.raises(UserError, match=r'search.task is "otter"; did you mean "other"'):
        load_spec(write(tmp_path, data))


def test_the_first_seed_of_everything_comes_first(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, spec_data()))
    jobs = spec.plan(["ocr"])
    assert [job.name for job in jobs] == [
        "ocr/gdro/search/0",
        "ocr/gdro/search/1",
        "ocr/gdro/seed-0",
        "ocr/rank/search/0",
        "ocr/rank/search/1",
        "ocr/rank/seed-0",
        "ocr/rank_over/seed-0",
        "ocr/gdro/seed-1",
        "ocr/rank/seed-1",
        "ocr/rank_over/seed-1",
    ]
    after = {job.name: job.after for job in jobs}
    assert after["ocr/gdro/seed-1"] == ("ocr/gdro/search/0", "ocr/gdro/search/1")
    assert after["ocr/rank_over/seed-1"] == ("ocr/rank/seed-1",)
    assert {job.name: job.nfe for job in jobs}["ocr/rank_over/seed-0"] == 1000


def test_quick_is_one_seed_a_share_of_the_budget_and_no_search(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, spec_data()), quick=True)
    assert [job.name for job in spec.plan(["ocr"])] == ["ocr/gdro/seed-0", "ocr/rank/seed-0", "ocr/rank_over/seed-0"]
    config = spec.run_config("ocr", "rank", 0, spec.candidates("rank")[0])
    assert (config.train.max_nfe, config.train.learning_rate) == (100, 1e-4)
    assert config.sample.prompts == "few.jsonl"
    assert (spec.budget("ocr"), spec.budget("ocr", "rank_over")) == (100, 200)


@pytest.mark.parametrize("quick", [False, True])
def test_the_packaged_bench_is_sound(quick: bool) -> None:
    with resources.as_file(resources.files("gdro") / "recipes" / "comparison.yaml") as path:
        spec = load_spec(path, quick=quick)
    assert set(spec.tasks) == {"ocr", "geneval"}
    assert next(iter(spec.methods)) == "gdro_offline"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": []}, "seeds is []"),
        ({"seeds": [0, 0]}, "seeds has 0 more than once"),
        ({"seeds": [0, 7]}, "search.seed is 7, which is one of seeds"),
        ({"sedes": [0]}, 'unknown field "sedes"; did you mean "seeds"?'),
        ({"tasks.ocr.budget": 0}, "tasks.ocr.budget is 0; expected greater than or equal to 1"),
        ({"tasks.ocr.target_reward": 1.5}, "tasks.ocr.target_reward is 1.5; expected a number between 0 and 1"),
        ({"tasks.ocr": {"budget": 10}}, "tasks.ocr.target_reward is missing"),
        ({"methods.rank.title": "GDRO"}, 'methods.rank.title is "GDRO", as methods.gdro.title; expected another'),
        ({"methods.gdro.titel": "x"}, 'unknown field "methods.gdro.titel"; did you mean "methods.gdro.title"?'),
        ({"methods.gdro.set.train.bta": 1.0}, 'methods.gdro, task ocr: unknown field "train.bta"'),
        ({"methods.rank.set.train.objective": "ranks"}, "methods.rank, task ocr: train.objective"),
        ({"methods.rank.set.train.learning_rate": -1.0}, None),  # its search sets it
        ({"methods.rank.search": {"train.learning_rate": [1e-4, -1.0]}}, "methods.rank, task ocr: train.learning_rate"),
        ({"methods.rank.search": {"train.learning_rate": [1e-4]}}, "methods.rank.search has 1 candidates"),
        ({"methods.rank.search": {"train.learning_rate": []}}, "methods.rank.search.train.learning_rate is []"),
        ({"methods.rank_over.continues": "rnk"}, 'continues: "rnk" is no method'),
        ({"methods.rank_over.continues": "rank_over"}, 'continues: "rank_over" is no method'),
        ({"methods.rank_over.budget": 1.0}, "methods.rank_over.budget is 1; expected more than 1"),
        ({"methods.rank_over.set.train.beta": 5.0}, "methods.rank_over, task ocr: sets train.beta to 5.0"),
        ({"methods.rank_over.search": {"train.k": [3, 4]}}, "methods.rank_over.search: it continues rank"),
        ({"methods.gdro.per_task": {"ocrr": {}}}, 'methods.gdro.per_task: "ocrr" is no task; did you mean "ocr"?'),
        ({"common.train.max_nfe": 5}, "common sets train.max_nfe; expected it from tasks"),
        ({"methods.gdro.set.seed": 5}, "methods.gdro.set sets seed; expected it from seeds"),
        ({"common.train.validation_steps": 0, "methods.gdro.stop_at_target": False}, "validation_prompts is null"),
        ({"methods": {"../x": {"title": "x"}}}, "expected letters, digits"),
    ],
)  # fmt: skip
def test_a_bad_file_is_refused(tmp_path: Path, change: dict[str, Any], message: str | None) -> None:
    data = spec_data()
    for name, value in change.items():
        *sections, field = name.split(".")
        place = data
        for section in sections:
            place = place.setdefault(section, {})
        place[field] = value
    path = write(tmp_path, data)
    if message is None:
        load_spec(path)
        return
    with pytest.raises(UserError) as refused:
        load_spec(path)
    line = str(refused.value)
    assert message in line
    assert line.startswith(str(path))
    assert "\n" not in line
