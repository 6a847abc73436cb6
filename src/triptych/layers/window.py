"""Attention inside windows: partition, cyclic shift, the mask, relative position bias (Swin, Liu et al. 2021).

A map of any size is padded to whole windows at the right and bottom, then rolled, then masked, in this order. Every
quantity is a function of the map's size: forward changes no state.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from triptych.kernels.constant_cache import kept
from triptych.kernels.dispatch import plain
from triptych.kernels.linear import linear
from triptych.layers.attention import attention, slabs_pay
from triptych.layers.padding import pad_to_multiple, side_of

Window = tuple[int, int]  # height, width in cells of the map


def windows_along(size: int, window: int) -> int:
    """How many windows cover `size` cells."""
    return (size + window - 1) // window


def shift_along(size: int, window: int) -> int:
    """Cells that SW-MSA rolls an axis by: half a window; none where one window covers the axis, whatever the other one
    does (torchvision's rule; the authors' classifier shifts neither axis once the map's shorter side fits a window)."""
    # Written as a product because a size that torch.export left open may not be asked what it is.
    return window // 2 * torch.sym_min(windows_along(size, window) - 1, 1)  # type: ignore[return-value]


def partition(x: Float[Tensor, "b h w d"], window: Window) -> Float[Tensor, "b n m d"]:
    """Cut a map of whole windows into them: (B, windows, cells, D), windows row by row, cells row by row."""
    return rearrange(x, "b (r h) (c w) d -> b (r c) (h w) d", h=window[0], w=window[1])


def reverse(x: Float[Tensor, "b n m d"], window: Window, rows: int, columns: int) -> Float[Tensor, "b h w d"]:
    """The inverse of `partition`, for `rows` and `columns` of windows."""
    return rearrange(x, "b (r c) (h w) d -> b (r h) (c w) d", r=rows, c=columns, h=window[0], w=window[1])


def places(
    height: int, width: int, rows: int, columns: int, window: Window, shift: tuple[int, int]
) -> Int[Tensor, "h w"]:
    """Where each cell of a map goes: its place in the list of all windows' cells, after padding and roll."""
    (h, w), y, x = window, torch.arange(height) - shift[0], torch.arange(width) - shift[1]
    # A remainder would do, but ONNX knows none by a side that was left open.
    y, x = torch.where(y < 0, y + rows * h, y), torch.where(x < 0, x + columns * w, x)
    # ((y // h * columns + x // w) * h + y % h) * w + x % w, an axis at a time
    return (y // h * (columns * h * w) + y % h * w)[:, None] + (x // w * (h * w) + x % w)[None, :]


def sources(
    height: int, width: int, rows: int, columns: int, window: Window, shift: tuple[int, int], extra: int = 0
) -> Int[Tensor, "n m"]:
    """The cell of the map, row by row, that each place of each window shows; height * width stands for padding.
    `extra` windows come after the last, and show anything."""
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
    """What a window of the rolled map may not see: 0 between cells that were neighbours before the roll, -inf between
    those that the roll brought together (Section 3.2, Figure 4). One (cells, cells) for each of rows x columns windows.
    """
    (h, w), m = window, torch.arange(window[0] * window[1], device=device)
    # Only the last window of an axis holds two regions: its own cells, and those that came round from the other end.
    below, right = (m // w >= h - shift[0]).long(), (m % w >= w - shift[1]).long()
    region = torch.stack([torch.zeros_like(m), right, 2 * below, 2 * below + right])     # 4 m
    apart = region[:, None, :, None] != region[:, None, None, :]
    kinds = torch.zeros(apart.shape, device=device, dtype=dtype).masked_fill(apart, -math.inf)
    n = torch.arange(rows * columns + extra, device=device)
    last_row, last_column = n // columns == rows - 1, n - n // columns * columns == columns - 1
    return kinds[2 * last_row.long() + last_column.long()]                               # n 1 m m


class Order(NamedTuple):
    """A map's cells in the order of its windows."""

    taken: Int[Tensor, "n m"]
    """The cell, row by row, that each place of each window shows; any cell where it is padding."""
    padding: Int[Tensor, "p"]
    """The places, counted through all windows, that are padding."""
    back: Int[Tensor, "cells"]
    """The place of each cell."""


def order_of(height: int, width: int, rows: int, columns: int, window: Window, shift: tuple[int, int]) -> Order:
    """The order of a map of such sides in `rows` x `columns` windows, rolled by `shift`."""
    taken = sources(height, width, rows, columns, window, shift)
    padding = (taken.flatten() == height * width).nonzero().flatten()
    back = places(height, width, rows, columns, window, shift).flatten()
    return Order(taken.clamp(max=height * width - 1).int(), padding, back.int())


def relative_index(window: Window, device: torch.device | None = None) -> Int[Tensor, "m m"]:
    """Row of the bias table for each pair of a window's cells: the table lists the (2 M_h - 1)(2 M_w - 1) differences
    of coordinates row by row (Section 3.2)."""
    y, x = torch.meshgrid(torch.arange(window[0]), torch.arange(window[1]), indexing="ij")
    dy, dx = (c.reshape(-1, 1) - c.reshape(1, -1) for c in (y, x))
    return ((dy + window[0] - 1) * (2 * window[1] - 1) + dx + window[1] - 1).to(device)


def log_spaced(
    window: Window, pretrained: Window, device: torch.device | None = None, dtype: torch.dtype | None = None
) -> Float[Tensor, "n 2"]:
    """Every difference of coordinates on SwinV2's log scale: sign(d) log2(1 + |d|) / log2(8), where the span of the
    window that was trained on is 8 (Liu et al. 2022, Equation 4)."""
    axes = []
    for side, before in zip(window, pretrained, strict=True):
        d = torch.arange(1 - side, side, dtype=torch.float64) * 8 / max((before or side) - 1, 1)
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


def _comparable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and type(weight) in (Tensor, nn.Parameter)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


class WindowAttention(nn.Module):
    """W-MSA: self-attention among the cells of each window, with relative position bias (Swin, Equation 4).

    With `cosine` as SwinV2 has it: cosines of queries and keys over a learnt temperature, at least 0.01, and the
    continuous bias (Liu et al. 2022, Equation 2).

    Args:
        dim: width of a cell.
        heads: number of heads; must divide `dim`.
        window: cells of a window.
        pretrained: SwinV2's window in pre-training, which the scale of differences belongs to; (0, 0) is `window`.
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
        self.tap: Callable[[Tensor], None] | None = None  # set by layers.capture
        self._kept: tuple[tuple, list[Tensor], Tensor] | None = None  # what the bias was made for, of what, and itself

    def fill(self) -> None:
        for part in (self.q_bias, self.v_bias) if self.split_bias else ():
            nn.init.zeros_(part)
        if self.cosine:
            nn.init.constant_(self.scale, math.log(10))
        else:
            nn.init.trunc_normal_(self.bias_table, std=0.02)

    def position_bias(self) -> Float[Tensor, "heads m m"]:
        """B of Equation 4, gathered from the table, or made by the MLP; kept for calls that need no gradient.

        Whether the weights are still those that it was made of is seen by comparing them with a copy, a thousandth of
        the time of a block: no version counts what is written by fused optimisers or through `.data`. Elsewhere than on
        the CPU a comparison would wait for the device, and the bias is made anew.
        """
        sources = [self.bias_table] if not self.cosine else list(self.bias_mlp.parameters())
        if torch.is_grad_enabled() or not plain() or not all(map(_comparable, sources)):
            return self._position_bias()
        made_for = (self.window, self.pretrained, torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"))
        before = self._kept  # looked at once: another thread may call, too
        if before is None or before[0] != made_for or not all(map(_same, before[1], sources)):
            with torch.inference_mode(False), torch.no_grad():  # else a later backward pass could not use it
                before = self._kept = made_for, [s.detach().clone() for s in sources], self._position_bias()
        return before[2]

    def _position_bias(self) -> Float[Tensor, "heads m m"]:
        if self.cosine:
            like = self.bias_mlp.fc1.weight
            table = self.bias_mlp(kept(log_spaced, self.window, self.pretrained, like.device, like.dtype))  # n heads
        else:
            table = self.bias_table
        index = kept(relative_index, self.window, table.device)                          # m m
        return table[index.reshape(-1)].T.reshape(self.heads, *index.shape).contiguous()

    def __getstate__(self):
        return {**super().__getstate__(), "_kept": None}

    def forward(
        self,
        x: Float[Tensor, "b n m d"] | Float[Tensor, "b cells d"],
        mask: Float[Tensor, "n 1 m m"] | None = None,
        order: Order | None = None,
    ) -> Float[Tensor, "b n m d"] | Float[Tensor, "b cells d"]:
        """Attention inside each window; `mask` is that of `shift_mask`, and windows come as `partition` makes them.
        With their order, a map's cells come and go as the map has them."""
        bias = self.qkv.bias
        if self.split_bias:
            bias = torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        if order is not None and not len(order.padding):
            x = _Permuted.apply(x, order.taken.flatten(), order.back).unflatten(1, order.taken.shape)
        qkv = linear(x, self.qkv.weight, bias)                                           # b n m 3D
        if order is not None and len(order.padding):  # gathered after the product, which zeros need not: it is the bias
            qkv = qkv.index_select(1, order.taken.flatten())
            of_zeros = qkv.new_zeros(qkv.shape[-1]) if bias is None else bias.to(qkv.dtype)
            qkv.index_copy_(1, order.padding, of_zeros.expand(len(qkv), len(order.padding), -1))
            qkv = qkv.unflatten(1, order.taken.shape)
        batch, windows = qkv.shape[:2]
        q, k, v = rearrange(qkv, "b n m (three h d) -> three (b n) h m d", three=3, h=self.heads)
        scale = None
        if self.cosine:
            # The key of a padding cell is 0 where keys have no bias. 1e-12 is 0 in fp16, and its inverse is infinite.
            eps = 1e-3 if q.dtype == torch.float16 else 1e-12
            q = F.normalize(q, dim=-1, eps=eps) * self.scale.clamp(max=math.log(100)).exp()
            k, scale = F.normalize(k, dim=-1, eps=eps), 1.0
        added = self.position_bias().to(q.dtype)[None]                                   # 1 h m m
        told = self.tap
        if mask is not None:
            added = mask.to(q.dtype) + added                                             # n h m m
            if told is None and slabs_pay(q, k):  # windows stand as heads, for which one mask serves all images
                q, k, v = (rearrange(t, "(b n) h m d -> b (n h) m d", n=windows) for t in (q, k, v))
                added = added.flatten(0, 1)[None]                                        # 1 nh m m
            elif not isinstance(batch, int) or batch != 1:
                added = added.repeat(batch, 1, 1, 1)                                     # bn h m m
        tap = None if told is None else lambda weights: told(weights.unflatten(0, (batch, windows)))
        x = attention(q, k, v, tap, added, scale)                                        # bn h m d, or b nh m d
        x = x.reshape(batch, windows, self.heads, *x.shape[2:])
        x = rearrange(x, "b n h m d -> b n m (h d)")
        if order is not None and len(order.padding):
            x = x.flatten(1, 2).index_select(1, order.back)                              # b cells d
        elif order is not None:
            x = _Permuted.apply(x.flatten(1, 2), order.back, order.taken.flatten())      # b cells d
        return linear(x, self.proj.weight, self.proj.bias)


class _Permuted(torch.autograd.Function):
    """The cells `x` (b, cells, d) in another order, each once, so that their gradient is a gather, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, taken: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(taken, back)
        return x.index_select(1, taken)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        taken, back = ctx.saved_tensors
        return _Permuted.apply(dy, back, taken), None, None


def attend(x: Float[Tensor, "b h w d"], attn: WindowAttention, shifted: bool) -> Float[Tensor, "b h w d"]:
    """W-MSA on a whole map, or SW-MSA if `shifted`: pad to whole windows, roll, attend, roll back, crop."""
    height, width = side_of(x, 1), side_of(x, 2)
    if not (isinstance(height, int) and isinstance(width, int)):
        return attend_gathered(x, attn, shifted)
    (h, w), shift, mask = attn.window, (0, 0), None
    rows, columns = windows_along(height, h), windows_along(width, w)
    if shifted:
        shift = (shift_along(height, h), shift_along(width, w))
    if any(shift):
        mask = kept(shift_mask, rows, columns, (h, w), shift, x.device, x.dtype)
    whole = height % h == 0 and width % w == 0
    if x.device.type == "cpu" and plain() and (whole or not torch.is_grad_enabled()):
        # One gather in and one out take a fifth of the time of roll and partition (Zen 3), and padding has no products.
        # The gradient of a gather adds up, slowly; only where nothing is padding is it a gather, too.
        order = kept(order_of, height, width, rows, columns, (h, w), shift)
        return attn(x.flatten(1, 2), mask, order).unflatten(1, (height, width))
    x = pad_to_multiple(x, attn.window, (1, 2))
    if any(shift):
        x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
    x = reverse(attn(partition(x, (h, w)), mask), (h, w), rows, columns)
    if any(shift):
        x = torch.roll(x, shift, (1, 2))
    return x[:, :height, :width]


def attend_gathered(x: Float[Tensor, "b h w d"], attn: WindowAttention, shifted: bool) -> Float[Tensor, "b h w d"]:
    """The same for a map whose sides torch.export left open: padding, roll and partition are one gather, whose indices
    are arithmetic on the sides, so that nothing is asked of them. One window too many, because PyTorch asks of every
    size whether it is 1, and would pin a map of one window to that."""
    height, width = x.shape[1], x.shape[2]
    window, shift = attn.window, (0, 0)
    rows, columns = windows_along(height, window[0]), windows_along(width, window[1])
    if shifted:
        shift = (shift_along(height, window[0]), shift_along(width, window[1]))
    mask = shift_mask(rows, columns, window, shift, x.device, x.dtype, extra=1) if shifted else None
    cells = F.pad(x.flatten(1, 2), (0, 0, 0, 1))                                         # b hw+1 d: zeros last
    taken = sources(height, width, rows, columns, window, shift, extra=1).to(x.device)   # n+1 m
    x = attn(cells[:, taken], mask)                                                      # b n+1 m d
    back = places(height, width, rows, columns, window, shift).to(x.device)              # h w
    return x.flatten(1, 2)[:, back]                                                      # b h w d
