"""What convolutional diffusion networks are built of: residual blocks, and steps between resolutions.

First stage and denoiser of latent diffusion (Rombach et al. 2022) share them. Every 3x3 convolution here is a `Conv`,
so that `seamless` reaches it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.kernels.dispatch import plain
from triptych.kernels.linear import has_amx, keeping, one_call
from triptych.layers.norm import GroupNorm
from triptych.layers.residual import Dropout

Kept = dict[tuple[int, ...], Tensor]  # weights as a processor takes them, by place and size of map


class Conv(nn.Conv2d):
    """A 3x3 convolution that keeps the size (stride 1) or halves it (stride 2, odd sizes rounded up).

    Args:
        after: stride 2 alone: pad only at the right and the bottom, as the autoencoders do, and not all around.
            There odd sizes are rounded down.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, after: bool = False, bias: bool = True):
        super().__init__(inputs, outputs, 3, stride, padding=0 if after else 1, bias=bias)
        self.pads = (0, 1) if after else (1, 1)
        self.wrap: tuple[bool, bool] = (False, False)                                    # in x, in y: set by `seamless`
        self.kept: Kept | None = None                                                    # set by `packed`

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o rows columns"]:
        if self.wrap == (False, False) and self.pads == (1, 1):
            return convolve(x, self.weight, self.bias, self.stride[0], 1, self.kept)
        return F.conv2d(pad(x, self.pads, self.wrap), self.weight, self.bias, self.stride)


def convolve(
    x: Float[Tensor, "b i h w"],
    weight: Float[Tensor, "o i k k"],
    bias: Float[Tensor, "o"] | None,
    stride: int = 1,
    padding: int = 0,
    kept: Kept | None = None,
    place: tuple[int, ...] = (),
) -> Float[Tensor, "b o rows columns"]:
    """A convolution; with `kept` its weights are put into oneDNN's own order where that pays, and kept there by
    `place` for the next `x` of this height and width.

    It pays where there are many more weights than pixels: in bf16 with AMX, where products are quick, from fewer on.
    """
    if kept is None or not one_call(x, weight) or weight.numel() <= _few(x) * x.numel():
        return F.conv2d(x, weight, bias, stride, padding)
    how, key = ([padding, padding], [stride, stride], [1, 1], 1), (*place, *x.shape[2:])
    if key not in kept:
        reorder = torch._C._nn.mkldnn_reorder_conv2d_weight  # type: ignore[attr-defined]
        kept[key] = reorder(weight.to_mkldnn(), *how, list(x.shape))
    return torch.ops.mkldnn._convolution_pointwise(x, kept[key], bias, *how, "none", [], "")


def _few(x: Tensor) -> int:
    """How many times as many weights as pixels are too few."""
    return 1 if x.dtype == torch.bfloat16 and has_amx() else 4


def by_pixel(x: Float[Tensor, "b i h w"], weight: Tensor, learning: bool = False) -> Float[Tensor, "b i h w"]:
    """The same map, the channels of a pixel side by side (`torch.channels_last`) where what follows is faster so.

    That is in bf16 with AMX, whose convolutions turn every map so, and back (a third of their time at 64 x 64 and 320
    channels); attention then takes the map as tokens without a copy. Convolutions, norms and sums keep the order.

    Args:
        learning: for a network of large maps, whose steps of learning on a processor are faster so, too: an
            autoencoder's took 0.93 of the time in bf16 and 0.96 in fp32, a UNet's on latents as long as before.
    """
    at_work = x.dtype == torch.bfloat16 and one_call(x, weight) and has_amx()
    if at_work or (learning and x.device.type == "cpu" and torch.is_grad_enabled() and plain()):
        return x.contiguous(memory_format=torch.channels_last)
    return x


def pad(
    x: Float[Tensor, "b c h w"], pads: tuple[int, int], wrap: tuple[bool, bool]
) -> Float[Tensor, "b c rows columns"]:
    """`x` with `pads` (before, after) pixels more in both directions: zeros, or the other side's where it wraps."""
    if wrap[0] == wrap[1]:
        return F.pad(x, (*pads, *pads), mode="circular" if wrap[0] else "constant")
    x = F.pad(x, (*pads, 0, 0), mode="circular" if wrap[0] else "constant")
    return F.pad(x, (0, 0, *pads), mode="circular" if wrap[1] else "constant")


@contextmanager
def seamless(net: nn.Module, x: bool = True, y: bool = True) -> Iterator[None]:
    """Join left to right (`x`) and top to bottom (`y`) in every convolution of `net` while the block runs.

    ```python
    with seamless(unet), seamless(autoencoder):
        ...                            # pictures whose copies continue each other side by side
    ```

    What was before comes back after it, also when the block raises.
    """
    convs = [(part, part.wrap) for part in net.modules() if isinstance(part, Conv)]
    try:
        for conv, _ in convs:
            conv.wrap = (x, y)
        yield
    finally:
        for conv, before in convs:
            conv.wrap = before


@contextmanager
def packed(net: nn.Module) -> Iterator[None]:
    """Put the weights of `net`'s convolutions and linear layers (`linear.keeping`) into the processor's order once, not
    at every call, while the block runs.

    ```python
    with packed(ldm.unet):
        ...                            # the steps of a sampler; the weights stay as they are meanwhile
    ```

    On x86 without gradients. Convolutions: where one has many more weights than pixels, else nothing happens: of 1,280
    channels half the time on a map of 8 by 8, and four fifths on 16 by 16; 0.93 of a step of Stable Diffusion 1 for two
    latents of 64 by 64 (fp32, one thread, Zen 3). It costs the memory of those weights again, over half of that
    network's, for each size of map, until the block ends; and at the first call about what it saves at each other.
    """
    convs = [part for part in net.modules() if isinstance(part, Conv)]
    try:
        for conv in convs:
            conv.kept = {}
        with keeping(net):
            yield
    finally:
        for conv in convs:
            conv.kept = None


class ResnetBlock(nn.Module):
    """Norm, SiLU, convolution, twice, beside a skip: "ResBlock" of Rombach et al. 2022, Appendix E.

    Args:
        time_dim: width of the time embedding, which is projected and added to each channel between the two; none
            leaves it out, as in the autoencoders.
        groups: of the GroupNorms.
        eps: of the GroupNorms: 1e-6 in the published autoencoders, 1e-5 in the published UNets.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        time_dim: int | None = None,
        groups: int = 32,
        eps: float = 1e-6,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = Conv(in_channels, out_channels)
        if time_dim is not None:
            self.time = nn.Linear(time_dim, out_channels)
        self.norm2 = GroupNorm(groups, out_channels, eps=eps)
        self.dropout = Dropout(dropout)
        self.conv2 = Conv(out_channels, out_channels)
        self.skip = nn.Identity() if in_channels == out_channels else nn.Conv2d(in_channels, out_channels, 1)

    def forward(
        self, x: Float[Tensor, "b i h w"], time: Float[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b o h w"]:
        h = silu(self.norm1(x))                                                          # b i h w
        h = self.conv1(h)                                                                # b o h w
        if time is not None:
            h = h + self.time(F.silu(time))[:, :, None, None]
        h = silu(self.norm2(h))
        h = self.conv2(self.dropout(h))
        return self.skip(x) + h


def silu(x: Tensor) -> Tensor:
    """SiLU of a map that only the caller has: in its place where no gradient asks for it, a quarter less memory."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


class Downsample(nn.Module):
    """Half the resolution by a convolution of stride 2. The autoencoders pad `after` alone, the UNets all around."""

    def __init__(self, in_channels: int, out_channels: int | None = None, after: bool = False):
        super().__init__()
        self.conv = Conv(in_channels, out_channels or in_channels, stride=2, after=after)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o rows columns"]:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the resolution: every pixel four times, then a convolution. `size` (rows, columns) is for a UNet whose
    skip at that resolution had an odd side."""

    def __init__(self, in_channels: int, out_channels: int | None = None):
        super().__init__()
        self.conv = Conv(in_channels, out_channels or in_channels)

    def forward(
        self, x: Float[Tensor, "b i h w"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b o rows columns"]:
        conv, double = self.conv, (2 * x.shape[-2], 2 * x.shape[-1])
        pixels = x.numel() // x.shape[1]
        plain = size in (None, double) and one_call(x, conv.weight)
        if plain and (conv.kept is not None or pixels >= WORTH[x.dtype]):
            return repeat_and_convolve(x, conv.weight, conv.bias, conv.wrap, conv.kept)
        return conv(F.interpolate(x, size=size or double, mode="nearest"))


# Pixels of a batch from which adding up the weights costs less than it saves, each time: products in bf16 are quick.
WORTH = {torch.float32: 512, torch.bfloat16: 2048}
SUMS = (-1,)  # the place of what is added up


def repeat_and_convolve(
    x: Float[Tensor, "b i h w"],
    weight: Float[Tensor, "o i 3 3"],
    bias: Float[Tensor, "o"] | None,
    wrap: tuple[bool, bool] = (False, False),
    kept: Kept | None = None,
) -> Float[Tensor, "b o rows columns"]:
    """Every pixel four times, then a 3x3 convolution, with 4/9 of the products.

    Of three repeated pixels in a row two are the same one, so that their weights can be added up first: each of the
    four pixels made of one is a 2x2 convolution of `x` (half the time on Zen 3; KL-f8's decoder 0.88). The sums are
    `kept` where weights are, twice of a convolution's memory.
    """
    kept = {} if kept is None else kept
    if SUMS not in kept:
        kept[SUMS] = added_up(weight)
    sums = kept[SUMS]
    (b, _, h, w), x = x.shape, pad(x, (1, 1), wrap)                                      # b i h+2 w+2
    order = torch.contiguous_format if x.is_contiguous() else torch.channels_last
    out = torch.empty((b, len(weight), 2 * h, 2 * w), dtype=x.dtype, device=x.device, memory_format=order)
    for i in (0, 1):
        for j in (0, 1):
            near = x[:, :, i : i + h + 1, j : j + w + 1]
            out[:, :, i::2, j::2] = convolve(near, sums[i, j], bias, kept=kept, place=(i, j))
    return out


def added_up(weight: Float[Tensor, "o i 3 3"]) -> Float[Tensor, "2 2 o i 2 2"]:
    """What the even and the odd row, and column, of repeated pixels meet: the sums of a 3x3 convolution's weights."""
    # Which of the three weights meet the first and the second of two pixels, for the even and the odd result.
    meet = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device)
    return torch.einsum("eik,fjl,ockl->efocij", meet, meet, weight.float()).to(weight.dtype).contiguous()
