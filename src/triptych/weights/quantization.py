"""Weights of a network's linear layers as 8-bit integers, through torchao."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterator
from typing import Any, Literal, TypeVar

from torch import nn

from triptych.errors import UserError
from triptych.network import Network

N = TypeVar("N", bound=Network)
Kind = Literal["int8", "int8-dynamic"]
KINDS = ("int8", "int8-dynamic")


def quantize(net: N, kind: Kind = "int8") -> N:
    """A copy of a network whose blocks' linear layers have integer weights, one scale a row (symmetric, 127 for the
    largest). Everything outside the blocks (embeddings, last norm, head), all norms and convolutions stay as they are;
    what stays is shared with `net`, which is left as it was.

    ```python
    pipe = tp.ClassificationPipeline(tp.quantize(tp.load("vit-b16.safetensors")))
    ```

    It saves memory: those weights take a quarter of fp32's, half of bf16's; the shipped ViT 4 MB instead of 12, with
    the same top-1. It saves no time on processors (ViT-S/16, bf16, a Xeon with AMX: 1.4 of the time, "int8-dynamic"
    4.6; both compiled 4.3 and 1.7 of bf16 compiled), and was not measured on GPUs. `triptych bench int8` measures it
    where you are. Save `net`, and quantise what is loaded: a quantised network is not written.

    Args:
        net: in the precision that it is to compute in, bf16 or fp32.
        kind: "int8" keeps weights as integers and multiplies in the network's precision; "int8-dynamic" makes
            integers of activations too, row by row as they come, and multiplies integers (Dettmers et al. 2022, Section
            2, without the outliers' way).

    Raises:
        UserError: another kind, torchao is not installed, or the blocks have no linear layers.
    """
    if kind not in KINDS:
        raise UserError(f"kind is {kind!r}, which must be one of {', '.join(KINDS)}")
    with quiet():
        try:
            from torchao import quantization as ao  # type: ignore[import-not-found]
        except ImportError as problem:
            raise UserError(
                "integer weights need torchao, which is not installed: pip install 'triptych[int8]'"
            ) from problem
        how = ao.Int8WeightOnlyConfig() if kind == "int8" else ao.Int8DynamicActivationInt8WeightConfig()
        memo: dict[int, Any] = {id(p): p for p in net.parameters()}
        made = copy.deepcopy(net, memo)
        layers = {id(part): part for block in made.blocks() for part in block.modules() if plain_linear(part)}
        if not layers:
            raise UserError(f"the blocks of a {type(net).__name__} have no linear layers to quantise")
        for layer in layers.values():
            ao.quantize_(layer, how)
    return made.eval().requires_grad_(False)


def plain_linear(part: nn.Module) -> bool:
    """Whether it is a linear layer whose weight is nobody's but its own."""
    return type(part) is nn.Linear


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Nobody's warnings: as it is imported torchao says which of its CUDA libraries it could not load."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
