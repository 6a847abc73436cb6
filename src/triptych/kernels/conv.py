"""Convolutions with weights packed for oneDNN, in the memory format that is fastest, and fused with upsampling."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from triptych.kernels.dispatch import fast_path_allowed, has_amx, onednn_allowed

PackedConv = dict[tuple[int, ...], Tensor]
"""A convolution's weights packed for oneDNN, by part of the weight and size of the map."""

MIN_PIXELS = {torch.float32: 512, torch.bfloat16: 2048}
"""Pixels of a batch from which summing weights in every call costs less than it saves; bf16 products are fast."""
_SUMS = (-1,)  # key of the summed weights in a `PackedConv`


def conv2d(
    x: Float[Tensor, "b i h w"],
    weight: Float[Tensor, "o i k k"],
    bias: Float[Tensor, "o"] | None,
    stride: int = 1,
    padding: int = 0,
    packed: PackedConv | None = None,
    part: tuple[int, ...] = (),
) -> Float[Tensor, "b o rows columns"]:
    """Return `F.conv2d(x, weight, bias, stride, padding)`.

    With `packed` the weights are packed for oneDNN where that pays, and stored there under `part` and the size of `x`.
    It pays where there are many more weights than pixels; in bf16 with AMX, where products are fast, from fewer on.
    """
    if packed is None or not onednn_allowed(x, weight) or weight.numel() <= _min_weights(x) * x.numel():
        return F.conv2d(x, weight, bias, stride, padding)
    geometry, key = ([padding, padding], [stride, stride], [1, 1], 1), (*part, *x.shape[2:])
    if key not in packed:
        reorder = torch._C._nn.mkldnn_reorder_conv2d_weight  # type: ignore[attr-defined]
        packed[key] = reorder(weight.to_mkldnn(), *geometry, list(x.shape))
    return torch.ops.mkldnn._convolution_pointwise(x, packed[key], bias, *geometry, "none", [], "")


def _min_weights(x: Tensor) -> int:
    """Return from how many weights per input value packing pays."""
    return 1 if x.dtype == torch.bfloat16 and has_amx() else 4


def preferred_format(x: Float[Tensor, "b i h w"], weight: Tensor, training: bool = False) -> Float[Tensor, "b i h w"]:
    """Return the same map, in `torch.channels_last` where that makes the following layers faster.

    That is in bf16 with AMX, whose convolutions reorder maps of the other format there and back (a third of their time
    at 64 x 64 and 320 channels); attention then reads the map as tokens without a copy. Convolutions, norms and sums
    keep the format.

    Args:
        x: the input of a network.
        weight: weight of its first convolution.
        training: the network has large maps, for which training steps on CPU are faster in this format as well: an
            autoencoder's took 0.93 of the time in bf16 and 0.96 in fp32; a UNet's on latents gained nothing.
    """
    sampling = x.dtype == torch.bfloat16 and onednn_allowed(x, weight) and has_amx()
    if sampling or (training and x.device.type == "cpu" and torch.is_grad_enabled() and fast_path_allowed()):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def pad(
    x: Float[Tensor, "b c h w"], pads: tuple[int, int], wrap: tuple[bool, bool]
) -> Float[Tensor, "b c rows columns"]:
    """Return `x` with `pads` (before, after) more pixels on both axes: zeros, or the opposite side on an axis that is
    true in `wrap` (x, y)."""
    if wrap[0] == wrap[1]:
        return F.pad(x, (*pads, *pads), mode="circular" if wrap[0] else "constant")
    x = F.pad(x, (*pads, 0, 0), mode="circular" if wrap[0] else "constant")
    return F.pad(x, (0, 0, *pads), mode="circular" if wrap[1] else "constant")


def prefers_upsample_conv2d(x: Tensor, weight: Tensor, packed: PackedConv | None) -> bool:
    """Return whether `upsample_conv2d` is faster than interpolating first: without gradients, and if `packed` holds the
    summed weights or `x` is large."""
    pixels = x.numel() // x.shape[1]
    return onednn_allowed(x, weight) and (packed is not None or pixels >= MIN_PIXELS[x.dtype])


def upsample_conv2d(
    x: Float[Tensor, "b i h w"],
    weight: Float[Tensor, "o i 3 3"],
    bias: Float[Tensor, "o"] | None,
    wrap: tuple[bool, bool] = (False, False),
    packed: PackedConv | None = None,
) -> Float[Tensor, "b o rows columns"]:
    """Return a 3x3 convolution of `x` enlarged twice by nearest neighbors, with 4/9 of the products.

    Of three adjacent pixels of the enlarged map two are equal, so their weights can be summed first: each of the four
    outputs of a pixel is a 2x2 convolution of `x` (half the time on Zen 3; KL-f8's decoder 0.88). The sums are stored
    in `packed` if it is given, and need twice the memory of the weights.
    """
    packed = {} if packed is None else packed
    if _SUMS not in packed:
        packed[_SUMS] = summed_weights(weight)
    sums = packed[_SUMS]
    (b, _, h, w), x = x.shape, pad(x, (1, 1), wrap)                                      # b i h+2 w+2
    order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    out = torch.empty((b, len(weight), 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=order)
    for i in (0, 1):
        for j in (0, 1):
            window = x[:, :, i : i + h + 1, j : j + w + 1]
            out[:, :, i::2, j::2] = conv2d(window, sums[i, j], bias, packed=packed, part=(i, j))
    return out


def summed_weights(weight: Float[Tensor, "o i 3 3"]) -> Float[Tensor, "2 2 o i 2 2"]:
    """Return the 2x2 weights for even and odd rows and columns of the enlarged map: sums of a 3x3 convolution's."""
    # Which of the three weights meet the first and the second of two pixels, for the even and the odd output.
    meet = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device)
    return torch.einsum("eik,fjl,ockl->efocij", meet, meet, weight.float()).to(weight.dtype).contiguous()
