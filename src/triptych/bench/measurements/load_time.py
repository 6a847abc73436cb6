"""From a file to a network: seconds, and memory by the operating system's account."""

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
    runs = interleave(sides, rounds, warmup=min(rounds - 1, 1), patience=patience).found
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
    for found in rows:
        log.info(
            "%s of %s: %s", found["what"], name, ", ".join(f"{who} {found[who].median:.3g}" for who in runs)
        )
    columns = [Column(key="what", heading=f"{name}, fp32, {weights / 1e6:.0f} MB")]
    columns += [Column(key=who, heading=who, form=".3g") for who in runs]
    if len(runs) > 1:
        columns.append(Column(key="ratio", heading="ours / transformers", form=".2f"))
    description = (
        "From a .safetensors of ours, and from transformers' folder of the same weights; fresh processes, torch and "
        "the library imported before the clock starts, the files in the system's cache. Memory is the process's peak "
        "(VmHWM) after the first image, when every weight has been used; its growth counts from what was resident "
        "before loading."
    )
    return Table(title="Loading", description=description, columns=columns, rows=rows)


def row(what: str, key: str, runs: dict[str, list[FinishedProcess]]) -> dict[str, Any]:
    """What every side's programs said under a key, and ours over the other's."""
    return memory_row(what, runs, lambda reported: reported[key])


def memory_row(what: str, runs: dict[str, list[FinishedProcess]], value: Any) -> dict[str, Any]:
    """What is computed of what every side's programs said, and ours over the other's."""
    found = {who: [value(done.reported) for done in all_of] for who, all_of in runs.items()}
    values: dict[str, Any] = {"what": what, **{who: Spread.of(values) for who, values in found.items()}}
    for other in found.keys() - {"ours"}:
        values["ratio"] = ratio(found["ours"], found[other])
    return values
