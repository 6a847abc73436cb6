"""Why a Vision Transformer said what it said: every head, rollout, distances, positions, filters.

The network runs as it is; `capture` makes its attention show the probabilities that the fused kernel hides.
All
figures are for one image, and for the tokens that the head reads: the class token, both tokens of a distilled
DeiT, the mean of the patches, or the probe of attention pooling.
"""

import io
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from triptych.errors import UserError
from triptych.layers.capture import capture
from triptych.pipelines.classify import ClassificationPipeline
from triptych.pipelines.patterns import first_filters, position_similarity
from triptych.pipelines.pixels import Picture, fitted, name_of, normalised
from triptych.pipelines.results import Classification
from triptych.writing import write_atomically, write_text_atomically


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What `explain` found. Arrays are fp32; patches are laid out in their grid (h, w), rows from the top."""

    source: str
    """The file, or what else the image came from."""
    classification: Classification
    image: UInt8[np.ndarray, "H W 3"]
    """What the network saw, as pixels."""
    readout: str
    """Which tokens the head reads: "class token", "mean of patches", ..."""
    heads: Float[np.ndarray, "blocks heads h w"]
    """Attention that the tokens of `readout` pay to each patch; with attention pooling the probe's maps come
    last."""
    rollout: Float[np.ndarray, "h w"]
    """Attention rollout; sums to 1."""
    distances: Float[np.ndarray, "blocks heads"]
    """Mean attention distance, pixels."""
    filters: Float[np.ndarray, "n p q c"]
    """Principal components of the first projection of pixels, by falling share of the variance."""
    filter_share: Float[np.ndarray, " n"]
    """That share, from 0 to 1."""
    positions: Float[np.ndarray, "h2 w2 h2 w2"] | None
    """Cosine similarity of each position's embedding to every other; None if the network has no positions."""

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array by its name."""
        named = {name: getattr(self, name) for name in ("image", "heads", "rollout", "distances", "filters")}
        named["filter_share"] = self.filter_share
        return named if self.positions is None else named | {"positions": self.positions}

    def to_json(self) -> dict[str, Any]:
        """Guesses, rollout and distances as plain values; the larger arrays are in `arrays()`."""
        return self.classification.to_json() | {
            "size": list(self.image.shape[:2]),
            "readout": self.readout,
            "rollout": np.round(self.rollout, 6).tolist(),
            "mean_attention_distance_px": np.round(self.distances, 3).tolist(),
        }

    def save(self, folder: str | Path) -> None:
        """Write `explanation.json` and `explanation.npz` into `folder`. Pictures: `triptych.plots`."""
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **self.arrays())  # pyright: ignore[reportArgumentType]
        write_atomically(Path(folder) / "explanation.npz", lambda file: file.write(buffer.getvalue()))
        write_text_atomically(Path(folder) / "explanation.json", json.dumps(self.to_json(), indent=1) + "\n")


def explain(
    net: nn.Module | str | Path, image: Picture, size: tuple[int, int] | None = None, top: int = 5
) -> Explanation:
    """Look into a ViT while it looks at an image.

    Args:
        net: a ViT with `card`, or what `tp.load` takes; left as it is. It runs in fp32.
        image: path, bytes of a file, PIL image or uint8 array.
        size: height and width in pixels to feed instead of the card's; the grid of patches need not be
            square.
        top: classes to name.

    Raises:
        UserError: not a ViT, or not an image.
    """
    pipe = ClassificationPipeline(net, device="cpu", dtype="fp32")
    config = pipe.config
    if not hasattr(config, "prefix") or not hasattr(pipe.net, "embed"):
        raise UserError(f"explain looks into ViTs, this is a {type(pipe.net).__name__}; give a ViT")
    preprocess = pipe.card.preprocess if size is None else replace(pipe.card.preprocess, size=size)
    pixels = fitted(image, preprocess)
    x = normalised(pixels, preprocess, config.in_channels)[None]
    with capture(pipe.net) as maps:
        logits = pipe.logits(x)
    attention = [weights[0] for name, weights in maps.items() if name != "pool"]  # L of (heads, N, N)
    probe = maps["pool"][0, :, 0] if "pool" in maps else None  # heads, N
    grid = (-(-x.shape[-2] // config.stride), -(-x.shape[-1] // config.stride))
    read, words = readout(config, attention[0].shape[-1], probe)
    heads = [torch.einsum("n,hnm->hm", read, A) for A in attention]
    if probe is not None:  # what the blocks' tokens have in common, then what the probe asks of each
        heads.append(probe)
    components, share = first_filters(pipe.net)
    return Explanation(
        source=name_of(image),
        classification=pipe._name(logits, [name_of(image)], top)[0],
        image=pixels,
        readout=words,
        heads=np.stack([_on_grid(A[:, config.prefix :], grid) for A in heads]),
        rollout=_on_grid(attention_rollout(attention, read)[config.prefix :], grid, total=1.0),
        distances=np.stack(
            [attention_distance(A, grid, config.stride, config.prefix).numpy() for A in attention]
        ),
        filters=components,
        filter_share=share,
        positions=position_similarity(pipe.net),
    )


def readout(
    config: Any, tokens: int, probe: Float[Tensor, "heads n"] | None
) -> tuple[Float[Tensor, " n"], str]:
    """How much each token counts in what the head reads (sums to 1), and that in words."""
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
    """How much each input token flows into what is read, after all blocks (Abnar and Zuidema 2020, Equation
    1).

    A~(l_i) = A(l_i) A~(l_{i-1}), with A = 0.5 W + 0.5 I for the residual connection and W the mean of the
    heads.
    Only the read row is wanted, so it is pulled through the blocks from the last to the first: products of a
    vector and a matrix instead of matrices.
    """
    row = read
    for W in reversed(attention):
        row = 0.5 * row @ W.mean(0) + 0.5 * row
    return row


def attention_distance(
    attention: Float[Tensor, "heads n n"], grid: tuple[int, int], stride: int, prefix: int
) -> Float[Tensor, " heads"]:
    """Mean distance in pixels between a patch and what it attends to, weighted by the attention (ViT, D.7).

    Tokens that are no patches have no place: they are left out and the weights of the rest made to sum to 1.
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
