"""Logits of images, computed a few rows at a time from the top down, so that they never are in memory at once.

Logits have as many channels as there are classes: for 150 classes and 12 megapixels they would be 7 GB.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from triptych.layers.tiling import blend_weights, tile_starts

RunWindows = Callable[[Sequence[UInt8[np.ndarray, "h w C"]]], Float[Tensor, "n k h w"]]
"""Windows of one size -> their logits, fp32."""

BAND_NUMBERS = 8_000_000
"""Numbers in a band of logits that are processed together: 32 MB."""


@runtime_checkable
class LogitRows(Protocol):
    """Logits that are read by rows."""

    size: tuple[int, int]

    def rows(self, first: int, last: int) -> Float[Tensor, "k n w"]:
        """Return rows `first` to `last` - 1. Neither may decrease from one call to the next, which may overwrite the
        result of this one."""
        ...


class InMemoryLogits:
    """Logits in memory."""

    def __init__(self, logits: Float[Tensor, "k h w"]):
        self.logits, self.size = logits, (logits.shape[-2], logits.shape[-1])

    def rows(self, first: int, last: int) -> Float[Tensor, "k n w"]:
        return self.logits[:, first:last]


class FlippedLogits:
    """Logits of the flipped image, flipped back."""

    def __init__(self, logits: LogitRows):
        self.logits, self.size = logits, logits.size

    def rows(self, first: int, last: int) -> Float[Tensor, "k n w"]:
        return self.logits.rows(first, last).flip(-1)


class SlidingWindowLogits:
    """Logits of overlapping windows, computed a row of windows at a time when it is needed.

    Where windows overlap, each has a weight that grows with the distance to its edge, and is 0 in the last quarter of
    the overlap, where its context is missing; the weights of a pixel sum to one (`layers.tiling.blend_weights`).

    Args:
        run: computes the logits of windows.
        pixels: the image.
        window: height and width; never larger than `pixels`.
        overlap: share of a window that it has in common with the next one, at least.
        batch: windows at a time.
    """

    def __init__(
        self,
        run: RunWindows,
        pixels: UInt8[np.ndarray, "h w C"],
        window: tuple[int, int],
        overlap: float,
        batch: int,
    ):
        self.run, self.pixels, self.batch = run, pixels, batch
        self.size = height, width = pixels.shape[:2]
        self.window = h, w = min(window[0], height), min(window[1], width)
        shared = [min(round(overlap * side), side - 1) for side in self.window]
        self.tops, self.lefts = tile_starts(height, h, shared[0]), tile_starts(width, w, shared[1])
        self.down = blend_weights(self.tops, height, h, shared[0] // 4)
        self.across = blend_weights(self.lefts, width, w, shared[1] // 4)
        self.next, self.first = 0, 0  # row of windows, first row of the buffer
        self.buffer: Tensor | None = None

    def rows(self, first: int, last: int) -> Float[Tensor, "k n w"]:
        while self._finished_rows() < last:
            self._more(first)
        assert self.buffer is not None
        return self.buffer[:, first - self.first : last - self.first]

    def _finished_rows(self) -> int:
        """Return how many rows are complete."""
        return self.size[0] if self.next == len(self.tops) else self.tops[self.next] if self.next else 0

    def _more(self, needed: int) -> None:
        """Add the next row of windows, and free the rows above `needed`."""
        (h, w), top = self.window, self.tops[self.next]
        cleared = False
        pairs = list(zip(self.lefts, self.across, strict=True))
        for lefts in (pairs[i : i + self.batch] for i in range(0, len(pairs), self.batch)):
            logits = self.run([self.pixels[top : top + h, left : left + w] for left, _ in lefts])
            if not cleared:
                self._clear(logits, min(needed, top), top + h)
                cleared = True
            assert self.buffer is not None
            down = self.down[self.next].to(logits)[:, None]
            for part, (left, across) in zip(logits, lefts, strict=True):
                place = self.buffer[:, top - self.first : top - self.first + h, left : left + w]
                place.addcmul_(part, down * across.to(logits))
        self.next += 1

    def _clear(self, like: Tensor, first: int, last: int) -> None:
        """Move the buffer to rows `first` to `last`: keep the values of those that windows have reached, zero the
        others."""
        classes, width = like.shape[1], self.size[1]
        reached = self.tops[self.next - 1] + self.window[0] if self.next else 0
        valid, offset = max(0, reached - first), first - self.first
        if self.buffer is None or self.buffer.shape[1] < last - first:
            fresh = like.new_zeros((classes, last - first, width))
            if self.buffer is not None and valid:
                fresh[:, :valid] = self.buffer[:, offset : offset + valid]
            self.buffer = fresh
        else:
            for rows in self.buffer:  # class by class, so that the copy is small
                rows[:valid] = rows[offset : offset + valid].clone()
            self.buffer[:, valid:].zero_()
        self.first = first


def logits_of_views(
    run: RunWindows,
    views: Sequence[Sequence[tuple[UInt8[np.ndarray, "_ _ _"], tuple[slice, slice]]]],
    window: tuple[int, int] | None,
    overlap: float,
    flip: bool,
    batch: int,
) -> list[list[LogitRows]]:
    """Return for each image the logits of its views, which are to be averaged.

    Args:
        run: computes the logits of a batch.
        views: for each image its views: pixels, and where the image lies in them.
        window: height and width of a sliding window; None runs each view at once, views of one size together.
        overlap: as in `SlidingWindowLogits`.
        flip: whether to add the flipped views.
        batch: views or windows at a time.
    """
    results: list[list[LogitRows]] = [[] for _ in views]
    if window is not None:
        for pieces, into in zip(views, results, strict=True):
            for pixels, _ in pieces:
                into.append(SlidingWindowLogits(run, pixels, window, overlap, batch))
                if flip:
                    into.append(
                        FlippedLogits(SlidingWindowLogits(run, pixels[:, ::-1], window, overlap, batch))
                    )
        return results
    by_size: dict[tuple[int, ...], list[tuple[int, tuple[slice, slice], np.ndarray, bool]]] = {}
    for i, pieces in enumerate(views):
        for pixels, inner in pieces:
            group = by_size.setdefault(pixels.shape, [])
            group.append((i, inner, pixels, False))
            if flip:
                group.append((i, inner, pixels[:, ::-1], True))
    for group in by_size.values():
        for chunk in (group[at : at + batch] for at in range(0, len(group), batch)):
            for result, (i, inner, _, flipped) in zip(run([p for _, _, p, _ in chunk]), chunk, strict=True):
                result = (result.flip(-1) if flipped else result)[:, inner[0], inner[1]]
                results[i].append(InMemoryLogits(result))
    return results


def resized_rows(logits: LogitRows, size: tuple[int, int], first: int, last: int) -> Float[Tensor, "k n w"]:
    """Return rows `first` to `last` of the logits resized bilinearly: as `F.interpolate` of all rows, but only those
    needed are read."""
    (h, w), (H, W) = logits.size, size
    if (h, w) == (H, W):
        return logits.rows(first, last)
    y = ((torch.arange(first, last, dtype=torch.float64) + 0.5) * (h / H) - 0.5).clamp(0, h - 1)
    above = y.floor().long()
    below = (above + 1).clamp(max=h - 1)
    top = int(above[0])
    part = logits.rows(top, int(below[-1]) + 1)
    part = F.interpolate(part[None], size=(part.shape[1], W), mode="bilinear", align_corners=False)[0]
    share = (y - above).to(part)[:, None]
    return torch.lerp(part[:, (above - top).to(part.device)], part[:, (below - top).to(part.device)], share)


def predicted_bands(
    views: Sequence[LogitRows], size: tuple[int, int], classes: int, confidence: bool = False
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Yield the best class of each pixel of an image of `size`, and its probability if `confidence` is set, in bands
    from the top. The probabilities of several views are averaged.
    """
    H, W = size
    step = max(1, math.ceil(BAND_NUMBERS / (classes * W)))
    for first in range(0, H, step):
        last = min(first + step, H)
        if len(views) == 1 and not confidence:
            yield resized_rows(views[0], size, first, last).argmax(0), None
            continue
        mean = resized_rows(views[0], size, first, last).softmax(0)
        for view in views[1:]:
            mean += resized_rows(view, size, first, last).softmax(0)
        best, label = (mean / len(views)).max(0)
        yield label, best if confidence else None
