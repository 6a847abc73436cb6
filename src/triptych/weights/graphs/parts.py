"""The graphs of a network: a module of tensors to tensors each, with names and shapes of its inputs."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.models.autoencoder import FirstStage
from triptych.models.convnet import ConvNet
from triptych.models.dit import DiT
from triptych.models.image_tokens import ImageTokens
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.text import ClassToken, TextEncoder
from triptych.models.unet import UNet
from triptych.network import Network

Axis = Literal["batch", "height", "width", "tokens"]


@dataclass(frozen=True)
class GraphInput:
    """An input of a graph."""

    shape: tuple[int, ...]
    """Of one example, without the batch."""
    axes: dict[int, Axis] = field(default_factory=dict)
    """Axes that another size may have, besides the batch, which is axis 0."""
    multiple: int = 1
    """Height and width must be multiples of this."""
    below: int | None = None
    """The input is int64 numbers from 0 to this; None for fp32."""

    def example(self, batch: int, sizes: dict[str, int] | None = None) -> Tensor:
        """Return random values.

        Args:
            sizes: other sizes by axis.
        """
        shape = [batch, *self.shape]
        for axis, name in self.axes.items():
            shape[axis] = (sizes or {}).get(name, shape[axis])
        generator = torch.Generator().manual_seed(0)
        if self.below is not None:
            return torch.randint(self.below, shape, generator=generator)
        return torch.randn(shape, generator=generator)

    def other_sizes(self) -> dict[str, int]:
        """Return other sizes, to check a graph at: about half of height and width, one and a half of the tokens."""
        half = {
            name: (self.shape[axis - 1] // 2 // self.multiple + 1) * self.multiple
            for axis, name in self.axes.items()
        }
        return half | {name: size * 3 for name, size in half.items() if name == "tokens"}


@dataclass(frozen=True)
class Graph:
    """A part of a network that is exported as one graph."""

    name: str
    """The name of its file in a folder."""
    module: nn.Module
    inputs: dict[str, GraphInput]
    output: str
    """Name of the output; further ones are NAME_1, NAME_2, ..."""

    def examples(self, batch: int, sizes: dict[str, int] | None = None) -> tuple[Tensor, ...]:
        return tuple(item.example(batch, sizes) for item in self.inputs.values())

    def other_sizes(self) -> dict[str, int]:
        """Return the other sizes of all inputs."""
        return {name: size for item in self.inputs.values() for name, size in item.other_sizes().items()}


class Method(nn.Module):
    """A method of a network, or a function of it, as a module."""

    def __init__(self, net: nn.Module, call: Callable[..., Any]):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)


class Denoising(nn.Module):
    """A denoising network whose optional inputs are given by name, in order."""

    def __init__(self, net: nn.Module, names: tuple[str, ...]):
        super().__init__()
        self.net, self.names = net, names

    def forward(self, x: Tensor, t: Tensor, *more: Tensor) -> Tensor:
        return self.net(x, t, **dict(zip(self.names, more, strict=True)))


def graphs_of(net: Any, size: tuple[int, int] | None = None) -> list[Graph]:
    """Return the graphs of a network: one for most, encoder and decoder of an autoencoder, and those of all parts of a
    latent diffusion model.

    Args:
        net: a network of this package, in evaluation mode.
        size: height and width in pixels to export at; None is that of the model card.

    Raises:
        ConfigError: no network of this package, or a size that it does not take.
    """
    if not isinstance(net, Network):
        raise ConfigError(f"{type(net).__name__} has no graph to export; give a network of this package")
    if isinstance(net, LatentDiffusion):
        return _of_latent_diffusion(net, size or net.config.image_size)
    size = size or net.card.preprocess.size
    if isinstance(net, FirstStage):
        return [_encoder(net, size), _decoder(net, _latent_size(net, size))]
    if isinstance(net, TextEncoder):
        return [_text_encoder(net)]
    if isinstance(net, ClassToken):
        return [_class_token(net)]
    if isinstance(net, UNet | DiT):
        return [_network(net, net.config.latent_size, 77)]
    return [_of_images(net, size)]


def _of_images(net: Any, size: tuple[int, int]) -> Graph:
    """Return the graph of a backbone or a segmenter."""
    config = net.config
    images = {"images": _spatial(config.in_channels, size)}
    if getattr(config, "map_norms", False) or isinstance(net, ConvNet):
        return Graph("model", Method(net, net.features), images, "maps")
    return Graph("model", net, images, "logits" if getattr(config, "num_classes", 0) else "features")


def _of_latent_diffusion(ldm: LatentDiffusion, size: tuple[int, int]) -> list[Graph]:
    config, latent_size, tokens = ldm.config, _latent_size(ldm.autoencoder, size), 77
    _require_multiple(size, config.autoencoder.downsample_factor * _network_multiple(ldm.network))
    graphs = []
    if isinstance(ldm.text_encoder, TextEncoder):
        graphs, tokens = [_text_encoder(ldm.text_encoder)], ldm.text_encoder.config.max_length
    elif isinstance(ldm.text_encoder, ClassToken):
        graphs, tokens = [_class_token(ldm.text_encoder)], 1
    elif isinstance(ldm.text_encoder, ImageTokens):
        encoder = ldm.text_encoder
        graphs = [Graph("image_encoder", encoder, {"images": _spatial(3, size)}, "context")]
        tokens = encoder(torch.zeros(1, 3, *size)).shape[1]
    if config.semantic_map is not None:
        factor, read = config.autoencoder.downsample_factor, ldm.semantic_map
        assert read is not None
        classes = GraphInput(size, {1: "height", 2: "width"}, factor, config.semantic_map.num_classes)
        module = Method(read, lambda classes: read(classes, factor))
        graphs.append(Graph("semantic_map", module, {"classes": classes}, "concat"))
    network = _network(ldm.network, latent_size, tokens)
    return [*graphs, network, _encoder(ldm.autoencoder, size), _decoder(ldm.autoencoder, latent_size)]


def _network(net: Any, latent_size: tuple[int, int], tokens: int) -> Graph:
    config = net.config
    inputs = {
        "x": _spatial(config.in_channels, latent_size, _network_multiple(net)),
        "t": GraphInput(()),
    }
    if config.context_dim:
        inputs["context"] = GraphInput((tokens, config.context_dim), {1: "tokens"})
    if getattr(config, "vector_dim", 0):
        inputs["labels"] = GraphInput((config.vector_dim,))
    elif config.num_classes:
        inputs["labels"] = GraphInput((), below=config.num_classes)
    return Graph("network", Denoising(net, tuple(inputs)[2:]), inputs, "prediction")


def _network_multiple(net: Any) -> int:
    """Return what sides of latents must be multiples of: a UNet's deepest level must fit, since a graph cannot round
    odd sides in two ways."""
    return 2 ** (len(net.config.channel_multipliers) - 1) if isinstance(net, UNet) else 1


def _encoder(net: FirstStage, size: tuple[int, int]) -> Graph:
    images = _spatial(net.config.in_channels, size, net.config.downsample_factor)
    return Graph("encoder", Method(net, net.encode), {"images": images}, "latents")


def _decoder(net: FirstStage, latent_size: tuple[int, int]) -> Graph:
    latents = _spatial(net.config.latent_channels, latent_size)
    return Graph("decoder", Method(net, net.decode), {"latents": latents}, "images")


def _text_encoder(net: TextEncoder) -> Graph:
    ids = GraphInput((net.config.max_length,), below=net.config.vocab_size)
    return Graph("text_encoder", Method(net, net.encode_tokens), {"token_ids": ids}, "context")


def _class_token(net: ClassToken) -> Graph:
    labels = GraphInput((), below=net.classes.num_embeddings)
    return Graph("text_encoder", net, {"labels": labels}, "context")


def _spatial(channels: int, size: tuple[int, int], multiple: int = 1) -> GraphInput:
    _require_multiple(size, multiple)
    return GraphInput((channels, *size), {2: "height", 3: "width"}, multiple)


def _require_multiple(size: tuple[int, int], multiple: int) -> None:
    if any(side % multiple for side in size):
        near = " x ".join(str(max(multiple, math.ceil(side / multiple) * multiple)) for side in size)
        raise ConfigError(
            f"size is {size[0]} x {size[1]}, which must be multiples of {multiple}; give {near}"
        )


def _latent_size(net: FirstStage, size: tuple[int, int]) -> tuple[int, int]:
    factor = net.config.downsample_factor
    return max(1, size[0] // factor), max(1, size[1] // factor)
