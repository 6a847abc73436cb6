"""Filters and position embeddings of a network's first layers."""

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.models.vit import ViT, sincos_positions


def first_filters(
    net: nn.Module, most: int = 28
) -> tuple[Float[np.ndarray, "n p q c"], Float[np.ndarray, " n"]]:
    """Return principal components of the first convolution's weights, as images (ViT, Figure 7, left, shows 28).

    In a ViT that is the linear projection of patches; after a stem, the stem's first convolution, which reads
    the pixels. The sign of a component is arbitrary: its largest weight is made positive.

    Returns:
        The components, and the share of the variance that each explains.

    Raises:
        ConfigError: the network has no convolution.
    """
    first = next((part for part in net.modules() if isinstance(part, nn.Conv2d)), None)
    if first is None:
        raise ConfigError(f"{type(net).__name__} has no convolution whose filters could be shown")
    W = first.weight.detach().double().cpu()  # D C P Q
    flat = W.flatten(1) - W.flatten(1).mean(0)  # D CPQ
    # Eigenvectors of the smaller Gram matrix: an SVD of 1024 x 3072 takes many times as long.
    if flat.shape[0] < flat.shape[1]:
        variance, U = torch.linalg.eigh(flat @ flat.T)
        V = torch.nn.functional.normalize(U.T @ flat, dim=1)
    else:
        variance, V = torch.linalg.eigh(flat.T @ flat)
        V = V.T
    variance, V = variance.flip(0).clamp_min(0), V.flip(0)
    V = V[:most]
    V = V * V.gather(1, V.abs().argmax(1, keepdim=True)).sign()
    components = V.unflatten(1, W.shape[1:]).permute(0, 2, 3, 1)  # n P Q C
    share = variance / variance.sum().clamp_min(1e-30)
    return components.float().numpy(), share[:most].float().numpy()


def position_similarity(net: ViT) -> Float[np.ndarray, "h w h w"] | None:
    """Return the cosine similarity of each patch position's embedding to every other (ViT, Figure 7, center).

    For rotary positions it is the mean cosine of the angles between the rotations of two positions: the cosine of a
    query and a key with equal values in all pairs of channels.
    """
    config, grid = net.config, net.config.grid
    if config.position == "learned":
        table = net.positions.detach()[0, net.placed :]
    elif config.position == "sincos":
        table = sincos_positions(grid, config.embed_dim)[0]
    elif config.position == "rotary":
        angles = net.rotary.angles(grid, torch.device("cpu"))
        table = torch.cat([angles.cos(), angles.sin()], dim=1)
    else:
        return None
    return _cosines(table.double().cpu()).float().unflatten(1, grid).unflatten(0, grid).numpy()


def _cosines(table: Float[Tensor, "n d"]) -> Float[Tensor, "n n"]:
    unit = torch.nn.functional.normalize(table, dim=1)
    return unit @ unit.T
