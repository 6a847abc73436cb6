"""Peak memory of a forward pass by the operating system's account, in fresh processes."""

import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.subprocesses import Process, python
from triptych.bench.harness.timing import Spread, check_equal, ratio
from triptych.network import Network
from triptych.weights import export, save

log = logging.getLogger(__name__)

# Weights are brought to their precision before the account is opened, so that what grows is the pass's own.
MEASURE = """
import torch
{imports}
source, dtype, batch, height, width, threads = sys.argv[1], getattr(torch, sys.argv[2]), *map(int, sys.argv[3:])
torch.set_num_threads(threads)
torch.manual_seed(1)
images = torch.randn(batch, 3, height, width).to(dtype)
net = {load}.to(dtype)
with torch.inference_mode():
    sum(float(p.sum()) for p in net.parameters())
    forget_peak()
    before = memory()[0]
    logits = {forward}
say(before=before, peak=memory()[1], logits=logits.float().flatten().tolist())
"""
OURS = MEASURE.format(imports="from triptych.weights import load", load="load(source)", forward="net(images)")
THEIRS = MEASURE.format(
    imports="from transformers import AutoModelForImageClassification as Auto",
    load="Auto.from_pretrained(source, attn_implementation='sdpa').eval()",
    forward="net(images).logits",
)


def memory(
    name: str,
    net: Network,
    folder: Path,
    there: Sequence[str],
    sizes: Sequence[tuple[int, int]],
    batch: int,
    dtypes: dict[str, torch.dtype],
    tolerances: dict[str, float],
    rounds: int = 2,
) -> Table:
    """The first forward pass of `net` and of the same in transformers, at each size and in each precision.

    Raises:
        UnequalError: they give different logits.
    """
    save(net, folder / "model.safetensors")
    programs: dict[str, tuple[str, Path]] = {"ours": (OURS, folder / "model.safetensors")}
    if "transformers" in there:
        export(net, folder / "hf", "hf")
        programs["transformers"] = (THEIRS, folder / "hf")
    rows = []
    for (label, dtype), size in itertools.product(dtypes.items(), sizes):
        asked = (str(dtype).removeprefix("torch."), *map(str, (batch, *size, torch.get_num_threads())))
        runs = {
            who: [python(code, path, *asked) for _ in range(rounds)] for who, (code, path) in programs.items()
        }
        check_equal(
            {who: torch.tensor(done[0].said["logits"]) for who, done in runs.items()}, tolerances[label]
        )
        rows.append({"dtype": label, "size": f"{size[0]} x {size[1]}", "batch": batch, **row(runs)})
        log.info("%s, %s, %d x %d: peak %s", name, label, *size, {who: rows[-1][who].median for who in runs})
    columns = [
        Column(key="dtype", heading="precision"),
        Column(key="size", heading="size"),
        Column(key="batch", heading="batch", form="d"),
    ]
    for what, unit in (("", "peak, GB"), ("grown ", "grown, GB")):
        columns += [Column(key=what + who, heading=f"{who} {unit}", form=".3f") for who in programs]
        if len(programs) > 1:
            columns.append(Column(key=what + "ratio", heading="ours / transformers", form=".2f"))
    says = (
        f"The first forward pass of {name} in a fresh process, eager: the process's peak (VmHWM), and how far above "
        "what was resident before the pass, with all weights in memory. Logits checked equal."
    )
    return Table(title="Memory", says=says, columns=columns, rows=rows)


def row(runs: dict[str, list[Process]]) -> dict[str, Any]:
    """Peaks and growth of each side, in GB, and ours over theirs."""
    made: dict[str, Any] = {}
    for what, value in (
        ("", lambda said: said["peak"] / 1e9),
        ("grown ", lambda said: (said["peak"] - said["before"]) / 1e9),
    ):
        found = {who: [value(done.said) for done in all_of] for who, all_of in runs.items()}
        made |= {what + who: Spread.of(values) for who, values in found.items()}
        for other in found.keys() - {"ours"}:
            made[what + "ratio"] = ratio(found["ours"], found[other])
    return made
