"""comparison.html: table, plots and images of the comparison on one self-contained page."""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gdro.common.files import write_bytes
from gdro.common.progress import duration
from gdro.common.rng import numpy_rng
from gdro.common.sealed import read_record
from gdro.common.yaml import dump_yaml
from gdro.evaluation.gallery import figure, is_pixel_art
from gdro.evaluation.measure import read_evidence
from gdro.groups.store import GroupStore
from gdro.tools.comparison.plots import cost_svg
from gdro.tools.comparison.table import HEAD, INTERVALS, geneval_rows, rows, search_note, searches

SHOWN_PROMPTS = 6


def write_page(results: Mapping[str, Any], out: Path) -> Path:
    """Write `out`/comparison.html from the results, and from the images of the runs below `out` that are there."""
    tasks = []
    for name, task in results["tasks"].items():
        svg = cost_svg(name, task)
        tasks.append(
            {
                "name": name,
                "target_reward": task["target_reward"],
                "budget": task["budget"],
                "head": HEAD,
                "rows": rows(task),
                "official": geneval_rows(task),
                "svg": None if svg is None else Markup(svg),
                "searched_on": task["searched_on"],
                "choices": _choices(task),
                "failed": {m["title"]: m["failed"] for m in task["methods"].values() if m["failed"]},
                **_images(task, out),
            }
        )
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string((files("gdro.tools.comparison") / "comparison.html").read_text(encoding="utf-8"))
    path = out / "comparison.html"
    page = {
        "tasks": tasks,
        "results": results,
        "intervals": INTERVALS,
        "search_note": search_note(results),
        "searches": searches(results),
        "wall": duration(results["wall_seconds"]),
        "settings": dump_yaml({name: results[name] for name in ("spec", "machine", "versions")}),
    }
    write_bytes(path, template.render(page).encode())
    return path


def _choices(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What was searched over, one table a method."""
    return [
        {"title": method["title"], **method["choice"]}
        for method in task["methods"].values()
        if method["choice"] is not None and method["continues"] is None
    ]


def _images(task: Mapping[str, Any], out: Path) -> dict[str, Any]:
    """The first image of some prompts, drawn before looking at any: the base and every method on the same noise.

    Methods are shown at one seed, the first that any of them finished.
    """
    finished = {name: method for name, method in task["methods"].items() if method["seeds"]}
    if not finished:
        return {"prompts": [], "sides": [], "seed": None, "pixels": False}
    seed = next(iter(next(iter(finished.values()))["seeds"]))
    shown = {name: method for name, method in finished.items() if seed in method["seeds"]}
    runs = {method["title"]: out / method["seeds"][seed]["folder"] for method in shown.values()}
    first = next(iter(runs.values()))
    evaluation = read_record(first / "evaluation.json")
    ids = evaluation["prompt_ids"]
    places = numpy_rng(int(seed), "report prompts").permutation(len(ids))[:SHOWN_PROMPTS]
    store = GroupStore(first / "evaluation" / "base")
    sides = [_side("base", first, "base", ids, places)]
    sides += [_side(title, run, "tuned", ids, places) for title, run in runs.items()]
    return {
        "prompts": [store.prompt(ids[place]).text for place in places],
        "sides": sides,
        "seed": seed,
        "pixels": is_pixel_art(store.images(ids[0])[0]),
    }


def _side(title: str, run: Path, side: str, ids: list[str], places: Any) -> dict[str, Any]:
    evaluation = read_record(run / "evaluation.json")
    folder = run / "evaluation" / side
    store = GroupStore(folder)
    evidence = read_evidence(folder / "rewards" / f"{evaluation['reward']}.parquet")
    figures = []
    for place in places:
        prompt, image_id = store.prompt(ids[place]), store.image_ids(ids[place])[0]
        reward = evaluation[side]["reward"][place][0]
        image = store.images(ids[place])[0]
        figures.append(figure(image, reward, evidence.get(image_id, {}), f"{title}: {prompt.text}"))
    return {"title": title, "images": figures}
