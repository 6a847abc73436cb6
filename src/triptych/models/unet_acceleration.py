"""A UNet that computes less than it was trained to, while a block runs; after it the network is what it was.

```python
with merged_tokens(ldm.unet, 0.5), deep_cached(ldm.unet, 3):
    ...                                # the steps of one sampler
```

Pictures change with both. Neither draws from the picture's noise: image k still depends on (seed, k) alone.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import UserError
from triptych.kernels.conv import preferred_format
from triptych.layers.attention import Attention
from triptych.layers.cross_attention import SpatialTransformer
from triptych.models.unet import UNet

MOST = 0.75  # of the tokens can be merged: one of each four is what others are merged into


@contextmanager
def merged_tokens(net: nn.Module, ratio: float) -> Iterator[None]:
    """Token merging (Bolya and Hoffman 2023, "Token Merging for Fast Stable Diffusion"): in the self-attentions of the
    finest level that has any, tokens that are alike are one, and each gets back what that one became.

    Args:
        ratio: of the tokens that are merged away, 0 (nothing happens) to 0.75.

    Raises:
        UserError: another ratio, no UNet, or one without self-attention.
    """
    if not 0 <= ratio <= MOST:
        raise UserError(f"merge_tokens is {ratio}, which must be from 0 (off) to {MOST}")
    if not ratio:
        yield
        return
    draw = torch.Generator().manual_seed(0)  # of the network's passes, not of the pictures
    attentions: list[Attention] = []
    hooks = []
    try:
        for part in _finest(_unet(net, "merge_tokens")):
            inner: list[Any] = list(part.blocks) if isinstance(part, SpatialTransformer) else [part]
            inner = [holder.attn for holder in inner]
            merged = [Merged(attn.forward, ratio, draw) for attn in inner]
            for attn, forward in zip(inner, merged, strict=True):
                attn.forward = forward
                attentions.append(attn)
            hooks.append(part.register_forward_pre_hook(_measuring(merged)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for attn in attentions:
            del attn.forward  # what is left is the class's own


def _unet(net: nn.Module, what: str) -> UNet:
    if not isinstance(net, UNet):
        raise UserError(f"{what} is of a UNet; this denoiser is a {type(net).__name__}: leave it out")
    return net


def _finest(net: UNet) -> list[Any]:
    """What holds the self-attentions of the first level that has them, on the way down and up."""
    for down, up in zip(net.down, reversed(net.up), strict=True):
        parts = [block.transformer or block.attention for level in (down, up) for block in level.blocks]  # type: ignore
        parts = [part for part in parts if part is not None]
        if parts and not (isinstance(parts[0], SpatialTransformer) and parts[0].blocks[0].cross_only):  # type: ignore
            return parts
    raise UserError("merge_tokens: this UNet has no self-attention but in its middle; leave it out")


def _measuring(merged: list["Merged"]) -> Callable[..., None]:
    """A hook that tells the attentions of a part how high and wide the map is that their tokens are of."""

    def measure(_part: nn.Module, given: tuple[Any, ...]) -> None:
        for forward in merged:
            forward.size = given[0].shape[-2:]

    return measure


class Merged:
    """Self-attention over fewer tokens, as the forward of an `Attention`.

    Args:
        forward: its own.
        draw: of which token of each four is the one that others may be merged into; a fixed one shows as a grid.
    """

    def __init__(self, forward: Callable[[Tensor], Tensor], ratio: float, draw: torch.Generator):
        self.forward, self.ratio, self.draw = forward, ratio, draw
        self.size = (0, 0)

    def __call__(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if min(self.size) < 2:                                                           # no 2 x 2 cells
            return self.forward(x)
        less, where = merge(x, self.size, self.ratio, self.draw)                         # b m d, (b n)
        return self.forward(less).flatten(0, 1)[where].view_as(x)


def merge(
    x: Float[Tensor, "b n d"], size: tuple[int, int], ratio: float, draw: torch.Generator
) -> tuple[Float[Tensor, "b m d"], Tensor]:
    """Fewer tokens, and for each token of the batch the row that now stands for it (Section 4).

    In each 2 x 2 cells of the map one token, drawn, is a destination. Of the others those that are most like their
    likest destination (cosine) are averaged into it; as many as `ratio` of all, but never a destination.
    """
    b, n, d = x.shape
    into = destinations(size, draw).to(x.device)                                         # t
    others = torch.ones(n, dtype=torch.bool, device=x.device)
    others[into] = False
    source = others.nonzero().flatten()                                                  # s
    gone = min(int(ratio * n), len(source))
    unit = F.normalize(x, dim=-1)
    alike, likest = (unit[:, source] @ unit[:, into].transpose(1, 2)).max(dim=-1)        # b s
    order = alike.argsort(dim=-1, descending=True)
    left, stay = order[:, :gone], order[:, gone:]
    target = torch.empty(b, n, dtype=torch.int64, device=x.device)
    target[:, into] = torch.arange(len(into), device=x.device)
    target.scatter_(1, source[left], likest.gather(1, left))
    target.scatter_(1, source[stay], torch.arange(len(into), n - gone, device=x.device).expand(b, -1))
    where = (target + torch.arange(b, device=x.device)[:, None] * (n - gone)).flatten()  # b n
    counts = torch.bincount(where, minlength=b * (n - gone))[:, None]
    summed = x.new_zeros(b * (n - gone), d, dtype=torch.float32).index_add_(0, where, x.flatten(0, 1).float())
    return (summed / counts).to(x.dtype).view(b, n - gone, d), where


def destinations(size: tuple[int, int], draw: torch.Generator) -> Tensor:
    """The number of one token of each whole 2 x 2 cells of a map, drawn."""
    rows, columns = size[0] // 2, size[1] // 2
    corner = torch.randint(4, (rows, columns), generator=draw)
    y = 2 * torch.arange(rows)[:, None] + corner // 2
    x = 2 * torch.arange(columns) + corner % 2
    return (y * size[1] + x).flatten()


@contextmanager
def deep_cached(net: nn.Module, every: int) -> Iterator[None]:
    """DeepCache (Ma et al. 2023, "DeepCache: Accelerating Diffusion Models for Free"): what the UNet makes below its
    first block down and its last two up changes slowly from step to step, and is made anew at each `every`-th only.

    Around the steps of one sampler: the next one begins in a block of its own. Latents of another shape than the last
    ones (guidance in an interval) are computed in full.

    Args:
        every: N of Section 3.3, from 1 (nothing happens).

    Raises:
        UserError: less than 1, or no UNet.
    """
    if every < 1:
        raise UserError(f"deep_cache is {every}, which must be at least 1 (off)")
    if every == 1:
        yield
        return
    unet = _unet(net, "deep_cache")
    shallow = Shallow(unet, every)
    hook = unet.up[-1].blocks[-2].register_forward_pre_hook(shallow.keep)  # type: ignore[union-attr, index]
    try:
        unet.forward = shallow
        yield
    finally:
        hook.remove()
        del unet.forward


class Shallow:
    """A UNet's forward that goes no deeper than its first block, but for each `every`-th time."""

    def __init__(self, net: UNet, every: int):
        self.net, self.every, self.forward = net, every, net.forward
        self.first: Any = net.down[0].blocks[0]  # type: ignore[union-attr, index]
        self.last: Any = net.up[-1].blocks[-2:]  # type: ignore[union-attr, index]
        self.age, self.shape = 0, torch.Size()
        self.deep = torch.empty(0)

    def keep(self, _block: nn.Module, given: tuple[Any, ...]) -> None:
        """What comes from below, where the first block's map is laid beside it."""
        if self.age == 0:
            self.deep = given[0][:, : -self.net.config.width * self.net.config.multipliers[0]]

    def __call__(
        self, x: Tensor, t: Tensor, context: Any = None, labels: Tensor | None = None
    ) -> Float[Tensor, "b o h w"]:
        self.age = (self.age + 1) % self.every if x.shape == self.shape else 0
        self.shape = x.shape
        if self.age == 0:
            return self.forward(x, t, context, labels)
        net = self.net
        net._check(x, context, labels)
        time = net.embed(t, labels)                                                      # b 4C
        skips = [net.input(preferred_format(x, net.input.weight))]
        skips.append(self.first(skips[0], time, context))
        z = self.deep
        for block in self.last:
            z = block(torch.cat([z, skips.pop()], dim=1), time, context)
        return net.predict(z)                                                            # b o h w
