"""What is taken for what: a confusion matrix that can be read with 2 classes and with 1000."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure

from triptych.plots import style

_WRONG = LinearSegmentedColormap.from_list("triptych-wrong", ["#fff3e2", "#fbc27a", style.ORANGE, "#b4400a"])
_RIGHT = LinearSegmentedColormap.from_list("triptych-right", ["#e8f0fe", "#9dbef9", style.BLUE, "#16379a"])

MOST_WITH_NUMBERS, MOST_WITH_NAMES = 16, 80


def confusion(
    matrix: Int[np.ndarray, "C C"],
    names: Sequence[str] | None = None,
    groups: Sequence[str] | None = None,
    title: str = "Confusion matrix",
    counted: str = "images",
) -> Figure:
    """Rows are the truth, columns the prediction, each row shared out to 1: right in blue, wrong in orange.

    Up to 16 classes the shares are written into the cells, up to 80 their names next to the axes; above that each
    pair is a dot whose area is its share, and `groups` (the coarser name of each class) order the classes and
    name the axes. To its right are the pairs confused most often and the classes with the lowest accuracy.
    `counted` names what the matrix counts.
    """
    C = len(matrix)
    names = [str(i) for i in range(C)] if names is None else list(names)
    if groups is not None and C > MOST_WITH_NAMES:
        rank = {group: i for i, group in enumerate(dict.fromkeys(groups))}
        order = sorted(range(C), key=[rank[group] for group in groups].__getitem__)
        matrix, names = matrix[np.ix_(order, order)], [names[i] for i in order]
        groups = [groups[i] for i in order]
    seen = matrix.sum(1)
    share = matrix / np.maximum(seen, 1)[:, None]

    labeled = C <= MOST_WITH_NAMES
    side = min(max(C * 0.5, 2.6), 6.4) if C <= MOST_WITH_NUMBERS else 7.2 if C <= MOST_WITH_NAMES else 7.6
    longest = max((len(style.short(name, 22)) for name in names), default=1) if labeled else 14
    letters = 8.5 if C <= MOST_WITH_NUMBERS else max(4.0, min(8.0, side * 72 / C * 0.8))
    margin = 0.55 + longest * letters * 0.6 / 72 if labeled else 1.5
    left, top = 0.3 + margin, 1.15
    fig = style.figure(left + side + 0.45 + 3.3, top + side + margin + 0.2)
    style.heading(
        fig,
        title,
        f"{matrix.trace() / max(seen.sum(), 1):.1%} of {seen.sum():,} {counted} correct, {C:,} classes"
        + ("; each cell has the percentage of its row" if C <= MOST_WITH_NUMBERS else ""),
    )
    ax = style.axes(fig, left, top, side, side)
    (_cells if labeled else _dots)(ax, share, side)
    if labeled:
        _name_classes(ax, share, names, letters)
    else:
        _name_groups(ax, groups, C)
    ax.set(xlim=(-0.5, C - 0.5), ylim=(C - 0.5, -0.5))
    ax.set_ylabel("truth", color=style.FAINT, fontsize=9)
    ax.set_xlabel("prediction", color=style.FAINT, fontsize=9)
    ax.tick_params(length=0)
    for spine in ax.spines.values():
        spine.set(color=style.LINE, linewidth=0.8)
    _lists(fig, left + side + 0.45, top, side, matrix, share, seen, names, counted)
    return fig


def _cells(ax: Axes, share: np.ndarray, side: float) -> None:
    """A colored square a pair; a root of the share, so that a few mistakes can be seen."""
    own = np.eye(len(share), dtype=bool)[..., None]
    shown = np.where(
        own, _RIGHT(share)[..., :3], np.where(share[..., None] > 0, _WRONG(share**0.5)[..., :3], 1.0)
    )
    ax.imshow(shown, interpolation="nearest", aspect="auto")


def _dots(ax: Axes, share: np.ndarray, side: float) -> None:
    """A dot a pair with its area as its share; a full row's dot is as wide as twelve points, or one cell."""
    C = len(share)
    full = max(side * 72 / C, 3.0) ** 2
    truth, guess = np.nonzero(share)
    size, right = share[truth, guess], truth == guess
    for chosen, color in ((~right, style.ORANGE), (right, style.BLUE)):
        ax.scatter(
            guess[chosen],
            truth[chosen],
            s=np.maximum(full * size[chosen], 2.2),
            color=color,
            alpha=0.75,
            linewidths=0,
        )


def _name_classes(ax: Axes, share: np.ndarray, names: Sequence[str], letters: float) -> None:
    C = len(names)
    ax.set_yticks(range(C), style.shorts(names, 22), fontsize=letters, color=style.INK)
    ax.set_xticks(range(C), style.shorts(names, 22), fontsize=letters, color=style.INK, rotation=90)
    ax.set_xticks(np.arange(C - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(C - 1) + 0.5, minor=True)
    ax.grid(which="minor", color=style.PAPER, linewidth=1.2 if C <= MOST_WITH_NUMBERS else 0.5)
    ax.tick_params(which="minor", length=0)
    if C > MOST_WITH_NUMBERS:
        return
    for i, j in zip(*np.nonzero(share), strict=True):
        dark = share[i, j] > 0.55 if i == j else share[i, j] > 0.4
        color = style.PAPER if dark else style.INK
        ax.text(j, i, f"{share[i, j] * 100:.0f}", ha="center", va="center", fontsize=8, color=color)


def _name_groups(ax: Axes, groups: Sequence[str] | None, C: int) -> None:
    if groups is None:
        ax.tick_params(colors=style.SOFT, labelsize=8)
        return
    starts = [i for i in range(C) if i == 0 or groups[i] != groups[i - 1]]
    middles = [(a + b) / 2 for a, b in zip(starts, [*starts[1:], C], strict=True)]
    for start in starts[1:]:
        ax.axhline(start - 0.5, color=style.LINE, linewidth=0.8, zorder=0)
        ax.axvline(start - 0.5, color=style.LINE, linewidth=0.8, zorder=0)
    # A group too small for its letters stays unnamed.
    words = [
        style.short(groups[a], 20) if b - a >= C / 55 else ""
        for a, b in zip(starts, [*starts[1:], C], strict=True)
    ]
    ax.set_yticks(middles, words, fontsize=8, color=style.INK)
    ax.set_xticks(middles, words, fontsize=8, color=style.INK, rotation=90)


def _lists(
    fig: Figure,
    x: float,
    top: float,
    side: float,
    matrix: np.ndarray,
    share: np.ndarray,
    seen: np.ndarray,
    names: Sequence[str],
    counted: str,
) -> None:
    """At the right: the pairs confused most often, then the classes with the lowest accuracy.
    Images are given by number, pixels by their share.
    """

    def amount(count: int) -> str:
        return str(count) if counted == "images" else f"{count / max(seen.sum(), 1):.1%}"

    often = "times" if counted == "images" else f"of all {counted}"
    wrong = matrix * (1 - np.eye(len(matrix), dtype=int))
    pairs = np.argsort(-wrong, axis=None, kind="stable")
    lines = max(3, min(12, int((side - 0.9) / 2 / 0.2)))
    style.text(fig, x, top + 0.1, f"confused with another class, {often}", 9, weight="bold")
    y = top + 0.36
    for flat in pairs[:lines]:
        truth, guess = divmod(int(flat), len(matrix))
        if not wrong[truth, guess]:
            break
        style.text(fig, x + 0.3, y, amount(wrong[truth, guess]), 8, style.ORANGE, ha="right", weight="bold")
        style.text(
            fig,
            x + 0.4,
            y,
            f"{style.short(names[truth], 19)} → {style.short(names[guess], 19)}",
            8,
            style.INK,
        )
        y += 0.2
    y += 0.25
    style.text(fig, x, y, "lowest accuracy", 9, weight="bold")
    y += 0.26
    recall = np.where(seen > 0, share.diagonal(), np.inf)
    for i in np.argsort(recall, kind="stable")[:lines]:
        if not np.isfinite(recall[i]) or recall[i] == 1:
            break
        style.text(fig, x + 0.3, y, f"{recall[i]:.0%}", 8, style.BLUE, ha="right", weight="bold")
        style.text(fig, x + 0.4, y, style.short(names[int(i)], 36), 8)
        style.text(fig, x + 3.1, y, f"of {amount(int(seen[i]))}", 8, style.FAINT, ha="right")
        y += 0.2
