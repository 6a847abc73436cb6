"""From a file to a network: seconds, and memory by the operating system's account."""

import logging
from pathlib import Path
from typing import Any

import torch

from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.subprocesses import Process, python
from triptych.bench.harness.timing import Spread, check_equal, interleave, ratio
from triptych.metrics.cost import count_parameters
from triptych.models.vit import ViT
from triptych.weights import export, save

log = logging.getLogger(__name__)

# Every weight is used before memory is read: ours stay mapped to the file until then.
MEASURE = """
import torch
{imports}
source, height, width = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
image = torch.linspace(-1, 1, 3 * height * width).view(1, 3, height, width)
before, start = memory()[0], time.perf_counter()
net = {load}
loaded = time.perf_counter()
with torch.inference_mode():
    logits = {forward}
end = time.perf_counter()
say(load=loaded - start, result=end - start, before=before, peak=memory()[1], logits=logits[0].tolist())
"""
OURS = MEASURE.format(imports="from triptych.weights import load", load="load(source)", forward="net(image)")
THEIRS = MEASURE.format(
    imports="from transformers import ViTForImageClassification",
    load="ViTForImageClassification.from_pretrained(source).eval()",
    forward="net(image).logits",
)


def loading(
    name: str, net: ViT, folder: Path, there: tuple[str, ...], rounds: int, patience: float = 0.0
) -> Table:
    """Load `net` from a file of ours, and the same weights with transformers, each in a fresh process.

    Raises:
        UnequalError: the loaded networks give different logits.
    """
    weights = count_parameters(net) * next(net.parameters()).element_size()
    size = [str(side) for side in net.config.image_size]
    file = folder / "model.safetensors"
    save(net, file)
    programs: dict[str, tuple[str, Path]] = {"ours": (OURS, file)}
    if "transformers" in there:
        export(net, folder / "hf", "hf")
        programs["transformers"] = (THEIRS, folder / "hf")
    sides = {
        who: (lambda code=code, path=path: python(code, path, *size))
        for who, (code, path) in programs.items()
    }
    runs = interleave(sides, rounds, warmup=min(rounds - 1, 1), patience=patience).found
    check_equal({who: torch.tensor(done[0].said["logits"]) for who, done in runs.items()}, 1e-5)
    rows = [
        row(what, key, runs) for what, key in (("load, s", "load"), ("load and first image, s", "result"))
    ]
    rows.append(memory_row("peak memory, GB", runs, lambda said: said["peak"] / 1e9))
    rows.append(
        memory_row("its growth / weights", runs, lambda said: (said["peak"] - said["before"]) / weights)
    )
    for found in rows:
        log.info(
            "%s of %s: %s", found["what"], name, ", ".join(f"{who} {found[who].median:.3g}" for who in runs)
        )
    columns = [Column(key="what", heading=f"{name}, fp32, {weights / 1e6:.0f} MB")]
    columns += [Column(key=who, heading=who, form=".3g") for who in runs]
    if len(runs) > 1:
        columns.append(Column(key="ratio", heading="ours / transformers", form=".2f"))
    says = (
        "From a .safetensors of ours, and from transformers' folder of the same weights; fresh processes, torch and "
        "the library imported before the clock starts, the files in the system's cache. Memory is the process's peak "
        "(VmHWM) after the first image, when every weight has been used; its growth counts from what was resident "
        "before loading."
    )
    return Table(title="Loading", says=says, columns=columns, rows=rows)


def row(what: str, key: str, runs: dict[str, list[Process]]) -> dict[str, Any]:
    """What every side's programs said under a key, and ours over the other's."""
    return memory_row(what, runs, lambda said: said[key])


def memory_row(what: str, runs: dict[str, list[Process]], value: Any) -> dict[str, Any]:
    """What is computed of what every side's programs said, and ours over the other's."""
    found = {who: [value(done.said) for done in all_of] for who, all_of in runs.items()}
    made: dict[str, Any] = {"what": what, **{who: Spread.of(values) for who, values in found.items()}}
    for other in found.keys() - {"ours"}:
        made["ratio"] = ratio(found["ours"], found[other])
    return made
