"""Attention maps on request, from an unchanged network."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from triptych.layers.attention import AttentionModule


@contextmanager
def capture(net: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Collect the attention probabilities of every `AttentionModule` while the block runs.

    ```python
    with capture(net) as maps:
        net(images)
    maps["encoder.0.attn"]         # (B, heads, queries, keys), rows sum to 1, fp32, detached
    ```

    Window attention gives (B, windows, heads, queries, keys).

    Inside the block the explicit softmax replaces the fused kernel, which comes back afterwards, also when the block
    raises. Of a module that runs twice the last map is returned.
    """
    maps: dict[str, Tensor] = {}
    modules = [(name, part) for name, part in net.named_modules() if isinstance(part, AttentionModule)]
    try:
        for name, part in modules:
            part.tap = lambda weights, name=name: maps.__setitem__(name, weights.detach())
        yield maps
    finally:
        for _, part in modules:
            part.tap = None
