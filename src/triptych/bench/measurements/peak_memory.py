"""Peak memory of a forward pass in fresh processes, as the operating system reports it."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.subprocesses import FinishedProcess, run_child
from triptych.bench.harness.timing import Spread, check_equal, ratio
from triptych.network import Network
from triptych.weights import export, save

log = logging.getLogger(__name__)


def memory(
    name: str,
    net: Network,
    folder: Path,
    peers: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    batch: int,
    dtypes: dict[str, torch.dtype],
    tolerances: dict[str, float],
    rounds: int = 2,
) -> Table:
    """Measure the first forward pass of `net` and of the same network of transformers, at each size and precision.

    Raises:
        UnequalError: their logits differ.
    """
    save(net, folder / "model.safetensors")
    sources = {"ours": folder / "model.safetensors"}
    if "transformers" in peers:
        export(net, folder / "hf", "hf")
        sources["transformers"] = folder / "hf"
    rows = []
    for (label, dtype), size in itertools.product(dtypes.items(), sizes):
        options = (str(dtype).removeprefix("torch."), *map(str, (batch, *size, torch.get_num_threads())))
        runs = {
            library: [run_child("peak_memory", library, source, *options) for _ in range(rounds)]
            for library, source in sources.items()
        }
        check_equal(
            {who: torch.tensor(done[0].reported["logits"]) for who, done in runs.items()}, tolerances[label]
        )
        rows.append({"dtype": label, "size": f"{size[0]} x {size[1]}", "batch": batch, **row(runs)})
        log.info("%s, %s, %d x %d: peak %s", name, label, *size, {who: rows[-1][who].median for who in runs})
    columns = [
        Column(key="dtype", heading="precision"),
        Column(key="size", heading="size"),
        Column(key="batch", heading="batch", form="d"),
    ]
    for what, unit in (("", "peak, GB"), ("grown ", "grown, GB")):
        columns += [Column(key=what + who, heading=f"{who} {unit}", form=".3f") for who in sources]
        if len(sources) > 1:
            columns.append(Column(key=what + "ratio", heading="ours / transformers", form=".2f"))
    description = (
        f"The first forward pass of {name} in a fresh process, eager: the peak of the process (VmHWM), and its growth "
        "over the memory before the pass, with all weights in memory. Logits are checked equal."
    )
    return Table(title="Memory", description=description, columns=columns, rows=rows)


def row(runs: dict[str, list[FinishedProcess]]) -> dict[str, Any]:
    """Return the peak and growth of each library in GB, and the ratios of ours to theirs."""
    values: dict[str, Any] = {}
    for what, value in (
        ("", lambda reported: reported["peak"] / 1e9),
        ("grown ", lambda reported: (reported["peak"] - reported["before"]) / 1e9),
    ):
        measured = {who: [value(done.reported) for done in all_of] for who, all_of in runs.items()}
        values |= {what + who: Spread.of(values) for who, values in measured.items()}
        for other in measured.keys() - {"ours"}:
            values[what + "ratio"] = ratio(measured["ours"], measured[other])
    return values
