"""A second network that is trained against the first: the discriminator of a GAN."""

import math
from collections.abc import Callable
from typing import Any

from torch import Tensor

from triptych.network import Network
from triptych.training.configs.base import OptimConfig
from triptych.training.optim import clip, lr_at, make_optimizer, set_lr, update
from triptych.training.task import AdversaryInputs


class Adversary:
    """A network, its optimizer, and its loss on what the trained network has just made of a batch.

    Outside of `backward` its parameters require no gradient, so that the step of the trained network leaves none in
    them.

    Args:
        net: the network, on its device.
        optim: its optimizer and schedule.
        loss: returns the loss of `LossOutput.adversary_inputs`, and values for the log.
    """

    def __init__(
        self,
        net: Network,
        optim: OptimConfig,
        loss: Callable[[AdversaryInputs], tuple[Tensor, dict[str, Tensor]]],
    ):
        self.net, self.optim, self.loss = net, optim, loss
        self.optimizer = make_optimizer(net, optim)
        net.requires_grad_(False)
        self.has_gradient = False

    def backward(self, inputs: AdversaryInputs | None, weight: float, autocast: Any) -> dict[str, Tensor]:
        """Add the gradient of the loss times `weight`, and return values for the log. Without inputs, do nothing."""
        if inputs is None:
            return {}
        self.net.requires_grad_(True)
        try:
            with autocast():
                loss, logs = self.loss(inputs)
            (loss * weight).backward()
            self.has_gradient = True
        finally:
            self.net.requires_grad_(False)
        return logs

    def clip(self) -> tuple[dict[str, Tensor], list[tuple[str, Tensor]]]:
        """Clip the gradient if there is one. Return its norm for the log, and the norm of each parameter's."""
        if not self.has_gradient:
            return {}, []
        norm, norms = clip(self.net, self.optim.clip or math.inf)
        return {"adversary_grad_norm": norm}, norms

    def step(self, progress: float, skipped: Tensor) -> None:
        """Update the network if it has a gradient, and clear the gradient.

        Args:
            progress: fraction of the run that is done, which sets the learning rate.
            skipped: 1 leaves everything as it is, as in `optim.update`.
        """
        if self.has_gradient:
            set_lr(self.optimizer, lr_at(progress, self.optim))
            update(self.optimizer, skipped)
        self.has_gradient = False
        self.optimizer.zero_grad(set_to_none=True)
