"""Approximations that make a UNet faster while a block runs; afterwards it is unchanged.

```python
with merged_tokens(ldm.network, 0.5), deep_cached(ldm.network, 3):
    ...                                # the steps of one sampler
```

Both change the generated images. Neither uses an image's random numbers: image k still depends on (seed, k) only.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.layers.attention import Attention
from triptych.layers.cross_attention import SpatialTransformer
from triptych.models.unet import UNet

MAX_MERGED = 0.75
"""Largest share of tokens that can be merged: one of each four is a destination."""


@contextmanager
def merged_tokens(net: nn.Module, ratio: float) -> Iterator[None]:
    """Merge similar tokens in the self-attentions of the finest level that has any, while the block runs (Bolya and
    Hoffman 2023, "Token Merging for Fast Stable Diffusion"). Each token gets the result of the one it was merged into.

    Args:
        net: the UNet.
        ratio: share of the tokens that are merged away, 0 (no effect) to 0.75.

    Raises:
        ConfigError: a ratio out of range, not a UNet, or a UNet without self-attention.
    """
    if not 0 <= ratio <= MAX_MERGED:
        raise ConfigError(f"merge_tokens is {ratio}, which must be from 0 (off) to {MAX_MERGED}")
    if not ratio:
        yield
        return
    generator = torch.Generator().manual_seed(0)  # independent of the images' noise
    replaced: list[tuple[Any, Attention]] = []
    hooks = []
    try:
        for part in _finest(_unet(net, "merge_tokens")):
            holders: list[Any] = list(part.blocks) if isinstance(part, SpatialTransformer) else [part]
            merging = [MergingAttention(holder.attn, ratio, generator) for holder in holders]
            for holder, attn in zip(holders, merging, strict=True):
                replaced.append((holder, holder.attn))
                holder.attn = attn
            hooks.append(part.register_forward_pre_hook(_size_hook(merging)))
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for holder, attn in replaced:
            holder.attn = attn


def _unet(net: nn.Module, what: str) -> UNet:
    if not isinstance(net, UNet):
        raise ConfigError(f"{what} needs a UNet, and this denoiser is a {type(net).__name__}; leave it out")
    return net


def _finest(net: UNet) -> list[Any]:
    """Return the modules that hold the self-attentions of the finest level that has any, in down and up path."""
    for down, up in zip(net.down, reversed(net.up), strict=True):
        parts = [block.transformer or block.attention for level in (down, up) for block in level.blocks]  # type: ignore
        parts = [part for part in parts if part is not None]
        if parts and not (isinstance(parts[0], SpatialTransformer) and parts[0].blocks[0].cross_only):  # type: ignore
            return parts
    raise ConfigError("merge_tokens: this UNet has self-attention in its middle only; leave it out")


def _size_hook(merging: list["MergingAttention"]) -> Callable[..., None]:
    """Return a hook that sets the height and width of the map in the attentions of a module."""

    def set_size(_part: nn.Module, inputs: tuple[Any, ...]) -> None:
        for attn in merging:
            attn.size = inputs[0].shape[-2:]

    return set_size


class MergingAttention(nn.Module):
    """Self-attention over merged tokens.

    Args:
        attn: the self-attention.
        ratio: share of the tokens that are merged away.
        generator: draws which token of each four is the destination; a fixed one would be visible as a grid.
    """

    def __init__(self, attn: Attention, ratio: float, generator: torch.Generator):
        super().__init__()
        self.attn, self.ratio, self.generator = attn, ratio, generator
        self.size = (0, 0)

    def forward(self, x: Float[Tensor, "b n d"]) -> Float[Tensor, "b n d"]:
        if min(self.size) < 2:                                                           # no 2 x 2 cells
            return self.attn(x)
        merged, rows = merge(x, self.size, self.ratio, self.generator)                   # b m d, (b n)
        return self.attn(merged).flatten(0, 1)[rows].view_as(x)


def merge(
    x: Float[Tensor, "b n d"], size: tuple[int, int], ratio: float, generator: torch.Generator
) -> tuple[Float[Tensor, "b m d"], Tensor]:
    """Return fewer tokens, and for each token of the batch the row of its merged token (Section 4).

    In each 2 x 2 cells of the map one token, drawn at random, is a destination. Of the others, those most similar
    (cosine) to their nearest destination are averaged into it; as many as `ratio` of all, but never a destination.
    """
    b, n, d = x.shape
    into = random_destinations(size, generator).to(x.device)                                    # t
    others = torch.ones(n, dtype=torch.bool, device=x.device)
    others[into] = False
    source = others.nonzero().flatten()                                                  # s
    merged = min(int(ratio * n), len(source))
    unit = F.normalize(x, dim=-1)
    similarity, nearest = (unit[:, source] @ unit[:, into].transpose(1, 2)).max(dim=-1)  # b s
    order = similarity.argsort(dim=-1, descending=True)
    leave, stay = order[:, :merged], order[:, merged:]
    target = torch.empty(b, n, dtype=torch.int64, device=x.device)
    target[:, into] = torch.arange(len(into), device=x.device)
    target.scatter_(1, source[leave], nearest.gather(1, leave))
    target.scatter_(1, source[stay], torch.arange(len(into), n - merged, device=x.device).expand(b, -1))
    rows = (target + torch.arange(b, device=x.device)[:, None] * (n - merged)).flatten() # b n
    counts = torch.bincount(rows, minlength=b * (n - merged))[:, None]
    sums = x.new_zeros(b * (n - merged), d, dtype=torch.float32).index_add_(0, rows, x.flatten(0, 1).float())
    return (sums / counts).to(x.dtype).view(b, n - merged, d), rows


def random_destinations(size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Return the index of one random token of each complete 2 x 2 cells of a map."""
    rows, columns = size[0] // 2, size[1] // 2
    corner = torch.randint(4, (rows, columns), generator=generator)
    y = 2 * torch.arange(rows)[:, None] + corner // 2
    x = 2 * torch.arange(columns) + corner % 2
    return (y * size[1] + x).flatten()


@contextmanager
def deep_cached(net: nn.Module, interval: int) -> Iterator[None]:
    """Reuse deep features while the block runs (Ma et al. 2023, "DeepCache: Accelerating Diffusion Models for Free").

    What the UNet computes between its first block down and its last two blocks up changes slowly from step to step, so
    it is computed in every `interval`-th step only. Use one block for the steps of one sampler. Inputs of another shape
    than the previous ones, as by guidance in an interval, are computed in full.

    Args:
        net: the UNet.
        interval: N of Section 3.3, at least 1 (no effect).

    Raises:
        ConfigError: an interval below 1, or not a UNet.
    """
    if interval < 1:
        raise ConfigError(f"deep_cache is {interval}, which must be at least 1 (off)")
    if interval == 1:
        yield
        return
    unet, cache = _unet(net, "deep_cache"), DeepFeatures(interval)
    down, middle, up = list(unet.down), unet.middle, list(unet.up)
    try:
        for i, level in enumerate(down):
            unet.down[i] = Skippable(level, cache, lambda *_: []) if i else FirstBlock(level, cache)
        unet.middle = Skippable(middle, cache, lambda x, *_: x)
        for i, level in enumerate(up[:-1]):
            unet.up[i] = Skippable(level, cache, lambda x, *_: x)
        unet.up[len(up) - 1] = LastBlocks(up[-1], cache)
        yield
    finally:
        unet.middle = middle
        for path, levels in ((unet.down, down), (unet.up, up)):
            for i, level in enumerate(levels):
                path[i] = level


class DeepFeatures:
    """The input of a UNet's last two blocks, computed in every `interval`-th step."""

    def __init__(self, interval: int):
        self.interval, self.age, self.shape = interval, 0, torch.Size()
        self.x = torch.empty(0)

    def next_step(self, shape: torch.Size) -> None:
        """Begin a step for inputs of this shape."""
        self.age = (self.age + 1) % self.interval if shape == self.shape else 0
        self.shape = shape

    @property
    def expired(self) -> bool:
        """Whether this step computes the deep features."""
        return self.age == 0


class CachedPart(nn.Module):
    """A part of a UNet that depends on whether deep features are computed in this step."""

    def __init__(self, part: nn.Module, cache: DeepFeatures):
        super().__init__()
        self.part, self.cache = part, cache

    @property
    def blocks(self) -> Any:
        return self.part.blocks


class Skippable(CachedPart):
    """A deep part: `shortcut` takes its place where cached features are used."""

    def __init__(self, part: nn.Module, cache: DeepFeatures, shortcut: Callable[..., Any]):
        super().__init__(part, cache)
        self.shortcut = shortcut

    def forward(self, *inputs: Any) -> Any:
        return self.part(*inputs) if self.cache.expired else self.shortcut(*inputs)


class FirstBlock(CachedPart):
    """The first level down, of which only the first block runs where cached features are used."""

    def forward(self, x: Tensor, time: Tensor, context: Any) -> list[Tensor]:
        self.cache.next_step(x.shape)
        return self.part(x, time, context) if self.cache.expired else [self.blocks[0](x, time, context)]


class LastBlocks(CachedPart):
    """The last level up, of which only the last two blocks run where cached features are used."""

    def forward(self, x: Tensor, skips: list[Tensor], time: Tensor, context: Any) -> Float[Tensor, "b o h w"]:
        if self.cache.expired:
            for block in self.blocks[:-2]:
                x = block(torch.cat([x, skips.pop()], dim=1), time, context)
            self.cache.x = x
        x = self.cache.x
        for block in self.blocks[-2:]:
            x = block(torch.cat([x, skips.pop()], dim=1), time, context)
        return x
