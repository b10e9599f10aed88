"""Reward and corrected score against cost, every method of a task: for the page and as files for a README."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

from gdro.common.files import write_bytes
from gdro.evaluation.plots import GRID, INK, STYLE, inline_svg

# One color a method, in the table's order; each reads on white and on black.
COLORS = (
    *("#2f6fdf", "#d9480f", "#2b9348", "#9c36b5", "#c99700", "#0b9fb3"),
    *("#d6336c", "#7d8a18", "#7a6a5a", "#6f6fd8", "#c0504d", "#4f9d8f"),
)
PANELS = (("reward", "Validation reward"), ("corrected", "Corrected score"))
_ON_WHITE = {INK: "#44474d", GRID: "#e3e1dc"}


def colors(methods: Mapping[str, Any]) -> dict[str, str]:
    """Method -> its color; one that continues another has that one's."""
    own = [name for name, method in methods.items() if method["continues"] is None]
    found = {name: COLORS[i % len(COLORS)] for i, name in enumerate(own)}
    return {name: found[method["continues"] or name] for name, method in methods.items()}


def cost_svg(name: str, task: Mapping[str, Any]) -> str | None:
    """The figure for the page, in its colors; None without a finished run."""
    figure = _cost_figure(task, STYLE)
    return None if figure is None else inline_svg(figure, f"{name}: reward and corrected score against cost")


def write_pictures(name: str, task: Mapping[str, Any], folder: Path) -> list[Path]:
    """`folder`/spec-<task>.svg and .png on white; [] without a finished run."""
    style = {key: _ON_WHITE.get(value, value) if isinstance(value, str) else value for key, value in STYLE.items()}
    paths = []
    for kind in ("svg", "png"):
        figure = _cost_figure(task, style)
        if figure is None:
            return []
        buffer = io.BytesIO()
        with matplotlib.rc_context({**style, "svg.hashsalt": name}):
            metadata = {"Date": None} if kind == "svg" else None
            figure.savefig(buffer, format=kind, dpi=160, facecolor="white", bbox_inches="tight", metadata=metadata)
        paths.append(folder / f"spec-{name}.{kind}")
        write_bytes(paths[-1], buffer.getvalue())
    return paths


def mean_curve(curves: Sequence[Sequence[Mapping[str, Any]]], score: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean cost and mean score (n,) of the seeds' i-th validations, for as long as every seed has one."""
    count = min(map(len, curves))
    cost, value = (
        np.array([[point[field] for point in points[:count]] for points in curves], dtype=np.float64)
        for field in ("nfe", score)
    )
    return cost.mean(axis=0), value.mean(axis=0)


def _cost_figure(task: Mapping[str, Any], style: Mapping[str, Any]) -> Figure | None:
    methods = {name: method for name, method in task["methods"].items() if method["seeds"]}
    if not methods:
        return None
    palette = colors(task["methods"])
    with matplotlib.rc_context(dict(style)):
        figure = Figure(figsize=(11.5, 4.0))
        panels = figure.subplots(1, 2)
        for axis, (score, title) in zip(panels, PANELS, strict=True):
            # the first method is drawn last, on top of the others
            for place, (name, method) in reversed(list(enumerate(methods.items()))):
                _draw(axis, method, score, palette[name], emphasis=place == 0)
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.xaxis.set_major_formatter(EngFormatter(sep=""))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_title(title)
            axis.set_xlabel("model evaluations, generation included")
        panels[0].axhline(task["target_reward"], color=style["text.color"], linewidth=0.8, linestyle=(0, (4, 3)))
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(1.0, 0.5))
        figure.tight_layout(w_pad=2)
        return figure


def _draw(axis: Any, method: Mapping[str, Any], score: str, color: str, *, emphasis: bool) -> None:
    """Seeds thin, their mean bold; dashed for a method that continues another. Points without the score are left."""
    curves = [
        [point for point in run["curve"] if point[score] is not None and point["nfe"] > 0]
        for run in method["seeds"].values()
    ]
    curves = [points for points in curves if points]
    if not curves:
        return
    dashes = (0, (3, 2)) if method["continues"] else "solid"
    for points in curves if len(curves) > 1 else []:
        axis.plot(*_xy(points, score), color=color, linewidth=0.6, alpha=0.35, linestyle=dashes)
    width = 2.6 if emphasis else 1.6
    mean = mean_curve(curves, score)
    label = method["title"].replace("$", r"\$")  # else mathematics
    axis.plot(*mean, color=color, linewidth=width, linestyle=dashes, marker="o", markersize=3, label=label)


def _xy(points: Sequence[Mapping[str, Any]], score: str) -> tuple[list[float], list[float]]:
    return [point["nfe"] for point in points], [point[score] for point in points]
