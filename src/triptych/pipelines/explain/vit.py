"""Explain a network's prediction; for a Vision Transformer all heads, rollout, distances, positions and filters.

A network without a head, such as after masked pre-training, has no prediction; everything else is computed.

The network is not changed; `capture` collects the attention probabilities, which the fused kernel never forms. All
figures are for one image. A ViT's are for the tokens that the head reads: the class token, both tokens of a distilled
DeiT, the mean of the patches, or the probe of attention pooling; or for the patch at a point. A Swin's are in
`explain_swin`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.heads.segmenter import Segmenter
from triptych.layers.capture import capture
from triptych.models.swin import Swin
from triptych.models.vit import ViT
from triptych.pipelines.base import ImagePipeline
from triptych.pipelines.explain.filters import first_filters, position_similarity
from triptych.pipelines.explain.result import ExplanationBase, Point, best, map_point, size_of
from triptych.pipelines.explain.swin import SwinExplanation, explain_swin, preprocess_at
from triptych.pipelines.explain.swin_windows import backbone_of
from triptych.pipelines.image_input import ImageInput, fitted, name_of, normalized


@dataclass(frozen=True, kw_only=True)
class Explanation(ExplanationBase):
    """The result of `explain` for a ViT; patches are arranged in their grid (h, w)."""

    heads: Float[np.ndarray, "blocks heads h w"]
    """Attention of the tokens of `readout` to each patch; with attention pooling the probe's maps come last."""
    rollout: Float[np.ndarray, "h w"]
    """Attention rollout; sums to 1."""
    distances: Float[np.ndarray, "blocks heads"]
    """Mean attention distance in pixels."""
    filters: Float[np.ndarray, "n p q c"]
    """Principal components of the first projection of pixels, by falling share of the variance."""
    filter_share: Float[np.ndarray, " n"]
    """Share of the variance of each component, from 0 to 1."""
    positions: Float[np.ndarray, "h2 w2 h2 w2"] | None
    """Cosine similarity of each position's embedding to every other; None if the network has no positions."""

    def arrays(self) -> dict[str, np.ndarray]:
        named = {name: getattr(self, name) for name in ("image", "heads", "rollout", "distances", "filters")}
        named["filter_share"] = self.filter_share
        if self.point is not None:
            named["point"] = np.array(self.point, np.float32)
        return named if self.positions is None else named | {"positions": self.positions}

    def to_json(self) -> dict[str, Any]:
        return super().to_json() | {
            "rollout": np.round(self.rollout, 6).tolist(),
            "mean_attention_distance_px": np.round(self.distances, 3).tolist(),
        }


@overload
def explain(
    net: ViT, image: ImageInput, size: tuple[int, int] | None = None, top: int = 5, point: Point | None = None
) -> Explanation: ...
@overload
def explain(
    net: Swin,
    image: ImageInput,
    size: tuple[int, int] | None = None,
    top: int = 5,
    point: Point | None = None,
) -> SwinExplanation: ...
@overload
def explain(
    net: nn.Module | str | Path,
    image: ImageInput,
    size: tuple[int, int] | None = None,
    top: int = 5,
    point: Point | None = None,
) -> Any: ...
def explain(
    net: nn.Module | str | Path,
    image: ImageInput,
    size: tuple[int, int] | None = None,
    top: int = 5,
    point: Point | None = None,
) -> Any:
    """Explain what a ViT, a Swin, or a segmenter on one of them computes for an image.

    Args:
        net: a network with `card`, or what `tp.load` takes; it is not changed, and runs in fp32.
        image: path, bytes of a file, PIL image or uint8 array.
        size: height and width in pixels of the network's input, by default the card's.
        top: number of classes to return; a network without a head has none.
        point: x and y in pixels of the image. A ViT is explained at the patch there instead of at the tokens that
            the head reads, a Swin at the cell there in every block. Default for a Swin and a segmenter: the center.

    Returns:
        An `Explanation` for a ViT, a `SwinExplanation` for a Swin, alone or in a segmenter.

    Raises:
        DataError: the image cannot be read.
        ConfigError: another network, or a point outside the network's input.
    """
    if not isinstance(net, nn.Module):
        from triptych.weights import load

        net = load(net)
    _, backbone = backbone_of(net)
    if not isinstance(backbone, ViT | Swin):
        on = f" on a {type(backbone).__name__}" if isinstance(net, Segmenter) else ""
        raise ConfigError(
            f"explain supports ViTs, Swins and segmenters on them; this is a {type(net).__name__}{on}"
        )
    with torch.device("cpu"):  # everything runs there, whatever the default device
        run = explain_swin if isinstance(backbone, Swin) else explain_vit
        return run(net, image, size, top, point)


def explain_vit(
    net: nn.Module, image: ImageInput, size: tuple[int, int] | None, top: int, point: Point | None
) -> Explanation:
    """`explain` for a ViT or a segmenter on one."""
    pipe = ImagePipeline(net, device="cpu", dtype="fp32")
    vit: Any = backbone_of(pipe.net)[1]
    config, image_size = vit.config, size_of(image)
    preprocess = preprocess_at(pipe.net, image_size, size)
    pixels = fitted(image, preprocess)
    at = None if point is None else map_point(point, image_size, preprocess)
    if at is None and isinstance(net, Segmenter):  # its head reads every patch
        at = preprocess.size[1] / 2, preprocess.size[0] / 2
    x = normalized(pixels, preprocess, config.in_channels)[None]
    with torch.inference_mode(), capture(pipe.net) as maps:
        logits = pipe.net(x)[0]
    attention = [weights[0] for name, weights in maps.items() if name != "pool"]  # L of (heads, N, N)
    probe = maps["pool"][0, :, 0] if "pool" in maps and at is None else None  # heads, N
    grid = (-(-x.shape[-2] // config.stride), -(-x.shape[-1] // config.stride))
    if at is None:
        read, words = readout(config, attention[0].shape[-1], probe)
    else:
        row, column = int(at[1] // config.stride), int(at[0] // config.stride)
        read = torch.zeros(attention[0].shape[-1])
        read[config.prefix + row * grid[1] + column] = 1
        words = f"patch at x = {at[0]:g}, y = {at[1]:g}"
    heads = [torch.einsum("n,hnm->hm", read, A) for A in attention]
    if probe is not None:  # the probe's own attention comes last
        heads.append(probe)
    components, share = first_filters(vit)
    return Explanation(
        source=name_of(image),
        classification=best(logits, at, pipe.classes, top, name_of(image)),
        image=pixels,
        readout=words,
        point=at,
        heads=np.stack([_on_grid(A[:, config.prefix :], grid) for A in heads]),
        rollout=_on_grid(attention_rollout(attention, read)[config.prefix :], grid, total=1.0),
        distances=np.stack(
            [attention_distance(A, grid, config.stride, config.prefix).numpy() for A in attention]
        ),
        filters=components,
        filter_share=share,
        positions=position_similarity(vit),
    )


def readout(
    config: Any, tokens: int, probe: Float[Tensor, "heads n"] | None
) -> tuple[Float[Tensor, " n"], str]:
    """Return the weight of each token in the head's input (sums to 1), and the name of that input."""
    first = torch.zeros(tokens)
    first[0] = 1
    patches = torch.zeros(tokens)
    patches[config.prefix :] = 1 / (tokens - config.prefix)
    if probe is not None:
        return probe.mean(0), "attention pooling"
    if config.distill_token:
        first[:2] = 0.5
        return first, "class and distillation tokens"
    return {
        "token": (first, "class token"),
        "mean": (patches, "mean of patches"),
        "token+mean": ((first + patches) / 2, "class token and mean of patches"),
    }[config.pool]


def attention_rollout(
    attention: list[Float[Tensor, "heads n n"]], read: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """Return the contribution of each input token to the output that is read (Abnar and Zuidema 2020, Equation 1).

    A~(l_i) = A(l_i) A~(l_{i-1}), with A = 0.5 W + 0.5 I for the residual connection and W the mean of the heads. Only
    one row is needed, so it is multiplied from the last block to the first: products of a vector and a matrix instead
    of two matrices.
    """
    row = read
    for W in reversed(attention):
        row = 0.5 * row @ W.mean(0) + 0.5 * row
    return row


def attention_distance(
    attention: Float[Tensor, "heads n n"], grid: tuple[int, int], stride: int, prefix: int
) -> Float[Tensor, " heads"]:
    """Return the mean distance in pixels between a patch and those it attends to, weighted by attention (ViT, D.7).

    Tokens that are not patches have no position: they are left out, and the other weights are rescaled to sum to 1.
    """
    y, x = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    place = torch.stack([y.flatten(), x.flatten()], dim=1).float() * stride  # n 2
    between = torch.cdist(place, place)
    A = attention[:, prefix:, prefix:]
    A = A / A.sum(-1, keepdim=True).clamp_min(1e-12)
    return (A * between).sum(-1).mean(-1)


def _on_grid(values: Tensor, grid: tuple[int, int], total: float | None = None) -> np.ndarray:
    if total is not None:
        values = values * (total / values.sum())
    return rearrange(values, "... (h w) -> ... h w", h=grid[0], w=grid[1]).float().numpy()
