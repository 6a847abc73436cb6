"""Images per second of a classifier, eager or compiled, compared with the same network of other libraries."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from triptych.bench.harness.forward import TOLERANCES, Effort, Forward, compare, comparison_columns, frozen
from triptych.bench.harness.report import Column, Table
from triptych.layers.resnet import packed
from triptych.network import Network

log = logging.getLogger(__name__)


def throughput_table(description: str, subject: Column, peers: Sequence[str]) -> Table:
    """Create a table without rows.

    Args:
        description: what is measured, and how.
        subject: column that distinguishes rows with the same mode, precision and batch size.
        peers: names of the other libraries.
    """
    return Table(
        title="Images per second",
        description=description,
        columns=[
            Column(key="mode", heading="mode"),
            subject,
            Column(key="dtype", heading="precision"),
            Column(key="batch", heading="batch", form="d"),
            *comparison_columns(tuple(peers)),
        ],
    )


def throughput_rows(
    net: Network,
    peers: Mapping[str, Forward],
    inputs: Iterable[Tensor],
    macs: int,
    subject: Mapping[str, str],
    dtype: str,
    peaks: Mapping[str, float],
    effort: Effort,
    compiled: bool,
) -> list[dict[str, Any]]:
    """Measure rows of `throughput_table`, one for each batch of images in `inputs`.

    Args:
        net: our network, in the precision `dtype`.
        peers: the same network of the other libraries, in that precision.
        macs: multiply-accumulate operations of one image.
        subject: key and value of the column `subject`.
        dtype: "fp32" or "bf16".
        peaks: peak FLOP/s of the machine, by precision.

    Raises:
        UnequalError: the outputs differ by more than rounding.
    """
    rows = []
    sides: dict[str, Forward] = {"ours": net, **peers}
    for images in inputs:
        with frozen() if compiled else packed(net):
            forwards = {name: torch.compile(side) for name, side in sides.items()} if compiled else sides
            row = compare(forwards, images, TOLERANCES[dtype], effort)
        row |= {"mode": "compiled" if compiled else "eager", **subject, "dtype": dtype, "batch": len(images)}
        row["utilization"] = 2 * macs * row["ours"].median / peaks[dtype]
        rows.append(row)
        speeds = ", ".join(f"{name} {row[name].median:.3g}" for name in sides)
        log.info(
            "%s, %s, %s, batch %d: images/s %s",
            row["mode"],
            *subject.values(),
            dtype,
            len(images),
            speeds,
        )
    return rows


def random_images(net: Network, size: Sequence[int], batch: int, dtype: torch.dtype) -> Tensor:
    """Return standard normal values (batch, channels, height, width), the same at each call."""
    shape = (batch, net.config.in_channels, *size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
