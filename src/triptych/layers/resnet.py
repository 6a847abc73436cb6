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

from triptych.layers.linear import one_call


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
        self.layouts: dict[tuple[int, ...], Tensor] | None = None                        # set by `packed`

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o rows columns"]:
        if self.wrap == (False, False) and self.pads == (1, 1):
            if self.layouts is not None and self.weight.numel() > 4 * x.numel() and one_call(x, self.weight):
                return self.laid_out(x, self.layouts)
            return super().forward(x)
        return F.conv2d(pad(x, self.pads, self.wrap), self.weight, self.bias, self.stride)

    def laid_out(
        self, x: Float[Tensor, "b i h w"], layouts: dict[tuple[int, ...], Tensor]
    ) -> Float[Tensor, "b o rows columns"]:
        """The convolution with weights in oneDNN's own order, in which they are kept for the next `x` of this size."""
        size, how = tuple(x.shape), ([1, 1], list(self.stride), [1, 1], 1)
        if size not in layouts:
            reorder = torch._C._nn.mkldnn_reorder_conv2d_weight  # type: ignore[attr-defined]
            layouts[size] = reorder(self.weight.to_mkldnn(), *how, list(size))
        return torch.ops.mkldnn._convolution_pointwise(x, layouts[size], self.bias, *how, "none", [], "")


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
    """Put the weights of `net`'s convolutions into the processor's order once, not at every call, while the block runs.

    ```python
    with packed(ldm.unet):
        ...                            # the steps of a sampler; the weights stay as they are meanwhile
    ```

    On x86 without gradients, where a convolution has many more weights than pixels, else nothing happens: of 1,280
    channels half the time on a map of 8 by 8, and four fifths on 16 by 16; 0.93 of a step of Stable Diffusion 1 for two
    latents of 64 by 64 (fp32, one thread, Zen 3). It costs the memory of those weights again, over half of that
    network's, for each size of map, until the block ends.
    """
    convs = [part for part in net.modules() if isinstance(part, Conv)]
    try:
        for conv in convs:
            conv.layouts = {}
        yield
    finally:
        for conv in convs:
            conv.layouts = None


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
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=eps)
        self.conv1 = Conv(in_channels, out_channels)
        if time_dim is not None:
            self.time = nn.Linear(time_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=eps)
        self.dropout = nn.Dropout(dropout)
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
        double = (2 * x.shape[-2], 2 * x.shape[-1])
        pixels = x.numel() // x.shape[1]
        if size in (None, double) and pixels >= WORTH and one_call(x, self.conv.weight):
            return repeat_and_convolve(x, self.conv.weight, self.conv.bias, self.conv.wrap)
        return self.conv(F.interpolate(x, size=size or double, mode="nearest"))


WORTH = 512  # pixels of a batch from which adding up the weights costs less than it saves


def repeat_and_convolve(
    x: Float[Tensor, "b i h w"],
    weight: Float[Tensor, "o i 3 3"],
    bias: Float[Tensor, "o"] | None,
    wrap: tuple[bool, bool] = (False, False),
) -> Float[Tensor, "b o rows columns"]:
    """Every pixel four times, then a 3x3 convolution, with 4/9 of the products.

    Of three repeated pixels in a row two are the same one, so that their weights can be added up first: each of the
    four pixels made of one is a 2x2 convolution of `x` (half the time on Zen 3; KL-f8's decoder 0.88).
    """
    # Which of the three weights meet the first and the second of two pixels, for the even and the odd result.
    meet = torch.tensor([[[1.0, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]], device=weight.device)
    weights = torch.einsum("eik,fjl,ockl->efocij", meet, meet, weight.float()).to(weight.dtype)
    (b, _, h, w), x = x.shape, pad(x, (1, 1), wrap)                                      # b i h+2 w+2
    out = x.new_empty(b, len(weight), 2 * h, 2 * w)
    for i in (0, 1):
        for j in (0, 1):
            out[:, :, i::2, j::2] = F.conv2d(x[:, :, i : i + h + 1, j : j + w + 1], weights[i, j], bias)
    return out
