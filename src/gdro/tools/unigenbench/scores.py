"""Accuracies from the judge's verdicts: by sub-criterion, by primary criterion, overall."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gdro.tools.unigenbench.criteria import PRIMARIES


@dataclass
class Tally:
    """Counts of images' test points: asked about, answered, and answered with 1."""

    total: int = 0
    answered: int = 0
    correct: int = 0

    @property
    def accuracy(self) -> float | None:
        """Share of answered points with 1; None if none is answered."""
        return self.correct / self.answered if self.answered else None

    @property
    def lower_bound(self) -> float | None:
        """Share of all points with 1, counting missing answers as 0."""
        return self.correct / self.total if self.total else None

    def add(self, other: "Tally") -> None:
        """Add another tally's counts."""
        self.total += other.total
        self.answered += other.answered
        self.correct += other.correct

    def to_json(self) -> dict[str, Any]:
        return {
            "accuracy": self.accuracy,
            "lower_bound": self.lower_bound,
            "correct": self.correct,
            "answered": self.answered,
            "missing": self.total - self.answered,
        }


def aggregate(verdicts: Iterable[tuple[Sequence[str], Sequence[int] | None]]) -> dict[str, Any]:
    """`overall`, `all_points`, `primary` and `sub` from each image's (English names of the points, their 0/1 or None).

    A criterion's accuracy pools its points over images, and a primary one's pools all its sub-criteria's points, as
    published; overall is the unweighted mean of the ten primary ones, null if one of them has no answers. All points of
    an image without a verdict are missing; `lower_bound` counts those as 0.
    """
    sub = {name: Tally() for names in PRIMARIES.values() for name in names}
    for points, scores in verdicts:
        for place, point in enumerate(points):
            sub[point].add(Tally(1) if scores is None else Tally(1, 1, scores[place]))
    primary = {name: Tally() for name in PRIMARIES}
    everything = Tally()
    for name, parts in PRIMARIES.items():
        for part in parts:
            primary[name].add(sub[part])
        everything.add(primary[name])
    return {
        "overall": {
            "accuracy": _mean([tally.accuracy for tally in primary.values()]),
            "lower_bound": _mean([tally.lower_bound for tally in primary.values()]),
        },
        "all_points": everything.to_json(),
        "primary": {name: tally.to_json() for name, tally in primary.items()},
        "sub": {name: tally.to_json() for name, tally in sub.items()},
    }


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return sum(there) / len(there) if len(there) == len(values) else None


def rows(results: dict[str, Any]) -> list[tuple[str, bool, dict[str, Any]]]:
    """(name, whether it is a primary criterion, its results): each primary criterion, then its parts if several."""
    found = []
    for name, parts in PRIMARIES.items():
        found.append((name, True, results["primary"][name]))
        if len(parts) > 1:
            found += [(part.partition(" - ")[2], False, results["sub"][part]) for part in parts]
    return found


def percent(value: float | None) -> str:
    """A share in percent; a dash for None."""
    return "–" if value is None else f"{100 * value:.2f}"


def notes(results: dict[str, Any]) -> list[str]:
    """Deviations from the published procedure, one sentence each."""
    lines = [f"Repaired in the file: {repair}" for repair in results["repairs"]]
    if own := results["judge"]["own_meanings"]:
        lines.append(f"The judge's script does not define {', '.join(own)}: gdro's words are used instead.")
    return lines


def markdown(results: dict[str, Any]) -> str:
    """The table of the results, accuracies in percent."""
    missing, images = results["images"]["missing"], results["images"]["asked"]
    lines = [
        "| criterion | accuracy % | missing as 0 % | correct | answered | missing |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    overall, everything = results["overall"], results["all_points"]
    lines.append(
        f"| **Overall** | **{percent(overall['accuracy'])}** | {percent(overall['lower_bound'])} | "
        f"{everything['correct']} | {everything['answered']} | {everything['missing']} |"
    )
    for name, is_primary, figures in rows(results):
        numbers = " | ".join(str(figures[key]) for key in ("correct", "answered", "missing"))
        shown = f"**{name}**" if is_primary else f"· {name}"
        lines.append(f"| {shown} | {percent(figures['accuracy'])} | {percent(figures['lower_bound'])} | {numbers} |")
    lines += ["", f"{images} images, {missing} of them without a verdict; judge {results['judge']['model']}."]
    lines += notes(results)
    if overall["accuracy"] is None:
        lines.append("No overall score: it is the mean of the ten primary criteria, and some have no answers here.")
    return "\n".join(lines) + "\n"
