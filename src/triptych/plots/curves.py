"""The curves of a training run, from its log of JSON lines."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from triptych.errors import DataError
from triptych.plots import style

Series = dict[str, tuple[np.ndarray, np.ndarray]]  # name -> x, y

CLOCKS = ("images", "images_seen", "step")  # what the x axis counts, the first that the log has
SCORES = {
    "top1",
    "top5",
    "mean_per_class",
    "miou",
    "pixel_accuracy",
    "mean_accuracy",
    "ssim",
    "precision",
    "recall",
}
NOT_SCORES = {"perplexity", "codes_used"}
DISTANCES = {"perceptual", "frechet", "kernel"}
NOT_CURVES = {*CLOCKS, "epoch", "time", "seconds", "elapsed", "count", "version"}


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a log.jsonl. A last line that a killed run left half-written is left out.

    Raises:
        DataError: no such file, not JSON lines, or no rows.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; give the folder of a training run, or its log.jsonl")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("not an object")
            rows.append(row)
        except ValueError as problem:
            if number == len(lines):
                break
            raise DataError(
                f"{path} line {number} is no JSON object; is it a log of a training run?"
            ) from problem
    if not rows:
        raise DataError(f"{path} has no rows yet; wait for the first, or give another run")
    return rows


def training_curves(rows: Iterable[Mapping[str, Any]], title: str = "Training") -> Figure:
    """Draw a panel each for losses, scores from 0 to 1, PSNR, distances, learning rate and speed; those that the rows
    have.

    Args:
        rows: dictionaries of numbers (nested ones are read as "outer/inner"), each with "images" or "step" to
            place it. The name of a number says which panel it belongs to: "...loss...", "lr", "..._per_second",
            "waiting", a score of a task such as "top1" or "miou", or any other number from 0 to 1 in "eval".

    Raises:
        DataError: there is nothing to draw.
    """
    clock, series = collect(rows)
    panels = {name: curves for name, curves in sorted_out(series).items() if curves}
    if not panels:
        raise DataError(
            "the log holds no loss, score, learning rate or speed; is it a log of a training run?"
        )
    last = max(float(x.max()) for x, _ in series.values()) or 1.0
    columns = min(2, len(panels))
    wide, high, left, top = 4.5, 2.35, 0.85, 1.25
    across, down = wide + 1.75, high + 1.0
    fig = style.figure(left + columns * across - 0.45, top + -(-len(panels) // columns) * down - 0.2)
    style.heading(fig, title, _summary(series))
    for i, (name, curves) in enumerate(panels.items()):
        x, y = left + i % columns * across, top + i // columns * down
        ax = style.quiet(style.axes(fig, x, y, wide, high))
        style.text(fig, x, y - 0.14, name, 10, weight="bold")
        _draw(ax, name, curves)
        ax.set_xlim(0, last * 1.02)
        ax.set_xlabel("images seen" if clock.startswith("images") else clock, fontsize=8)
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_count(value)))
    return fig


def collect(rows: Iterable[Mapping[str, Any]]) -> tuple[str, Series]:
    """Which clock the rows have, and every number in them as a series over it."""
    flat = [dict(_flattened(row)) for row in rows]
    clock = next((name for name in CLOCKS if any(name in row for row in flat)), "row")
    points: dict[str, list[tuple[float, float]]] = {}
    for number, row in enumerate(flat):
        at = row.get(clock, number if clock == "row" else None)
        for name, value in row.items():
            if at is not None and name.rpartition("/")[2] not in NOT_CURVES:
                points.setdefault(name, []).append((at, value))
    return clock, {name: (np.array(both)[:, 0], np.array(both)[:, 1]) for name, both in points.items()}


def sorted_out(series: Series) -> dict[str, Series]:
    """Assign each series to its panel, by its name; what fits nowhere is left out."""
    panels: dict[str, Series] = {
        "loss": {},
        "scores": {},
        "PSNR in dB": {},
        "distance": {},
        "learning rate": {},
        "images per second": {},
        "waiting for data": {},
    }
    for name, (x, y) in series.items():
        leaf = name.rpartition("/")[2]
        if "loss" in leaf:
            panel = "loss"
        elif leaf == "lr" or "learning_rate" in leaf:
            panel = "learning rate"
        elif "per_second" in leaf or leaf == "images/s" or leaf == "speed":
            panel = "images per second"
        elif "wait" in leaf:
            panel = "waiting for data"
        elif leaf == "psnr":
            panel = "PSNR in dB"
        elif leaf in DISTANCES:
            panel = "distance"
        elif _is_score(name, y):
            panel = "scores"
        else:
            continue
        panels[panel][name] = x, y
    return panels


def _is_score(name: str, y: np.ndarray) -> bool:
    """Return whether a series holds a score from 0 to 1: one that a task names, or a number of an evaluation that is
    nothing else, such as the accuracy on groups of classes, which the data names."""
    leaf = name.rpartition("/")[2].removeprefix("train_")
    finite = y[np.isfinite(y)]
    known = leaf in SCORES or (name.startswith("eval/") and leaf not in NOT_SCORES)
    return known and bool(len(finite)) and finite.min() >= 0 and finite.max() <= 1


def _draw(ax: Axes, name: str, curves: Series) -> None:
    for i, (x, y) in enumerate(curves.values()):
        color = style.CYCLE[i % len(style.CYCLE)]
        many = len(x) > 40 and name != "learning rate"
        if many:  # noise stays visible behind a running mean
            ax.plot(x, y, color=color, alpha=0.22, linewidth=0.8)
        shown = _smooth(y) if many else y
        ax.plot(x, shown, color=color, linewidth=1.6, marker="o" if len(x) <= 40 else "", markersize=3)
    if name == "scores":
        ax.set_ylim(0, 1)
    elif name in ("images per second", "waiting for data"):
        ax.set_ylim(bottom=0)
    if name == "waiting for data":
        ax.yaxis.set_major_formatter(PercentFormatter(1))
    if name == "loss":
        _log_if_wide(ax, curves)
    if len(curves) > 1:  # else the title says it
        _name_ends(ax, curves)


def _name_ends(ax: Axes, curves: Series) -> None:
    """Each curve's name next to its last value, moved apart where they would touch."""
    ax.autoscale_view()  # limits are settled late, and the place of a value depends on them
    to_axes = ax.transData + ax.transAxes.inverted()
    last = [
        float(to_axes.transform((0, _smooth(y)[-1] if len(y) > 40 else y[-1]))[1]) for _, y in curves.values()
    ]
    order = sorted(range(len(last)), key=lambda i: last[i] if np.isfinite(last[i]) else 0)
    step, floor = 0.085, -1.0
    places = {}
    for i in order:
        floor = max(floor + step, last[i] if np.isfinite(last[i]) else 0)
        places[i] = floor
    down = max(0.0, floor - 1.0)
    for i, name in enumerate(curves):
        color = style.CYCLE[i % len(style.CYCLE)]
        words = style.short(name.removeprefix("eval/") if "loss" not in name else name, 18)
        ax.text(1.02, places[i] - down, words, color=color, fontsize=8, va="center", transform=ax.transAxes)


def _log_if_wide(ax: Axes, curves: Series) -> None:
    values = np.concatenate([y for _, y in curves.values()])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() / values.min() > 30:
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())


def _smooth(y: np.ndarray) -> np.ndarray:
    """A centered running mean over a fiftieth of the curve; shorter at its ends, so that it covers all of
    it."""
    half = max(1, len(y) // 100)
    total = np.concatenate([[0.0], np.cumsum(np.nan_to_num(y))])
    seen = np.concatenate([[0], np.cumsum(np.isfinite(y))])
    low, high = np.maximum(np.arange(len(y)) - half, 0), np.minimum(np.arange(len(y)) + half + 1, len(y))
    return (total[high] - total[low]) / np.maximum(seen[high] - seen[low], 1)


def _summary(series: Series) -> str:
    """Return the best of each score, for the line below the title."""
    scores = sorted_out(series)["scores"]
    best = [
        f"{name.rpartition('/')[2]} {np.nanmax(y):.3f}"
        for name, (_, y) in scores.items()
        if np.isfinite(y).any() and "train" not in name
    ]
    return "best: " + ", ".join(best) if best else ""


def _short_count(value: float) -> str:
    for limit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{letter}"
    return f"{value:.3g}"


def _flattened(row: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, float]]:
    for name, value in row.items():
        if isinstance(value, Mapping):
            yield from _flattened(value, f"{before}{name}/")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield before + name, float(value)
