"""8-bit integer weights for the linear layers of a network, through torchao."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from torch import nn

from triptych.errors import ConfigError
from triptych.network import Network

N = TypeVar("N", bound=Network)
Scheme = Literal["int8", "int8-dynamic"]
SCHEMES = ("int8", "int8-dynamic")


def quantize(net: N, scheme: Scheme = "int8") -> N:
    """Return a copy of a network whose linear layers in blocks have 8-bit integer weights.

    Quantization is symmetric with one scale for each row. Everything outside the blocks (embeddings, last norm,
    head), all norms and all convolutions are unchanged and shared with `net`, which is not modified.

    ```python
    pipe = tp.ClassificationPipeline(tp.quantize(tp.load("vit-b16.safetensors")))
    ```

    It saves memory: these weights take a quarter of the space of fp32, half of bf16; the shipped ViT 4 MB instead of
    12, with the same top-1. It saves no time on CPUs (ViT-S/16, bf16, a Xeon with AMX: 1.4 of the time,
    "int8-dynamic" 4.6; both compiled 4.3 and 1.7 of bf16 compiled), and was not measured on GPUs. `triptych bench
    int8` measures it on your machine. A quantized network cannot be saved: save `net`, and quantize it after loading.

    Args:
        net: in the precision to compute in, bf16 or fp32.
        scheme: "int8" stores integer weights and multiplies in the network's precision; "int8-dynamic" also quantizes
            the activations, row by row, and multiplies integers (Dettmers et al. 2022, Section 2, without the
            decomposition of outliers).

    Raises:
        ConfigError: an unknown scheme, torchao is not installed, or the blocks have no linear layers.
    """
    if scheme not in SCHEMES:
        raise ConfigError(f"scheme is {scheme!r}, which must be one of {', '.join(SCHEMES)}")
    with silenced():
        try:
            from torchao import quantization as ao  # type: ignore[import-not-found]
        except ImportError as problem:
            raise ConfigError(
                "integer weights need torchao, which is not installed: pip install 'triptych[int8]'"
            ) from problem
        ao_config = (
            ao.Int8WeightOnlyConfig() if scheme == "int8" else ao.Int8DynamicActivationInt8WeightConfig()
        )
        memo: dict[int, Any] = {id(p): p for p in net.parameters()}
        quantized = copy.deepcopy(net, memo)
        layers = {
            id(part): part for block in quantized.blocks() for part in block.modules() if plain_linear(part)
        }
        if not layers:
            raise ConfigError(f"the blocks of a {type(net).__name__} have no linear layers to quantize")
        for layer in layers.values():
            ao.quantize_(layer, ao_config)
    return quantized.eval().requires_grad_(False)


def plain_linear(part: nn.Module) -> bool:
    """Return whether a module is an nn.Linear itself, not a subclass whose weight may be used otherwise."""
    return type(part) is nn.Linear


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Suppress all warnings and logging: on import torchao reports the CUDA libraries that it could not load."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
