"""Batch norm that a batch of one does not stop, and whose batch may be shared by several processes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych import shares


class BatchNorm(nn.BatchNorm2d):
    """Batch norm (Ioffe and Szegedy 2015) which, in training, takes the running statistics where there is one value a
    channel: one image whose map, or whose pooled map, has one cell. It has no variance, and PyTorch's refuses it.

    Of a batch that is shared (`triptych.shares`) mean and variance are those of all of it, in fp32; PyTorch's own
    SyncBatchNorm does so on CUDA alone."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        share = shares.current() if self.training else None
        whole = x.shape[0] if share is None else share.whole
        if self.training and whole * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x) if share is None else self._shared(x, share)

    def _shared(self, x: Float[Tensor, "b c h w"], share: shares.Share) -> Float[Tensor, "b c h w"]:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        kind, x = x.dtype, x.float()
        # A process whose pictures are all damaged is lent one, which does not count.
        counted, each = float(share.weight > 0), x.shape[2] * x.shape[3]
        n = share.whole * each
        mean = shares.summed(x.sum((0, 2, 3)) * counted) / n
        centred = x - mean[:, None, None]
        var = shares.summed(centred.square().sum((0, 2, 3)) * counted) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            rate = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean), rate)
            self.running_var.lerp_((var * n / (n - 1)).to(self.running_var), rate)
        gain = (var + self.eps).rsqrt() * self.weight
        return (centred * gain[:, None, None] + self.bias[:, None, None]).to(kind)
