"""Batch norm that a batch of one does not stop, and whose batch may be shared by several processes; and group norm with
a quick gradient."""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych import distributed
from triptych.kernels.dispatch import plain


class BatchNorm(nn.BatchNorm2d):
    """Batch norm (Ioffe and Szegedy 2015) which, in training, takes the running statistics where there is one value a
    channel: one image whose map, or whose pooled map, has one cell. It has no variance, and PyTorch's refuses it.

    Of a batch that is shared (`triptych.distributed`) mean and variance are those of all of it, in fp32; PyTorch's own
    SyncBatchNorm does so on CUDA alone."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        share = distributed.current_shard() if self.training else None
        whole = x.shape[0] if share is None else share.total
        if self.training and whole * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x) if share is None else self._shared(x, share)

    def _shared(self, x: Float[Tensor, "b c h w"], share: distributed.BatchShard) -> Float[Tensor, "b c h w"]:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        kind, x = x.dtype, x.float()
        # A process whose pictures are all damaged is lent one, which does not count.
        counted, each = float(share.weight > 0), x.shape[2] * x.shape[3]
        n = share.total * each
        mean = distributed.sum_over_batch(x.sum((0, 2, 3)) * counted) / n
        centred = x - mean[:, None, None]
        var = distributed.sum_over_batch(centred.square().sum((0, 2, 3)) * counted) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean), rate)
            self.running_var.lerp_((var * n / (n - 1)).to(self.running_var), rate)
        gain = (var + self.eps).rsqrt() * self.weight
        return (centred * gain[:, None, None] + self.bias[:, None, None]).to(kind)


class GroupNorm(nn.GroupNorm):
    """Group norm (Wu and He 2018) with a gradient that is quick also where a processor learns in bf16 from maps that
    have the channels of a pixel side by side. PyTorch's own takes 14 ms there for 4 maps of 64 x 64 and 64 channels,
    this one 3, where the convolution beside it takes 5 (one core with AMX)."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if (
            plain()  # first: who traces is not to see the rest
            and x.device.type == "cpu"
            and x.requires_grad
            and (x.dtype, self.weight.dtype) == (torch.bfloat16, torch.float32)
            and x.is_contiguous(memory_format=torch.channels_last)
            and not x.is_contiguous()
        ):
            return _ByPixel.apply(x, self.weight, self.bias, self.num_groups, self.eps)  # type: ignore[no-any-return]
        return super().forward(x)


class _ByPixel(torch.autograd.Function):
    """Group norm of maps in `torch.channels_last`, with the gradient in sums over pixels.

    With x^ = (x - m) r and means over a group, dx = r (g dy - mean(g dy) - x^ mean(g dy x^)): a sum of dy, x and 1 with
    a factor for each channel, and all that the factors need of the pixels is the sums of dy and of dy x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        b, c, h, w = x.shape
        y, mean, rstd = torch.native_group_norm(x, weight, bias, b, c, h * w, groups, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.eps = groups, eps
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, rstd = ctx.saved_tensors
        (b, c, h, w), groups = x.shape, ctx.groups
        if torch.is_grad_enabled():  # this gradient is to be derived in its turn, and mean and rstd are no functions
            wanted = [p for p, need in zip((x, weight, bias), ctx.needs_input_grad, strict=False) if need]
            y = F.group_norm(x, groups, weight, bias, ctx.eps)
            found = iter(torch.autograd.grad(y, wanted, dy, create_graph=True))
            return *(next(found) if need else None for need in ctx.needs_input_grad[:3]), None, None

        dx, dy = torch.empty_like(x), dy.contiguous(memory_format=torch.channels_last)
        maps = [t.permute(0, 2, 3, 1).view(b, h * w, c) for t in (dx, x, dy)]            # b n c
        gain, each = weight.view(1, groups, -1), h * w * (c // groups)
        d_weight, d_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        # In fp32, for what is rounded in a factor is wrong in every pixel; as many maps at a time as the cache holds.
        few = max(1, _SLAB // (h * w * c))
        for d, x, dy, m, r in zip(*(t.split(few) for t in (*maps, mean, rstd)), strict=True):
            (x, dy), (m, r) = (x.float(), dy.float()), (m.view(-1, groups, 1), r.view(-1, groups, 1))
            alone, along = (t.sum(1).view(-1, groups, c // groups) for t in (dy, dy * x))
            along = (along - m * alone) * r                                              # of dy x^
            by_x = -(gain * along).sum(2, keepdim=True) / each * r.square()              # b g 1
            by_one = -(gain * alone).sum(2, keepdim=True) / each * r - by_x * m
            by_x, by_one = (t.repeat_interleave(c // groups, 1).view(-1, 1, c) for t in (by_x, by_one))
            d.copy_(dy.mul_((r * gain).view(-1, 1, c)).addcmul_(x, by_x).add_(by_one))
            d_weight += along.sum(0).view(c)
            d_bias += alone.sum(0).view(c)
        return dx, d_weight, d_bias, None, None


_SLAB = 2**18  # numbers: a megabyte of fp32
