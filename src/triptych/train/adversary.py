"""A second network that learns against the first: a GAN's discriminator."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from triptych.network import Network
from triptych.train.configs.base import OptimConfig
from triptych.train.optim import clip, lr_at, make_optimizer, set_lr, update

Batch = dict[str, Any]


class Adversary:
    """A network, its optimiser, and its loss on a batch that the first network's loss has just been taken of.

    Outside of `learn` its parameters want no gradient, so that the first network's step leaves none there.

    Args:
        net: on its device.
        loss: of what the task left in the batch, detached from the first network; none while it does not take part.
    """

    def __init__(
        self,
        net: Network,
        optim: OptimConfig,
        loss: Callable[[Batch], tuple[Tensor | None, dict[str, Tensor]]],
    ):
        self.net, self.optim, self.loss = net, optim, loss
        self.optimizer = make_optimizer(net, optim)
        net.requires_grad_(False)
        self.learnt = False

    def backward(self, batch: Batch, share: float, autocast: Any) -> dict[str, Tensor]:
        """Add the gradient of its loss on a batch, times `share`, and say what to log."""
        self.net.requires_grad_(True)
        try:
            with autocast():
                loss, logs = self.loss(batch)
            if loss is not None:
                (loss * share).backward()
                self.learnt = True
        finally:
            self.net.requires_grad_(False)
        return logs

    def clip(self) -> tuple[dict[str, Tensor], list[tuple[str, Tensor]]]:
        """Clip the gradient, if it learnt since the last time, and say its norm, and that of each parameter."""
        if not self.learnt:
            return {}, []
        norm, each = clip(self.net, self.optim.clip or math.inf)
        return {"opponent_grad_norm": norm}, each

    def step(self, progress: float, skipped: Tensor) -> None:
        """Update it at a share of the run, if it learnt since the last time, unless `skipped` (as in `optim.update`) is
        1; and forget the gradient."""
        if self.learnt:
            set_lr(self.optimizer, lr_at(progress, self.optim))
            update(self.optimizer, skipped)
        self.learnt = False
        self.optimizer.zero_grad(set_to_none=True)
