"""Building blocks of convolutional diffusion networks: residual blocks, and changes of resolution.

First stage and denoiser of latent diffusion (Rombach et al. 2022) share them. Every 3x3 convolution is a `Conv`, so
that `seamless` reaches it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.kernels.conv import PackedConv, conv2d, pad, prefers_upsample_conv2d, upsample_conv2d
from triptych.kernels.linear import packed_linears
from triptych.layers.norm import GroupNorm
from triptych.layers.residual import Dropout


class Conv(nn.Conv2d):
    """A 3x3 convolution that keeps the size (stride 1) or halves it (stride 2, odd sizes rounded up).

    Args:
        pad_after: for stride 2: pad only at the right and the bottom, as the autoencoders do, instead of on all sides;
            odd sizes are then rounded down.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, pad_after: bool = False, bias: bool = True):
        super().__init__(inputs, outputs, 3, stride, padding=0 if pad_after else 1, bias=bias)
        self.pads = (0, 1) if pad_after else (1, 1)
        self.wrap: tuple[bool, bool] = (False, False)                                    # in x, in y: set by `seamless`
        self.packed: PackedConv | None = None                                            # set by `packed`

    def forward(self, input: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o rows columns"]:
        if self.wrap == (False, False) and self.pads == (1, 1):
            return conv2d(input, self.weight, self.bias, self.stride[0], 1, self.packed)
        return F.conv2d(pad(input, self.pads, self.wrap), self.weight, self.bias, self.stride)


@contextmanager
def seamless(net: nn.Module, x: bool = True, y: bool = True) -> Iterator[None]:
    """Wrap left around to right (`x`) and top to bottom (`y`) in every convolution of `net` while the block runs.

    ```python
    with seamless(unet), seamless(autoencoder):
        ...                            # generates images that tile without a seam
    ```

    Afterwards, also when the block raises, each convolution pads as before.
    """
    convs = [(part, part.wrap) for part in net.modules() if isinstance(part, Conv)]
    try:
        for conv, _ in convs:
            conv.wrap = (x, y)
        yield
    finally:
        for conv, wrap in convs:
            conv.wrap = wrap


@contextmanager
def packed(net: nn.Module) -> Iterator[None]:
    """Pack the weights of `net`'s convolutions and linear layers for oneDNN once, instead of in every call, while the
    block runs. The weights must not change meanwhile.

    ```python
    with packed(ldm.network):
        ...                            # the steps of a sampler
    ```

    This has an effect on x86 CPUs without gradients. Convolutions are packed where they have many more weights than
    pixels: with 1,280 channels they take half the time on a map of 8 by 8 and four fifths on 16 by 16, a step of Stable
    Diffusion 1 for two latents of 64 by 64 takes 0.93 (fp32, one thread, Zen 3). It needs the memory of those weights
    again, over half of that network's, for each size of map, until the block ends; packing takes about as long as one
    call saves. Linear layers: see `packed_linears`.
    """
    convs = [part for part in net.modules() if isinstance(part, Conv)]
    try:
        for conv in convs:
            conv.packed = {}
        with packed_linears(net):
            yield
    finally:
        for conv in convs:
            conv.packed = None


class ResnetBlock(nn.Module):
    """Norm, SiLU and convolution, twice, with a skip connection: "ResBlock" of Rombach et al. 2022, Appendix E.

    Args:
        time_dim: channels of the time embedding, which is projected and added to each channel between the two; None
            for networks without time, as the autoencoders.
        groups: groups of the GroupNorms.
        eps: epsilon of the GroupNorms: 1e-6 in the published autoencoders, 1e-5 in the published UNets.
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
    """Return SiLU of a map that only the caller holds; without gradients in place, which saves memory. A traced graph
    is the same with and without gradients."""
    return F.silu(x, inplace=not torch.is_grad_enabled() and not torch.jit.is_tracing())


class Downsample(nn.Module):
    """Half the resolution by a convolution of stride 2. The autoencoders set `pad_after`, the UNets do not."""

    def __init__(self, in_channels: int, out_channels: int | None = None, pad_after: bool = False):
        super().__init__()
        self.conv = Conv(in_channels, out_channels or in_channels, stride=2, pad_after=pad_after)

    def forward(self, x: Float[Tensor, "b i h w"]) -> Float[Tensor, "b o rows columns"]:
        return self.conv(x)


class Upsample(nn.Module):
    """Twice the resolution by nearest neighbors, then a convolution."""

    def __init__(self, in_channels: int, out_channels: int | None = None):
        super().__init__()
        self.conv = Conv(in_channels, out_channels or in_channels)

    def forward(
        self, x: Float[Tensor, "b i h w"], size: tuple[int, int] | None = None
    ) -> Float[Tensor, "b o rows columns"]:
        """Return the enlarged map; `size` (rows, columns) for a UNet whose skip at that resolution has an odd side."""
        conv, double = self.conv, (2 * x.shape[-2], 2 * x.shape[-1])
        if size in (None, double) and prefers_upsample_conv2d(x, conv.weight, conv.packed):
            return upsample_conv2d(x, conv.weight, conv.bias, conv.wrap, conv.packed)
        return conv(F.interpolate(x, size=size or double, mode="nearest"))
