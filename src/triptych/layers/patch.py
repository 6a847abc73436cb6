"""From pixels to tokens: patch partition and linear projection, alone or after a convolutional stem."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from triptych.layers.norm import BatchNorm
from triptych.layers.padding import pad_to_multiple


class PatchMask(NamedTuple):
    """Patches to hide in masked image modeling, and the trained token that replaces their embeddings."""

    mask: Bool[Tensor, "b h w"]
    """True in the pixels of hidden patches."""
    token: Float[Tensor, "d"]

    def hide(self, x: Float[Tensor, "b d rows columns"]) -> Float[Tensor, "b d rows columns"]:
        """Return embeddings with the token in the place of hidden ones."""
        hidden = F.interpolate(self.mask[:, None].to(x.dtype), size=x.shape[-2:], mode="nearest")
        return x * (1 - hidden) + self.token.to(x.dtype)[:, None, None] * hidden


class PatchEmbed(nn.Module):
    """Patch partition and linear projection (ViT, Equation 1), as one convolution of stride P.

    An image whose sides are not multiples of P is padded with zeros at the right and the bottom.
    """

    def __init__(self, channels: int, dim: int, patch: int, bias: bool = True):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch, bias=bias)

    def forward(
        self, images: Float[Tensor, "b c h w"], masked: PatchMask | None = None
    ) -> Float[Tensor, "b d rows columns"]:
        x = self.project(images)
        return x if masked is None else masked.hide(x)

    def project(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        images = pad_to_multiple(images, (self.patch, self.patch), (2, 3))
        if self.patch == 1:
            return self.proj(images)
        # The same as the convolution, as one matrix product, which is faster on CPU.
        tokens = rearrange(images, "b c (h p) (w q) -> b h w (c p q)", p=self.patch, q=self.patch)
        weight = self.proj.weight.flatten(1)                                             # D CPP
        return rearrange(F.linear(tokens, weight, self.proj.bias), "b h w d -> b d h w")


class ConvStem(nn.Module):
    """A few 3x3 convolutions of stride 2 before the projection ("Early convolutions help transformers see
    better", Xiao et al. 2021), the inductive bias that a small data set needs.

    Args:
        channels: channels of the image.
        widths: output channels of each convolution.
    """

    def __init__(self, channels: int, widths: tuple[int, ...]):
        super().__init__()
        layers: list[nn.Module] = []
        for width in widths:
            layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1, bias=False), BatchNorm(width), nn.GELU()]
            channels = width
        self.layers = nn.Sequential(*layers)
        self.channels, self.stride = channels, 2 ** len(widths)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        return self.layers(images)


class StdConv2d(nn.Conv2d):
    """Convolution with standardized weights (Qiao et al. 2019), TensorFlow's "SAME" padding, no bias.

    As in the paper's own code, epsilon is added to the standard deviation, not to the variance.
    """

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1):
        super().__init__(inputs, outputs, kernel, stride, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        w = self.weight.float()
        w = w - w.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True, correction=0) + 1e-5)
        x = pad_same(input, self.kernel_size[0], self.stride[0])
        return F.conv2d(x, w.to(self.weight.dtype), None, self.stride)


def pad_same(x: Tensor, kernel: int, stride: int, value: float = 0.0) -> Tensor:
    """Pad as TensorFlow's "SAME" does: for ceil(size / stride) outputs, with the odd pixel at the right and bottom."""
    pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x.shape[-2:]]
    return F.pad(x, (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2), value=value)


def flax_group_norm(channels: int) -> nn.GroupNorm:
    """Return a group norm with Flax's defaults, which the published hybrids were trained with: 32 groups, epsilon
    1e-6."""
    return nn.GroupNorm(32, channels, eps=1e-6)


class ResNetUnit(nn.Module):
    """A bottleneck of the paper's ResNet (BiT): GroupNorm instead of batch norm, standardized convolutions,
    post-activation."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        outputs = 4 * width
        self.conv1, self.gn1 = StdConv2d(inputs, width, 1), flax_group_norm(width)
        self.conv2, self.gn2 = StdConv2d(width, width, 3, stride), flax_group_norm(width)
        self.conv3, self.gn3 = StdConv2d(width, outputs, 1), flax_group_norm(outputs)
        self.project = inputs != outputs or stride != 1
        if self.project:
            self.conv_proj, self.gn_proj = StdConv2d(inputs, outputs, 1, stride), flax_group_norm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.gn_proj(self.conv_proj(x)) if self.project else x
        x = F.relu(self.gn1(self.conv1(x)))
        x = F.relu(self.gn2(self.conv2(x)))
        return F.relu(shortcut + self.gn3(self.conv3(x)))


class ResNetStem(nn.Module):
    """The hybrid's stem (ViT, Section 3.1): a 7x7 root of stride 4, then stages of bottleneck units.

    Args:
        channels: channels of the image.
        depths: number of units in each stage; () is the root alone (R+Ti/16), (3, 4, 9) is R50 without its last stage.
        width: channels of the root; stage i has width * 2^i channels, and four times as many at its output.
    """

    def __init__(self, channels: int, depths: tuple[int, ...], width: int):
        super().__init__()
        self.root, self.root_norm = StdConv2d(channels, width, 7, 2), flax_group_norm(width)
        self.stages = nn.ModuleList()
        inputs = width
        for i, depth in enumerate(depths):
            stage = nn.Sequential()
            for j in range(depth):
                stage.append(ResNetUnit(inputs, width * 2**i, stride=2 if i > 0 and j == 0 else 1))
                inputs = 4 * width * 2**i
            self.stages.append(stage)
        self.channels, self.stride = inputs, 4 * 2 ** max(len(depths) - 1, 0)

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d rows columns"]:
        x = F.relu(self.root_norm(self.root(images)))
        x = F.max_pool2d(pad_same(x, 3, 2, value=-torch.inf), 3, 2)
        for stage in self.stages:
            x = stage(x)
        return x
