"""A training step in a plain loop, for our network and for the same network of another library.

Only PyTorch is imported until a network is built, so that programs of other libraries do not load our package.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KL = 1e-6  # weight of the KL term, as in the paper
CLIP = 1.0  # gradient clipping norm


class TrainingStep:
    """A network, its loss on fixed inputs, and fused AdamW. Each call runs a training step.

    Args:
        net: the network, in fp32.
        loss: returns the loss of the network on its inputs.
        dtype: dtype of autocast; fp32 turns it off.
    """

    def __init__(self, net: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype):
        self.net, self.loss, self.dtype = net.train(), loss, dtype
        self.trainable = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=1e-4, fused=True)

    def __call__(self) -> Tensor:
        """Run a step; return the loss and the norm of the gradient."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.trainable, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach().float(), norm])


def training_step(
    what: str, who: str, folder: str | Path, size: tuple[int, ...], dtype: torch.dtype
) -> TrainingStep:
    """Create the training step of a task.

    Args:
        what: "unet", "autoencoder" or "classifier".
        who: "ours" or the name of another library.
        folder: holds our model.safetensors, and a folder with the same weights for each other library.
        size: (batch, tokens, width of a token) for the UNet, (batch, pixels) for the others.
        dtype: dtype of autocast; fp32 turns it off.
    """
    torch.manual_seed(0)
    return {"unet": _unet, "autoencoder": _autoencoder, "classifier": _classifier}[what](
        who, Path(folder), size, dtype
    )


def _unet(who: str, folder: Path, size: tuple[int, ...], dtype: torch.dtype) -> TrainingStep:
    """Predict the noise in latents, conditioned on the tokens of a prompt; mean squared error."""
    net = _part(who, folder, "unet")
    (batch, tokens, width), ours = size, who == "ours"
    side = net.config.latent_size if ours else (net.config.sample_size,) * 2
    x, noise = (torch.randn(batch, net.config.in_channels, *side) for _ in range(2))
    t, context = torch.randint(1000, (batch,)), torch.randn(batch, tokens, width)

    def loss() -> Tensor:
        output = net(x, t, context)
        return F.mse_loss((output if ours else output.sample).float(), noise)

    return TrainingStep(net, loss, dtype)


def _autoencoder(who: str, folder: Path, size: tuple[int, ...], dtype: torch.dtype) -> TrainingStep:
    """Encode, sample from the posterior, decode; L1 loss and KL divergence from a standard normal."""
    net = _part(who, folder, "vae")
    batch, pixels = size
    images = torch.rand(batch, 3, pixels, pixels) * 2 - 1

    def loss() -> Tensor:
        if who == "ours":
            mean, logvar = net.posterior(images)
        else:
            posterior = net.encode(images).latent_dist
            mean, logvar = posterior.mean, posterior.logvar
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1), dtype=mean.dtype)
        z = mean + torch.exp(0.5 * logvar) * noise
        output = net.render(z) if who == "ours" else net.decode(z).sample
        mean, logvar = mean.float(), logvar.float()
        bound = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()
        return F.l1_loss(output.float(), images) + KL * bound

    return TrainingStep(net, loss, dtype)


def _classifier(who: str, folder: Path, size: tuple[int, ...], dtype: torch.dtype) -> TrainingStep:
    """Classify; cross-entropy loss."""
    batch, pixels = size
    images = torch.randn(batch, 3, pixels, pixels)
    net, forward = _named_classifier(who, folder)
    with torch.no_grad():
        classes = forward(images[:1]).shape[1]
    labels = torch.randint(classes, (batch,))
    return TrainingStep(net, lambda: F.cross_entropy(forward(images).float(), labels), dtype)


# Readers may initialize networks at random before they load weights; the random inputs must not depend on that.
_undrawn = torch.random.fork_rng(devices=[])


@_undrawn
def _part(who: str, folder: Path, part: str) -> Any:
    """Load the UNet or the autoencoder of a latent diffusion model."""
    if who != "ours":
        from triptych.bench.peers.readers import diffusers_part

        return diffusers_part(folder / "diffusers", part, torch.float32)
    net = _ours(folder)
    return net.network if part == "unet" else net.autoencoder


@_undrawn
def _named_classifier(who: str, folder: Path) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    if who == "transformers":
        from triptych.bench.peers.readers import transformers_network

        theirs = transformers_network(folder / "hf", torch.float32)
        return theirs, lambda images: theirs(images).logits
    if who == "timm":
        from triptych.bench.peers.readers import timm_network

        net = timm_network(folder / "timm", torch.float32)
    else:
        net = _ours(folder)
    return net, net


def _ours(folder: Path) -> Any:
    from triptych.weights import load

    return load(folder / "model.safetensors").float()
