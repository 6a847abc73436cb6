"""Compare attention implementations in bf16 on a CPU with the fused kernel that the layers use: what another one, or a
faster exponential function, could save."""

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triptych.bench.harness.forward import TOLERANCES, Effort, in_turn
from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.timing import check_equal
from triptych.kernels.attention import blocked_attention, explicit_attention

log = logging.getLogger(__name__)

Shape = tuple[int, int, int, int]  # number of images or windows, heads, tokens, head dimension

SHAPES: dict[str, Shape] = {
    "Stable Diffusion 1, 64 x 64, two latents": (2, 8, 4096, 40),
    "the same, 32 x 32": (2, 8, 1024, 80),
    "vit-b16, 224 px, 8 images": (8, 12, 197, 64),
    "swin-t's first windows, 8 images": (512, 3, 49, 32),
}
IMPLEMENTATIONS = {
    "plain": "product, softmax, product",
    "slabs": "the same, in the cache",
    "flex": "flex, compiled",
}


@torch.inference_mode()
def attending(shapes: dict[str, Shape], compiled: bool, effort: Effort) -> Table:
    """Measure the milliseconds of the fused kernel, and relative to it the other implementations and the softmax alone.

    Raises:
        UnequalError: two implementations return different results.
    """
    implementations = {key: heading for key, heading in IMPLEMENTATIONS.items() if compiled or key != "flex"}
    table = Table(
        title="Attention implementations",
        description=(
            "Self-attention in bf16, without a bias; queries, keys and values are views of one tensor, as a single "
            "projection returns them. Times are relative to PyTorch's fused kernel: attention as product, softmax and "
            "product, for all rows at once or for as many at a time as keep their logits in the cache; and "
            "`flex_attention`, compiled. The last column is PyTorch's softmax of the same number of logits alone: "
            "where it is near 1 or above, no exponential function in PyTorch makes attention faster. Outputs are "
            "checked equal."
        ),
        columns=[
            Column(key="what", heading="attention"),
            Column(key="tokens", heading="tokens", form="d"),
            Column(key="width", heading="width", form="d"),
            Column(key="ours", heading="fused, ms", form=".3g"),
            *(
                Column(key=key, heading=f"{heading} / fused", form=".2f")
                for key, heading in implementations.items()
            ),
            Column(key="softmax", heading="softmax / fused", form=".2f"),
            Column(key="others", heading="used by others", form=".0%"),
        ],
    )
    for what, shape in shapes.items():
        q, k, v = drawn(shape)
        sides: dict[str, Callable[[], Tensor]] = {
            "ours": lambda q=q, k=k, v=v: F.scaled_dot_product_attention(q, k, v),
            "plain": lambda q=q, k=k, v=v: explicit_attention(q, k, v),
            "slabs": lambda q=q, k=k, v=v: blocked_attention(q, k, v),
        }
        if compiled:
            flex = compiled_flex()
            sides["flex"] = lambda q=q, k=k, v=v, flex=flex: flex(q, k, v)
        check_equal({name: side() for name, side in sides.items()}, TOLERANCES["bf16"])
        logits = torch.randn(4096, shape[2]).bfloat16()  # few enough to stay in the cache
        times = shape[0] * shape[1] * shape[2] / len(logits)
        sides["softmax"] = lambda logits=logits: logits.softmax(-1)
        result = in_turn(sides, effort)
        row: dict[str, Any] = {
            "what": what,
            "tokens": shape[2],
            "width": shape[3],
            "others": result["others"],
        }
        row["ours"] = result["ours"].scaled(1000)
        row |= {key: result[f"ratio to {key}"].inverted() for key in implementations}
        row["softmax"] = result["ratio to softmax"].inverted().scaled(times)
        table.rows.append(row)
        log.info("%s: fused %.3g ms", what, row["ours"].median)
    if compiled:
        torch.compiler.reset()
    return table


def drawn(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """Return random queries, keys and values, as views of one tensor."""
    b, heads, n, d = shape
    qkv = torch.randn(b, n, 3, heads, d, generator=torch.Generator().manual_seed(0)).bfloat16()
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    return q, k, v


def compiled_flex() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return a freshly compiled `flex_attention`. Compiled code of another size would make it dynamic, and slow."""
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    compiled: Any = torch.compile(flex_attention)
    return compiled
