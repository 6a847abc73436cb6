"""Attention maps on request, from the network as it stands."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


@contextmanager
def capture(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the attention probabilities of every attention module while the block runs.

    ```python
    with capture(net) as maps:
        net(images)
    maps["encoder.0.attn"]         # (B, heads, queries, keys), rows sum to 1, fp32, detached
    ```

    An attention module is one that has a `tap`. That of a window gives (B, windows, heads, queries, keys).

    The fused kernel gives way to the explicit softmax inside the block and comes back after it, also when
    the block raises. A module that runs twice keeps its last map.
    """
    maps: dict[str, Tensor] = {}
    tapped = [(name, part) for name, part in net.named_modules() if hasattr(part, "tap")]
    try:
        for name, part in tapped:
            part.tap = lambda weights, name=name: maps.__setitem__(name, weights.detach())  # type: ignore[assignment]
        yield maps
    finally:
        for _, part in tapped:
            part.tap = None  # type: ignore[assignment]
