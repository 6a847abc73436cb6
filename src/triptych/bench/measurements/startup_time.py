"""Startup time: import, help page, first result."""

import logging
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.subprocesses import FinishedProcess, run, run_child, run_code
from triptych.bench.harness.timing import Spread, check_equal, interleave, ratio
from triptych.model_card import Preprocess
from triptych.network import Network
from triptych.weights import export, save

log = logging.getLogger(__name__)


def starting(
    networks: Mapping[str, Network], folder: Path, peers: tuple[str, ...], rounds: int, patience: float = 0.0
) -> Table:
    """Measure programs from start to exit, and compare them with those of transformers.

    Args:
        networks: classifiers by name, whose first result is timed.

    Raises:
        UnequalError: the first results differ.
    """
    command = [sys.executable, "-m", "triptych"]
    peer = "transformers" in peers
    tasks: list[tuple[str, dict[str, Any]]] = [
        ("the bare interpreter", {"ours": lambda: run_code("")}),
        ("import torch, nothing of ours", {"ours": lambda: run_code("import torch")}),
        ("import the package", {"ours": lambda: run_code("import triptych")}),
        ("triptych --help", {"ours": lambda: run([*command, "--help"])}),
        ("triptych classify --help", {"ours": lambda: run([*command, "classify", "--help"])}),
    ]
    if peer:
        tasks[2][1]["transformers"] = lambda: run_code("import transformers")
    for name, net in networks.items():
        tasks.append((f"import to first result, {name}", first(name, net, folder, peer)))
    warmup = min(rounds - 1, 1)
    rows = [row(what, interleave(sides, rounds, 0.0, warmup, patience).measurements) for what, sides in tasks]
    columns = [Column(key="what", heading="whole process, s"), Column(key="ours", heading="ours", form=".2f")]
    if peer:
        columns.append(Column(key="transformers", heading="transformers", form=".2f"))
        columns.append(Column(key="ratio", heading="ours / transformers", form=".2f"))
    description = (
        "From the start of the interpreter to its exit, with files in the operating system's cache. The first result "
        "is the top 5 classes of one PNG by a network in fp32 on disk: `ClassificationPipeline` compared with "
        "transformers' image-classification `pipeline`; classes and probabilities are checked equal. Both import "
        "PyTorch, which is a lower bound of the time to a first result."
    )
    return Table(title="Startup", description=description, columns=columns, rows=rows)


def first(name: str, net: Any, folder: Path, peer: bool) -> dict[str, Any]:
    """Return functions that run programs which classify one image with a network."""
    classes = tuple(f"class {i}" for i in range(net.config.num_classes))
    # The image has the network's size, so that the rounding of crops cannot make a difference.
    size = net.config.image_size
    net.card = replace(net.card, classes=classes, preprocess=Preprocess(size=size, mode="squash", crop=1.0))
    model, image = folder / f"{name}.safetensors", folder / f"{name}.png"
    save(net, model)
    pixels = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(image)
    sides = {"ours": lambda: run_child("classify_ours", model, image)}
    if peer:
        export(net, folder / name, "hf")
        sides["transformers"] = lambda: run_child("classify_transformers", folder / name, image)
    return sides


def row(what: str, runs: dict[str, list[FinishedProcess]]) -> dict[str, Any]:
    """Return a row with the seconds of a task.

    Raises:
        UnequalError: programs reported different probabilities.
    """
    guesses = {
        who: done[0].reported["probabilities"]
        for who, done in runs.items()
        if "probabilities" in done[0].reported
    }
    if len(guesses) > 1:
        names = sorted({name for probabilities_of in guesses.values() for name in probabilities_of})
        check_equal({who: torch.tensor([g.get(n, 0.0) for n in names]) for who, g in guesses.items()}, 1e-3)
    seconds = {who: [done.seconds for done in all_of] for who, all_of in runs.items()}
    values: dict[str, Any] = {"what": what, **{who: Spread.of(values) for who, values in seconds.items()}}
    if len(seconds) > 1:
        values["ratio"] = ratio(seconds["ours"], seconds["transformers"])
    log.info("%s: %s", what, ", ".join(f"{who} {values[who].median:.2f} s" for who in seconds))
    return values
