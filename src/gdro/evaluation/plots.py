"""The report's plots, as inline SVG with colors and font from the page's style sheet."""

import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap, to_rgb
from matplotlib.figure import Figure

# Drawn colors -> CSS variables of the page, so one plot works in the light and the dark theme.
INK, GRID, BASE, TUNED, THIRD = "#010101", "#020202", "#030303", "#040404", "#050505"
_VARIABLES = {INK: "--muted", GRID: "--line", BASE: "--base", TUNED: "--tuned", THIRD: "--third"}
STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": GRID,
    "ytick.color": GRID,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.6,
}


def inline_svg(figure: Figure, name: str) -> str:
    """The figure as an <svg> element without namespaces or metadata (hence no URLs), with ids unique to `name`."""
    buffer = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, bbox_inches="tight", pad_inches=0.04)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{escape(name)}">', text)
    referenced = set(re.findall(r"#(\w+)", text))
    text = re.sub(r' id="([^"]*)"', lambda m: m.group() if m[1] in referenced else "", text)
    text = re.sub(r"(font-family|font): ?[^;\"]*", _font_size, text)
    for color, variable in _VARIABLES.items():
        text = text.replace(color, f"var({variable})")
    return text.strip()


def _font_size(match: re.Match[str]) -> str:
    size = re.search(r"[\d.]+px", match.group())
    return f"font-size: {size.group()}" if size else "font-family: inherit"


def _figure(width: float, height: float, columns: int = 1) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height))
    axes = figure.subplots(1, columns, sharex=True, sharey=True, squeeze=False)[0]
    return figure, axes


def curves(name: str, rows: Sequence[Mapping[str, Any]], fields: Mapping[str, str]) -> str | None:
    """Training curves of the `fields` (name -> label) in `rows` against `step`; None if there are none.

    Series of more than 20 points are drawn pale, with their running mean on top.
    """
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(4.6, 2.5)
        drawn = False
        for color, (field, label) in zip((TUNED, BASE, THIRD), fields.items(), strict=False):
            points = [(row["step"], row[field]) for row in rows if _number(row.get(field))]
            if not points:
                continue
            drawn = True
            step, value = np.array(points, dtype=np.float64).T
            noisy = len(step) > 20
            if not noisy:
                axis.plot(step, value, color=color, label=label, marker="o", markersize=3)
            else:
                axis.plot(step, value, color=color, alpha=0.3, linewidth=0.8)
                axis.plot(step, _running_mean(value, max(5, len(value) // 20)), color=color, label=label)
        if not drawn:
            return None
        axis.set_title(name)
        axis.set_xlabel("step")
        axis.margins(x=0.01, y=0.12)
        if len(fields) > 1:
            axis.legend(loc="best")
        return inline_svg(figure, name)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Mean over the last `window` values (fewer at the start)."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    end = np.arange(1, len(values) + 1)
    start = np.maximum(0, end - window)
    return (total[end] - total[start]) / (end - start)


def reward_histogram(base: np.ndarray, tuned: np.ndarray) -> str:
    """Share of images in each of ten bands of reward, base beside tuned; rewards of any shape."""
    base, tuned = base[np.isfinite(base)], tuned[np.isfinite(tuned)]
    both = np.concatenate([base, tuned])
    low, high = (0.0, 1.0) if both.min() >= 0 and both.max() <= 1 else (float(both.min()), float(both.max()))
    edges = np.linspace(low, high if high > low else low + 1, 11)
    width = edges[1] - edges[0]
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(5.6, 2.6)
        for offset, values, color, label in ((0.28, base, BASE, "base"), (0.72, tuned, TUNED, "tuned")):
            share = 100 * np.histogram(values, edges)[0] / max(1, len(values))
            axis.bar(edges[:-1] + offset * width, share, width=0.4 * width, color=color, label=label)
        axis.set_title("Reward of the images")
        axis.set_xlabel("reward")
        axis.set_ylabel("% of images")
        axis.grid(visible=False, axis="x")
        axis.legend(loc="best")
        return inline_svg(figure, "Reward of the images")


def prompt_scatter(base: np.ndarray, tuned: np.ndarray) -> str:
    """Mean reward of each prompt (P,), tuned against base; prompts above the diagonal improved."""
    with matplotlib.rc_context(STYLE):
        figure, (axis,) = _figure(5.6, 2.6)
        both = np.concatenate([base, tuned])
        low, high = float(np.nanmin(both)), float(np.nanmax(both))
        axis.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
        axis.scatter(base, tuned, s=18, color=TUNED, alpha=0.45, linewidths=0)
        better, worse = int(np.sum(tuned > base)), int(np.sum(tuned < base))
        axis.set_title(f"Mean reward of each prompt: {better} better, {worse} worse")
        axis.set_xlabel("base")
        axis.set_ylabel("tuned")
        return inline_svg(figure, "Mean reward of each prompt")


def reward_against_quality(sides: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> str | None:
    """Density of images over (reward, judged quality u), one panel per side; None if nothing was judged."""
    pairs = {}
    for name, (reward, quality) in sides.items():
        kept = np.isfinite(reward) & np.isfinite(quality)
        pairs[name] = (reward[kept], quality[kept])
    if not all(len(reward) for reward, _ in pairs.values()):
        return None
    rewards = np.concatenate([reward for reward, _ in pairs.values()])
    low, high = min(0.0, float(rewards.min())), max(1.0, float(rewards.max()))
    with matplotlib.rc_context(STYLE):
        figure, axes = _figure(11.5, 3.1, columns=len(pairs))
        for axis, color, (name, (reward, quality)) in zip(axes, (BASE, TUNED), pairs.items(), strict=True):
            axis.hexbin(reward, quality, gridsize=(30, 12), extent=(low, high, 1, 5), mincnt=1, bins="log",
                        cmap=_ramp(color), linewidths=0)  # fmt: skip
            axis.plot(reward.mean(), quality.mean(), marker="+", color=INK, markersize=13, markeredgewidth=2)
            axis.set_title(f"{name}: mean reward {reward.mean():.3f}, mean quality {quality.mean():.2f}")
            axis.set_xlabel("reward")
            axis.set_ylim(0.9, 5.1)
        axes[0].set_ylabel("quality (judge, 1 to 5)")
        figure.tight_layout(w_pad=2)
        return inline_svg(figure, "Reward against quality")


def _ramp(color: str) -> ListedColormap:
    """One color from faint to full, so density is readable on any background."""
    return ListedColormap([(*to_rgb(color), alpha) for alpha in np.linspace(0.18, 1, 32)])
