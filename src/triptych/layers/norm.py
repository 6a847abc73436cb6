"""Batch norm that a batch of one does not stop."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class BatchNorm(nn.BatchNorm2d):
    """Batch norm (Ioffe and Szegedy 2015) which, in training, takes the running statistics where there is one value a
    channel: one image whose map, or whose pooled map, has one cell. It has no variance, and PyTorch's refuses it."""

    def forward(self, x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        if self.training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        return super().forward(x)
