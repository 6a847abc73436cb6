"""Loading a network from a file: seconds, and memory as the operating system reports it."""

import logging
from pathlib import Path
from typing import Any

import torch

from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.subprocesses import FinishedProcess, run_child
from triptych.bench.harness.timing import Spread, check_equal, interleave, ratio
from triptych.metrics.cost import count_parameters
from triptych.models.vit import ViT
from triptych.weights import export, save

log = logging.getLogger(__name__)


def loading(
    name: str, net: ViT, folder: Path, peers: tuple[str, ...], rounds: int, patience: float = 0.0
) -> Table:
    """Load `net` from a file of ours, and the same weights with transformers, each in a fresh process.

    Raises:
        UnequalError: the loaded networks give different logits.
    """
    weights = count_parameters(net) * next(net.parameters()).element_size()
    size = [str(side) for side in net.config.image_size]
    file = folder / "model.safetensors"
    save(net, file)
    sources = {"ours": file}
    if "transformers" in peers:
        export(net, folder / "hf", "hf")
        sources["transformers"] = folder / "hf"
    sides = {
        library: (lambda library=library, source=source: run_child("load_time", library, source, *size))
        for library, source in sources.items()
    }
    runs = interleave(sides, rounds, warmup=min(rounds - 1, 1), patience=patience).measurements
    check_equal({who: torch.tensor(done[0].reported["logits"]) for who, done in runs.items()}, 1e-5)
    rows = [
        row(what, key, runs) for what, key in (("load, s", "load"), ("load and first image, s", "result"))
    ]
    rows.append(memory_row("peak memory, GB", runs, lambda reported: reported["peak"] / 1e9))
    rows.append(
        memory_row(
            "its growth / weights", runs, lambda reported: (reported["peak"] - reported["before"]) / weights
        )
    )
    for line in rows:
        log.info(
            "%s of %s: %s", line["what"], name, ", ".join(f"{who} {line[who].median:.3g}" for who in runs)
        )
    columns = [Column(key="what", heading=f"{name}, fp32, {weights / 1e6:.0f} MB")]
    columns += [Column(key=who, heading=who, form=".3g") for who in runs]
    if len(runs) > 1:
        columns.append(Column(key="ratio", heading="ours / transformers", form=".2f"))
    description = (
        "Our network is loaded from a .safetensors file, that of transformers from its folder with the same weights, "
        "in fresh processes that have imported torch and the library, with files in the operating system's cache. "
        "Memory is the peak of the process (VmHWM) after the first image, when all weights have been used; its growth "
        "is relative to the memory before loading."
    )
    return Table(title="Loading", description=description, columns=columns, rows=rows)


def row(what: str, key: str, runs: dict[str, list[FinishedProcess]]) -> dict[str, Any]:
    """Return a row with a value that each library's programs reported, and the ratio of ours to the other."""
    return memory_row(what, runs, lambda reported: reported[key])


def memory_row(what: str, runs: dict[str, list[FinishedProcess]], value: Any) -> dict[str, Any]:
    """Return a row with a value computed from the reports of each library's programs, and the ratio of ours to the
    other."""
    measured = {who: [value(done.reported) for done in all_of] for who, all_of in runs.items()}
    values: dict[str, Any] = {"what": what, **{who: Spread.of(values) for who, values in measured.items()}}
    for other in measured.keys() - {"ours"}:
        values["ratio"] = ratio(measured["ours"], measured[other])
    return values
