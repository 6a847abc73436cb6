"""One training step in a plain loop, the same for a network of ours and for the same network of a peer.

It imports no more than PyTorch until a side is built, so that a peer's program carries nothing of ours along.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KL = 1e-6  # weight of the bound on the latents, as published
CLIP = 1.0  # norm that the gradient is clipped to


class Learner:
    """A network, its loss on inputs that stay the same, and fused AdamW. A call is a step.

    Args:
        net: in fp32.
        loss: of the network on its inputs.
        dtype: what autocast computes products in; fp32 is without it.
    """

    def __init__(self, net: nn.Module, loss: Callable[[], Tensor], dtype: torch.dtype):
        self.net, self.loss, self.dtype = net.train(), loss, dtype
        self.learning = [p for p in net.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-4, fused=True)

    def __call__(self) -> Tensor:
        """The loss, and the norm of its gradient."""
        with torch.autocast("cpu", self.dtype, enabled=self.dtype != torch.float32):
            loss = self.loss()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.learning, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return torch.stack([loss.detach().float(), norm])


def learner(what: str, who: str, folder: str | Path, size: tuple[int, ...], dtype: torch.dtype) -> Learner:
    """The side `who` ("ours" or a peer) of a task, with the weights in `folder` and inputs of `size`.

    Args:
        what: "unet", inputs (batch, tokens, width of a token); "autoencoder" or "classifier", inputs (batch, pixels).
        folder: has model.safetensors of ours, and beside it the peer's folder of the same weights.
    """
    torch.manual_seed(0)
    return {"unet": _unet, "autoencoder": _autoencoder, "classifier": _classifier}[what](
        who, Path(folder), size, dtype
    )


def _unet(who: str, folder: Path, size: tuple[int, ...], dtype: torch.dtype) -> Learner:
    """The noise in latents, foretold beside the tokens of a prompt."""
    net = _part(who, folder, "unet")
    (batch, tokens, width), ours = size, who == "ours"
    side = net.config.latent_size if ours else (net.config.sample_size,) * 2
    x, noise = (torch.randn(batch, net.config.in_channels, *side) for _ in range(2))
    t, context = torch.randint(1000, (batch,)), torch.randn(batch, tokens, width)

    def loss() -> Tensor:
        output = net(x, t, context)
        return F.mse_loss((output if ours else output.sample).float(), noise)

    return Learner(net, loss, dtype)


def _autoencoder(who: str, folder: Path, size: tuple[int, ...], dtype: torch.dtype) -> Learner:
    """Encode, draw from the posterior, decode: L1, and the divergence from a standard normal."""
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

    return Learner(net, loss, dtype)


def _classifier(who: str, folder: Path, size: tuple[int, ...], dtype: torch.dtype) -> Learner:
    """Cross entropy of classes."""
    batch, pixels = size
    images = torch.randn(batch, 3, pixels, pixels)
    net, forward = _named_classifier(who, folder)
    with torch.no_grad():
        classes = forward(images[:1]).shape[1]
    labels = torch.randint(classes, (batch,))
    return Learner(net, lambda: F.cross_entropy(forward(images).float(), labels), dtype)


# Readers may fill networks with random numbers before they load them; the inputs are the same on all sides nonetheless.
_undrawn = torch.random.fork_rng(devices=[])


@_undrawn
def _part(who: str, folder: Path, part: str) -> Any:
    """The UNet or the autoencoder of a latent diffusion model."""
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
