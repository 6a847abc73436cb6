"""Attention inside windows: partition, cyclic shift, the mask, relative position bias (Swin, Liu et al. 2021).

A map of any size is padded to full windows at the right and bottom, then rolled, then masked, in this order. Every
quantity is a function of the map's size: forward changes no state.

Four functions build index tables. For a map of 3 x 3 cells, numbered row by row, in windows of 2 x 2, rolled by 1:

    map         padded (.)     rolled           windows
    0 1 2       0 1 2 .        4 5 | . 3        0: 4 5 7 8     1: . 3 . 6
    3 4 5       3 4 5 .        7 8 | . 6        2: . . 1 2     3: . . . 0
    6 7 8       6 7 8 .        ----+----
                . . . .        . . | . .
                               1 2 | . 0

- `window_sources` lists the cell in each slot of each window, as on the right: [[4, 5, 7, 8], [9, 3, 9, 6], ...], where
  9, the number of cells, stands for padding.
- `window_slots` is its inverse, the slot of each cell, counted through all windows: [[15, 10, 11], [5, 0, 1], ...].
- `window_order` has both without the padding, whose slots it lists: that of window 1's first cell is 4.
- `shift_mask` separates cells that the roll made neighbors: in window 1 the padding (right) from cells 3 and 6 (left).
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from triptych.kernels.attention import prefers_blocked
from triptych.kernels.constant_cache import cached
from triptych.kernels.dispatch import fast_path_allowed
from triptych.kernels.linear import linear
from triptych.kernels.permute import permuted
from triptych.layers.attention import AttentionModule, attention
from triptych.layers.padding import pad_to_multiple, side_of

Window = tuple[int, int]
"""Height and width in cells of the map."""


def windows_along(size: int, window: int) -> int:
    """Return how many windows cover `size` cells."""
    return (size + window - 1) // window


def shift_along(size: int, window: int, single: bool = False) -> int:
    """Return by how many cells SW-MSA rolls an axis: half a window, or 0 where one window covers the axis.

    Axes are independent (torchvision's rule; the authors' classifier shifts neither axis once the map's shorter side
    fits a window).

    Args:
        size: cells along the axis.
        window: cells of a window.
        single: whether a single window is rolled, too (`SwinConfig.shift_single_windows`).
    """
    if single:
        return window // 2
    # A product, because a dynamic size of torch.export must not be compared.
    return window // 2 * torch.sym_min(windows_along(size, window) - 1, 1)  # type: ignore[return-value]


def partition(x: Float[Tensor, "b h w d"], window: Window) -> Float[Tensor, "b n m d"]:
    """Cut a map into windows: (B, windows, cells, D), windows row by row, cells row by row."""
    return rearrange(x, "b (r h) (c w) d -> b (r c) (h w) d", h=window[0], w=window[1])


def reverse(x: Float[Tensor, "b n m d"], window: Window, rows: int, columns: int) -> Float[Tensor, "b h w d"]:
    """Invert `partition`, for `rows` x `columns` windows."""
    return rearrange(x, "b (r c) (h w) d -> b (r h) (c w) d", r=rows, c=columns, h=window[0], w=window[1])


def window_slots(
    height: int, width: int, rows: int, columns: int, window: Window, shift: tuple[int, int]
) -> Int[Tensor, "h w"]:
    """Return where each cell of a map goes: its slot in the list of all windows' cells, after padding and roll."""
    (h, w), y, x = window, torch.arange(height) - shift[0], torch.arange(width) - shift[1]
    # A remainder would do, but ONNX has none by a dynamic side.
    y, x = torch.where(y < 0, y + rows * h, y), torch.where(x < 0, x + columns * w, x)
    # ((y // h * columns + x // w) * h + y % h) * w + x % w, one axis at a time
    return (y // h * (columns * h * w) + y % h * w)[:, None] + (x // w * (h * w) + x % w)[None, :]


def window_sources(
    height: int, width: int, rows: int, columns: int, window: Window, shift: tuple[int, int], extra: int = 0
) -> Int[Tensor, "n m"]:
    """Return the cell of the map, row by row, in each slot of each window; height * width stands for padding.

    `extra` windows with arbitrary cells are appended.
    """
    n, (h, w) = torch.arange(rows * columns + extra), window
    m = torch.arange(h * w)
    y = (n // columns * h)[:, None] + (m // w)[None, :] + shift[0]
    x = ((n - n // columns * columns) * w)[:, None] + (m % w)[None, :] + shift[1]
    y, x = torch.where(y < rows * h, y, y - rows * h), torch.where(x < columns * w, x, x - columns * w)
    return torch.where((y < height) & (x < width), y * width + x, height * width)


def shift_mask(
    rows: int,
    columns: int,
    window: Window,
    shift: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    extra: int = 0,
) -> Float[Tensor, "n 1 m m"]:
    """Return the mask of SW-MSA: 0 between cells that were neighbors before the roll, -inf between those that the roll
    brought together (Section 3.2, Figure 4); (cells, cells) for each of rows x columns windows.
    """
    (h, w), m = window, torch.arange(window[0] * window[1], device=device)
    # Only the last window of an axis holds two regions: its own cells, and those rolled in from the other end.
    below, right = (m // w >= h - shift[0]).long(), (m % w >= w - shift[1]).long()
    region = torch.stack([torch.zeros_like(m), right, 2 * below, 2 * below + right])     # 4 m
    separate = region[:, None, :, None] != region[:, None, None, :]
    masks = torch.zeros(separate.shape, device=device, dtype=dtype).masked_fill(separate, -math.inf)
    n = torch.arange(rows * columns + extra, device=device)
    last_row, last_column = n // columns == rows - 1, n - n // columns * columns == columns - 1
    return masks[2 * last_row.long() + last_column.long()]                               # n 1 m m


class WindowOrder(NamedTuple):
    """A map's cells in the order of its windows."""

    sources: Int[Tensor, "n m"]
    """The cell, row by row, in each slot of each window; any cell where it is padding."""
    padding: Int[Tensor, "p"]
    """Slots, counted through all windows, that are padding."""
    slots: Int[Tensor, "cells"]
    """The slot of each cell."""


def window_order(
    height: int, width: int, rows: int, columns: int, window: Window, shift: tuple[int, int]
) -> WindowOrder:
    """Return the order of a height x width map's cells in `rows` x `columns` windows, rolled by `shift`."""
    sources = window_sources(height, width, rows, columns, window, shift)
    padding = (sources.flatten() == height * width).nonzero().flatten()
    slots = window_slots(height, width, rows, columns, window, shift).flatten()
    return WindowOrder(sources.clamp(max=height * width - 1).int(), padding, slots.int())


def relative_index(window: Window, device: torch.device | None = None) -> Int[Tensor, "m m"]:
    """Return the row of the bias table for each pair of a window's cells: the table lists the (2 M_h - 1)(2 M_w - 1)
    coordinate differences row by row (Section 3.2)."""
    y, x = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    dy, dx = (c.reshape(-1, 1) - c.reshape(1, -1) for c in (y, x))
    return ((dy + window[0] - 1) * (2 * window[1] - 1) + dx + window[1] - 1).to(device)


def log_spaced(
    window: Window, pretrained: Window, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "n 2"]:
    """Return all coordinate differences on SwinV2's log scale: sign(d) log2(1 + |d|) / log2(8), where the span of the
    pre-training window is 8 (Liu et al. 2022, Equation 4)."""
    axes = []
    for side, trained in zip(window, pretrained, strict=True):
        d = torch.arange(1 - side, side, dtype=torch.float64) * 8 / max((trained or side) - 1, 1)
        axes.append(d.sign() * (1 + d.abs()).log2() / math.log2(8))
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 2).to(device, dtype)


class ContinuousBias(nn.Module):
    """SwinV2's continuous relative position bias: an MLP of log-spaced differences (Liu et al. 2022, Equation 3)."""

    def __init__(self, heads: int, hidden: int = 512):
        super().__init__()
        self.fc1 = nn.Linear(2, hidden)
        self.fc2 = nn.Linear(hidden, heads, bias=False)

    def forward(self, d: Float[Tensor, "n 2"]) -> Float[Tensor, "n heads"]:
        return 16 * torch.sigmoid(self.fc2(F.relu(self.fc1(d))))


class WindowAttention(AttentionModule):
    """W-MSA: self-attention among the cells of each window, with relative position bias (Swin, Equation 4).

    Args:
        dim: channels of a cell.
        heads: number of heads; must divide `dim`.
        window: height and width in cells.
        cosine: SwinV2's form: cosines of queries and keys over a trained temperature of at least 0.01, and the
            continuous bias (Liu et al. 2022, Equation 2).
        pretrained: SwinV2's window in pre-training, which scales the coordinate differences; (0, 0) is `window`.
        bias: which of q, k and v have a bias; SwinV2's keys have none.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        window: Window,
        cosine: bool = False,
        pretrained: Window = (0, 0),
        bias: Literal["qkv", "qv", "none"] = "qkv",
    ):
        super().__init__()
        self.heads, self.window, self.pretrained, self.cosine = heads, window, pretrained, cosine
        self.qkv = nn.Linear(dim, 3 * dim, bias=bias == "qkv")
        self.split_bias = bias == "qv"
        if self.split_bias:
            self.q_bias = nn.Parameter(torch.empty(dim))
            self.v_bias = nn.Parameter(torch.empty(dim))
        self.proj = nn.Linear(dim, dim)
        if cosine:
            self.scale = nn.Parameter(torch.empty(heads, 1, 1))  # a logarithm
            self.bias_mlp = ContinuousBias(heads)
        else:
            self.bias_table = nn.Parameter(torch.empty((2 * window[0] - 1) * (2 * window[1] - 1), heads))
        self._cached_bias: _CachedBias | None = None

    def fill(self) -> None:
        for part in (self.q_bias, self.v_bias) if self.split_bias else ():
            nn.init.zeros_(part)
        if self.cosine:
            nn.init.constant_(self.scale, math.log(10))
        else:
            nn.init.trunc_normal_(self.bias_table, std=0.02)

    def position_bias(self) -> Float[Tensor, "heads m m"]:
        """Return B of Equation 4, gathered from the table or computed by the MLP; cached for calls without gradients.

        The cached bias is valid while the weights equal a copy of those it was computed from. Comparing them takes a
        thousandth of the time of a block; version counters miss writes of fused optimizers and through `.data`. On
        other devices than the CPU a comparison would synchronize, so the bias is computed in every call.
        """
        weights: list[Tensor] = [self.bias_table] if not self.cosine else list(self.bias_mlp.parameters())
        comparable = all(w.device.type == "cpu" and type(w) in (Tensor, nn.Parameter) for w in weights)
        if torch.is_grad_enabled() or not fast_path_allowed() or not comparable:
            return self._position_bias()
        autocast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu")
        settings = (self.window, self.pretrained, autocast)
        cache = self._cached_bias  # read once, because another thread may replace it
        if cache is None or not cache.valid(settings, weights):
            with torch.inference_mode(False), torch.no_grad():  # so that a later backward pass can use it
                cache = _CachedBias(settings, [w.detach().clone() for w in weights], self._position_bias())
            self._cached_bias = cache
        return cache.bias

    def _position_bias(self) -> Float[Tensor, "heads m m"]:
        if self.cosine:
            like = self.bias_mlp.fc1.weight
            table = self.bias_mlp(cached(log_spaced, self.window, self.pretrained, like.device, like.dtype))  # n heads
        else:
            table = self.bias_table
        index = cached(relative_index, self.window, table.device)                        # m m
        return table[index.reshape(-1)].T.reshape(self.heads, *index.shape).contiguous()

    def __getstate__(self):
        return {**super().__getstate__(), "_cached_bias": None}

    def forward(
        self,
        x: Float[Tensor, "b n m d"] | Float[Tensor, "b cells d"],
        mask: Float[Tensor, "n 1 m m"] | None = None,
        order: WindowOrder | None = None,
    ) -> Float[Tensor, "b n m d"] | Float[Tensor, "b cells d"]:
        """Return attention inside each window.

        Args:
            x: windows as `partition` cuts them; or with `order` a map's cells, row by row, which the result keeps.
            mask: that of `shift_mask`.
            order: that of `window_order`, for which the cells are gathered here.
        """
        bias = self.qkv.bias
        if self.split_bias:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if order is not None and not len(order.padding):
            x = permuted(x, order.sources.flatten(), order.slots).unflatten(1, order.sources.shape)
        qkv = linear(x, self.qkv.weight, bias)                                           # b n m 3D
        if order is not None and len(order.padding):  # gathered after the product, which for padding is the bias
            qkv = qkv.index_select(1, order.sources.flatten())
            of_zeros = qkv.new_zeros(qkv.shape[-1]) if bias is None else bias.to(qkv.dtype)
            qkv.index_copy_(1, order.padding, of_zeros.expand(len(qkv), len(order.padding), -1))
            qkv = qkv.unflatten(1, order.sources.shape)
        batch, windows = qkv.shape[:2]
        q, k, v = rearrange(qkv, "b n m (three h d) -> three (b n) h m d", three=3, h=self.heads)
        scale = None
        if self.cosine:
            # The key of a padding cell is 0 where keys have no bias. 1e-12 is 0 in fp16, and its inverse is infinite.
            eps = 1e-3 if q.dtype == torch.float16 else 1e-12
            q = F.normalize(q, dim=-1, eps=eps) * self.scale.clamp(max=math.log(100)).exp()
            k, scale = F.normalize(k, dim=-1, eps=eps), 1.0
        added = self.position_bias().to(q.dtype)[None]                                   # 1 h m m
        tap = self.tap
        if mask is not None:
            added = mask.to(q.dtype) + added                                             # n h m m
            if tap is None and prefers_blocked(q, k):  # windows take the place of heads, so that images share one mask
                q, k, v = (rearrange(t, "(b n) h m d -> b (n h) m d", n=windows) for t in (q, k, v))
                added = added.flatten(0, 1)[None]                                        # 1 nh m m
            elif not isinstance(batch, int) or batch != 1:
                added = added.repeat(batch, 1, 1, 1)                                     # bn h m m
        by_window = None if tap is None else lambda weights: tap(weights.unflatten(0, (batch, windows)))
        x = attention(q, k, v, by_window, added, scale)                                        # bn h m d, or b nh m d
        x = x.reshape(batch, windows, self.heads, *x.shape[2:])
        x = rearrange(x, "b n h m d -> b n m (h d)")
        if order is not None and len(order.padding):
            x = x.flatten(1, 2).index_select(1, order.slots)                              # b cells d
        elif order is not None:
            x = permuted(x.flatten(1, 2), order.slots, order.sources.flatten())      # b cells d
        return linear(x, self.proj.weight, self.proj.bias)


class _CachedBias(NamedTuple):
    """A bias, and what it was computed from."""

    settings: tuple
    weights: list[Tensor]
    bias: Tensor

    def valid(self, settings: tuple, weights: list[Tensor]) -> bool:
        """Return whether the same settings and weights would give the same bias."""
        return self.settings == settings and all(
            a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(self.weights, weights, strict=True)
        )


def attend(
    x: Float[Tensor, "b h w d"], attn: WindowAttention, shifted: bool, single: bool = False
) -> Float[Tensor, "b h w d"]:
    """Return W-MSA of a map, or SW-MSA if `shifted`: pad to full windows, roll, attend, roll back, crop. With `single`
    a map of one window is rolled, too."""
    height, width = side_of(x, 1), side_of(x, 2)
    if not (isinstance(height, int) and isinstance(width, int)):
        return attend_gathered(x, attn, shifted, single)
    (h, w), shift, mask = attn.window, (0, 0), None
    rows, columns = windows_along(height, h), windows_along(width, w)
    if shifted:
        shift = (shift_along(height, h, single), shift_along(width, w, single))
    if any(shift):
        mask = cached(shift_mask, rows, columns, (h, w), shift, x.device, x.dtype)
    unpadded = height % h == 0 and width % w == 0
    if x.device.type == "cpu" and fast_path_allowed() and (unpadded or not torch.is_grad_enabled()):
        # One gather in and one out take a fifth of the time of roll and partition (Zen 3), and padding has no products.
        # The gradient of a gather adds up values, which is slow; only without padding it is a gather, too.
        order = cached(window_order, height, width, rows, columns, (h, w), shift)
        return attn(x.flatten(1, 2), mask, order).unflatten(1, (height, width))
    x = pad_to_multiple(x, attn.window, (1, 2))
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    x = reverse(attn(partition(x, (h, w)), mask), (h, w), rows, columns)
    if any(shift):
        x = torch.roll(x, shift, (1, 2))
    return x[:, :height, :width]


def attend_gathered(
    x: Float[Tensor, "b h w d"], attn: WindowAttention, shifted: bool, single: bool = False
) -> Float[Tensor, "b h w d"]:
    """Return the same for a map whose sides are dynamic in torch.export: padding, roll and partition are one gather,
    whose indices are arithmetic on the sides, so that no side is compared. One extra window is added because PyTorch
    compares every size with 1, which would specialize the graph to maps of one window."""
    height, width = x.shape[1], x.shape[2]
    window, shift = attn.window, (0, 0)
    rows, columns = windows_along(height, window[0]), windows_along(width, window[1])
    if shifted:
        shift = (shift_along(height, window[0], single), shift_along(width, window[1], single))
    mask = shift_mask(rows, columns, window, shift, x.device, x.dtype, extra=1) if shifted else None
    cells = F.pad(x.flatten(1, 2), (0, 0, 0, 1))                                         # b hw+1 d: zeros last
    sources = window_sources(height, width, rows, columns, window, shift, extra=1).to(x.device)  # n+1 m
    x = attn(cells[:, sources], mask)                                                    # b n+1 m d
    slots = window_slots(height, width, rows, columns, window, shift).to(x.device)       # h w
    return x.flatten(1, 2)[:, slots]                                                     # b h w d
