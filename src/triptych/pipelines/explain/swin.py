"""Explanations of a Swin: a point's attention in every block, the rollout through patch merging, and the maps."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from triptych.data.loading.test_time_views import ViewOptions, view_sizes
from triptych.heads.segmenter import Segmenter
from triptych.layers.capture import capture
from triptych.model_card import Preprocess
from triptych.pipelines.base import ImagePipeline
from triptych.pipelines.explain.filters import first_filters
from triptych.pipelines.explain.result import ExplanationBase, Point, best, map_point, size_of
from triptych.pipelines.explain.swin_windows import (
    BlockWindows,
    attention_at,
    backbone_of,
    block_windows,
    rollout,
)
from triptych.pipelines.image_input import ImageInput, fitted, name_of, normalized


@dataclass(frozen=True, kw_only=True)
class SwinExplanation(ExplanationBase):
    """The result of `explain` for a Swin, or a segmenter on one. Lists have one entry per stage, the finest first."""

    point: Point
    attention: list[Float[np.ndarray, "blocks heads _ _"]]
    """Attention of the cell at the point in each block, on the stage's map; a head's weights sum to 1."""
    padding: Float[np.ndarray, " blocks"]
    """Share of that cell's attention to padding in each block, which `attention` leaves out."""
    windows: Float[np.ndarray, "blocks 2"]
    """Height and width of each block's windows in pixels."""
    shifts: Float[np.ndarray, "blocks 2"]
    """Pixels by which each block's map is rolled; 0 is W-MSA."""
    strides: Int[np.ndarray, " stages"]
    """Pixels from one cell to the next on each map."""
    rollout: Float[np.ndarray, "h w"]
    """Contribution of the first map's cells to the mean of the last map; sums to 1."""
    point_rollout: Float[np.ndarray, "stages h w"]
    """Contribution of the first map's cells to the cell at the point, at the end of each stage; each sums to 1."""
    colors: list[Float[np.ndarray, "_ _ 3"]]
    """First three principal components of the directions of each map's cells, each from 0 to 1."""
    share: Float[np.ndarray, "stages 3"]
    """Share of the variance that each component explains."""
    norms: list[Float[np.ndarray, "_ _"]]
    """Norm of each cell of each map."""
    filters: Float[np.ndarray, "n p q c"]
    """Principal components of the first projection of pixels, by falling share of the variance."""
    filter_share: Float[np.ndarray, " n"]

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all arrays by name; those of a stage end in its number, from 1."""
        names = (
            "image",
            "padding",
            "windows",
            "shifts",
            "strides",
            "rollout",
            "point_rollout",
            "share",
            "filters",
        )
        named = {name: getattr(self, name) for name in (*names, "filter_share")}
        named["point"] = np.array(self.point, np.float32)
        for name in ("attention", "colors", "norms"):
            named |= {f"{name}_{s}": array for s, array in enumerate(getattr(self, name), start=1)}
        return named

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "rollout": np.round(self.rollout, 7).tolist(),
            "window_px": self.windows.tolist(),
            "shift_px": self.shifts.tolist(),
            "padding_share": np.round(self.padding, 6).tolist(),
            "pca_share": np.round(self.share, 6).tolist(),
        }


def explain_swin(
    net: nn.Module | str | Path,
    image: ImageInput,
    size: tuple[int, int] | None = None,
    top: int = 5,
    point: Point | None = None,
) -> SwinExplanation:
    """`explain` for a Swin or a segmenter on one."""
    pipe = ImagePipeline(net, device="cpu", dtype="fp32")
    swin: Any = backbone_of(pipe.net)[1]
    image_size = size_of(image)
    seen = preprocess_at(pipe.net, image_size, size)
    at = (seen.size[1] / 2, seen.size[0] / 2) if point is None else map_point(point, image_size, seen)
    pixels = fitted(image, seen)
    x = normalized(pixels, seen, pipe.config.in_channels)[None]
    with torch.inference_mode(), capture(pipe.net) as maps, outputs(swin.stages) as features:
        logits = pipe.net(x)[0] if pipe.classes else None
        if logits is None:  # without a head there are maps but no classes
            swin.features(x)
    blocks = block_windows(pipe.net, seen.size)
    attention = [maps[block.name][0] for block in blocks]
    attended = [attention_at(weights, block, at) for weights, block in zip(attention, blocks, strict=True)]
    last = blocks[-1].size
    shown = [colors(z[0]) for z in features]
    components, filter_share = first_filters(swin)
    return SwinExplanation(
        source=name_of(image),
        classification=best(logits, at, pipe.classes, top, name_of(image)),
        image=pixels,
        readout="mean of the last map",
        point=at,
        attention=[
            np.stack([a.numpy() for (a, _), block in zip(attended, blocks, strict=True) if block.stage == s])
            for s in range(len(features))
        ],
        padding=np.array([float(lost.mean()) for _, lost in attended], np.float32),
        windows=np.array([[b.window[0] * b.stride, b.window[1] * b.stride] for b in blocks], np.float32),
        shifts=np.array([[b.shift[0] * b.stride, b.shift[1] * b.stride] for b in blocks], np.float32),
        strides=np.array(swin.strides),
        rollout=rollout(attention, blocks, torch.full((1, *last), 1 / (last[0] * last[1])))[0].numpy(),
        point_rollout=point_rollout(attention, blocks, at).numpy(),
        colors=[c for c, _ in shown],
        share=np.stack([s for _, s in shown]),
        norms=[z[0].norm(dim=-1).numpy() for z in features],
        filters=components,
        filter_share=filter_share,
    )


@contextmanager
def outputs(parts: Iterable[nn.Module]) -> Iterator[list[Tensor]]:
    """Record a Swin's maps before the norms, which would make the norms of all cells equal."""
    features: list[Tensor] = []

    def record(_part: nn.Module, _inputs: Any, output: Tensor) -> None:
        features.append(output)

    hooks = [part.register_forward_hook(record) for part in parts]
    try:
        yield features
    finally:
        for hook in hooks:
            hook.remove()


def preprocess_at(net: Any, image_size: tuple[int, int], size: tuple[int, int] | None) -> Preprocess:
    """Return the card's preprocessing at `size`. A segmenter gets the full image, as in `SegmentationPipeline`."""
    preprocess: Preprocess = net.card.preprocess
    if isinstance(net, Segmenter) and preprocess.mode == "crop":
        fed, _ = view_sizes(image_size, preprocess, ViewOptions(), 1.0, net.backbone.strides[0])
        return replace(preprocess, size=size or fed, mode="squash", crop=1.0)
    return replace(preprocess, size=size or preprocess.size)


def point_rollout(
    attention: list[Float[Tensor, "_ _ _ _"]], blocks: list[BlockWindows], point: Point
) -> Float[Tensor, "stages h w"]:
    """Return the contribution of the first map's cells to the cell at a point, at the end of each stage."""
    rows = []
    for s in range(blocks[-1].stage + 1):
        below = sum(block.stage <= s for block in blocks)
        row = torch.zeros(1, *blocks[below - 1].size)
        row[0, *blocks[below - 1].cell(point)] = 1
        rows.append(rollout(attention[:below], blocks[:below], row)[0])
    return torch.stack(rows)


def colors(
    z: Float[Tensor, "h w d"],
) -> tuple[Float[np.ndarray, "h w 3"], Float[np.ndarray, " 3"]]:
    """Return the first three principal components of the directions of a map's cells as red, green and blue, and the
    share of the variance that each explains.

    The sign of a component is arbitrary: its largest value is made positive. Each is scaled separately, from its 2nd
    to its 98th percentile.
    """
    cells = F.normalize(z.flatten(0, 1).double(), dim=1)  # hw d
    cells = cells - cells.mean(0)
    U, S, _ = torch.linalg.svd(cells, full_matrices=False)
    n = min(3, len(S))
    P = torch.zeros(len(cells), 3, dtype=torch.float64)
    P[:, :n] = U[:, :n] * S[:n]
    P = P * P.gather(0, P.abs().argmax(0, keepdim=True)).sign()
    low, high = P.quantile(torch.tensor([0.02, 0.98], dtype=P.dtype), dim=0)
    # Components without variance, apart from rounding, are gray.
    flat = high - low < 1e-9
    P = torch.where(flat, 0.5, ((P - low) / (high - low).masked_fill(flat, 1)).clamp(0, 1))
    share = torch.zeros(3, dtype=torch.float64)
    share[:n] = S[:n].square() / S.square().sum().clamp_min(1e-30)
    return P.unflatten(0, z.shape[:2]).float().numpy(), share.float().numpy()
