"""The main table: cells as text, the same for Markdown and the page; and its place in a README."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gdro.common.errors import UserError
from gdro.common.files import write_bytes
from gdro.common.reading import read_text
from gdro.evaluation.statistics import AXES

HEAD = (
    "method",
    "reward",
    "corrected",
    "alignment · coherence · style",
    "layout diversity",
    "verdict",
    "model evaluations to target (k)",
    "seconds to target",
    "seconds: generate · score · train",
    "seeds",
)
INTERVALS = (
    "Cells are means over the seeds that finished. Reward, corrected score, costs to the target and the GenEval "
    "summary carry ± half their 95 % t-interval; × is the geometric mean of the ratio to the first method on the same "
    "seed, with the ends of its 95 % t-interval (of the logarithm). Axes, diversity and seconds per stage carry none, "
    "nor do lower bounds, marked >, and single seeds."
)
START, END = "<!-- comparison:start -->", "<!-- comparison:end -->"


def rows(task: Mapping[str, Any]) -> list[list[str]]:
    """The cells of one task's table under HEAD: the base, then the methods in the comparison's order.

    Costs to the target carry their ratio to the first method's; ">" marks a lower bound (a seed never got there). A
    method with another budget than the task's says so.
    """
    out = []
    if task["base"] is not None:
        base = task["base"]
        out.append(["base", _score(base["reward"]), _score(base["corrected"]), _axes(base), *["–"] * 5, _count(base)])
    for place, method in enumerate(task["methods"].values()):
        title = method["title"]
        if method["budget"] != task["budget"]:
            title += f" (budget {method['budget']:,})"
        found = method["over_seeds"]
        failures = len(method["failed"])
        if found is None:
            words = f"failed: {next(iter(method['failed'].values()))}" if failures else "not run yet"
            out.append([title, words, *["–"] * (len(HEAD) - 2)])
            continue
        to_target = [
            _cost(found["to_target"][cost], unit) + (" (×1)" if place == 0 else _ratio(found["to_first"][cost]))
            for cost, unit in (("nfe", 1000), ("seconds", 1))
        ]
        out.append(
            [
                title,
                _score(found["reward"]),
                _score(found["corrected"]),
                _axes(found),
                _relative(found["image_stats"]["layout_diversity"]["mean"]),
                _verdicts(found["verdicts"], found["alarms"]),
                *to_target,
                " · ".join(_plain(found["seconds"][stage]["mean"], 0) for stage in ("sample", "score", "train")),
                _count(found) + (f", {failures} failed" if failures else ""),
            ]
        )
    return out


def markdown(results: Mapping[str, Any]) -> str:
    """A table a task; folded, GenEval's official summary and what was searched."""
    parts, folded = [], []
    for name, task in results["tasks"].items():
        part = [
            f"**{_cell(name)}**: target reward {task['target_reward']:g}, budget {task['budget']:,} model evaluations"
        ]
        parts.append("\n".join([*part, "", _line(HEAD), _line(["---"] * len(HEAD)), *map(_line, rows(task))]))
        official = geneval_rows(task)
        if official:
            lines = [f"Official GenEval summary ({_cell(name)}):", "", _line(official[0])]
            folded.append("\n".join([*lines, _line(["---"] * len(official[0])), *map(_line, official[1:])]))
    searched = [f"- {_cell(line)}" for line in searches(results)]
    if searched:
        folded.append("\n".join(searched))
    parts.append(_cell(_note(results)))
    if folded:
        parts += ["<details><summary>By tag; what was searched</summary>", *folded, "</details>"]
    return "\n\n".join(parts) + "\n"


def search_note(results: Mapping[str, Any]) -> str:
    """On what the searched fields were chosen; "" if nothing was searched."""
    if not searches(results):
        return ""
    shared = {task["searched_on"] for task in results["tasks"].values()}
    if len(results["tasks"]) > 1 and len(shared) == 1:
        return f"The searched fields were chosen once, on validation prompts of {next(iter(shared))}, for every task."
    return "The searched fields were chosen on each task's own validation prompts."


def searches(results: Mapping[str, Any]) -> list[str]:
    """A line a search: its task, the fields searched, the values tried, those chosen."""
    lines = []
    for name, task in results["tasks"].items():
        for method in task["methods"].values() if task["searched_on"] == name else ():
            choice = method["choice"]
            if choice is None or method["continues"] is not None:
                continue
            candidates = [candidate["values"] for candidate in choice["candidates"]]
            tried = [
                f"{field} {', '.join(dict.fromkeys(str(values[field]) for values in candidates))}"
                for field in candidates[0]
            ]
            taken = "none" if choice["chosen"] is None else ", ".join(map(str, candidates[choice["chosen"]].values()))
            lines.append(
                f"{method['title']} ({name}): {len(candidates)} candidates, {'; '.join(tried)}; chosen {taken}"
            )
    return lines


def geneval_rows(task: Mapping[str, Any]) -> list[list[str]]:
    """Head and rows of the official GenEval summary (six tags and their mean); [] where no run carries it."""
    named = [("base", task["base"])] + [(m["title"], m["over_seeds"]) for m in task["methods"].values()]
    found = [(title, summary["geneval"]) for title, summary in named if summary and "geneval" in summary]
    if not found:
        return []
    tags = list(found[0][1])
    return [["method", *tags], *([title, *(_score(values[tag]) for tag in tags)] for title, values in found)]


def put_into(path: Path, text: str) -> None:
    """Replace what stands between the comparison's markers in the Markdown file `path`."""
    page = read_text(path, f"a Markdown file with {START} and {END}")
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise UserError(f"{path} has no one place for the table; expected {START} and then {END}, once each")
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    write_bytes(path, f"{before}{START}\n{text.strip()}\n{END}{after}".encode())


def _note(results: Mapping[str, Any]) -> str:
    quick = (
        "A quick run that shows the shape only: budgets and prompts are too small for any conclusion."
        if results["quick"]
        else ""
    )
    parts = [
        f"Seeds {', '.join(map(str, results['seeds']))}; {results['jobs']} jobs at once, {results['threads']} each. "
        "Costs include generating the groups, not validation.",
        INTERVALS,
        search_note(results),
        quick,
    ]
    return " ".join(part for part in parts if part)


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(map(_cell, cells))} |"


def _cell(text: str) -> str:
    """Text that a Markdown table shows as it is."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return " ".join(text.split()).replace("\\", "\\\\").replace("|", "\\|")


def _plain(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _score(found: Mapping[str, Any]) -> str:
    if found["mean"] is None or found["ci95"] is None:
        return _plain(found["mean"], 3)
    return f"{found['mean']:.3f} ± {(found['ci95'][1] - found['ci95'][0]) / 2:.3f}"


def _axes(found: Mapping[str, Any]) -> str:
    return " · ".join(_plain(found[axis]["mean"], 2) for axis in AXES)


def _relative(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.0f} %"


def _verdicts(counts: Mapping[str, int], alarms: int) -> str:
    """The runs' outcomes, and at how many of them the training alarm was on."""
    seeds = sum(counts.values())
    told = next(iter(counts)) if len(counts) == 1 else ", ".join(f"{count} {name}" for name, count in counts.items())
    return told + (f" (alarm{f' {alarms} of {seeds}' if seeds > 1 else ''})" if alarms else "")


def _cost(value: Mapping[str, Any], unit: int) -> str:
    digits = 0 if value["mean"] >= 10 * unit else 1
    text = f"{'> ' if value['lower_bound'] else ''}{_plain(value['mean'] / unit, digits)}"
    if value["ci95"] is None:
        return text
    return f"{text} ± {_plain((value['ci95'][1] - value['ci95'][0]) / 2 / unit, digits)}"


def _ratio(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    ends = "" if value["ci95"] is None else f", {value['ci95'][0]:.1f} to {value['ci95'][1]:.1f}"
    return f" (×{'> ' if value['lower_bound'] else ''}{value['mean']:.1f}{ends})"


def _count(found: Mapping[str, Any]) -> str:
    return str(found["reward"]["n"])
