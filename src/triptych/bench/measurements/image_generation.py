"""Whole programs that paint: seconds from prompt to image, from start to first step, and memory."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.subprocesses import FinishedProcess, run_child, run_code
from triptych.bench.harness.timing import Spread, interleave, ratio
from triptych.bench.measurements.load_time import memory_row, row

log = logging.getLogger(__name__)


def ours(folder: Path, **options: Any) -> FinishedProcess:
    """A program of ours in a fresh process."""
    return run_child("generate_ours", folder / "model.safetensors", json.dumps(options))


def theirs(folder: Path, **options: Any) -> FinishedProcess:
    """The same of diffusers."""
    return run_child("generate_diffusers", folder / "diffusers", json.dumps(options))


def columns(heading: str, compare: bool) -> list[Column]:
    values = [Column(key="what", heading=heading), Column(key="ours", heading="ours", form=".3g")]
    if compare:
        values.append(Column(key="diffusers", heading="diffusers", form=".3g"))
        values.append(Column(key="ratio", heading="ours / diffusers", form=".2f"))
    return values


def painting(folder: Path, compare: bool, steps: tuple[int, int] | None = None, rounds: int = 2) -> Table:
    """A picture of the network in `folder` with the default settings of each side, or with so many steps."""
    mine, other = ({}, {}) if steps is None else ({"num_steps": steps[0]}, {"num_inference_steps": steps[1]})
    sides: dict[str, Callable[[], FinishedProcess]] = {"ours": lambda: ours(folder, **mine)}
    if compare:
        sides["diffusers"] = lambda: theirs(folder, **other)
    runs = interleave(sides, rounds, warmup=0).found
    table = Table(
        title="Generating an image",
        description=(
            "From one prompt in bf16, every program in a process of its own, files in the system's cache: ours of "
            f"{steps[0] if steps else 30} steps of dpm++2m, diffusers' `StableDiffusionPipeline` of "
            f"{steps[1] if steps else 50} of PNDM, "
            + ("fewer than each one's default" if steps else "the defaults of each")
            + ". The images differ as the samplers do; a step and the decoder are checked equal above. Our weights "
            "stay mapped to the file until they are used, which is before the image is finished. Memory is the "
            "process's peak (VmHWM) in all."
        ),
        columns=columns("what", compare),
        rows=[
            row("load, s", "load", runs),
            row("prompt to image, s", "image", runs),
            memory_row("peak memory, GB", runs, lambda reported: reported["peak"] / 1e9),
        ],
    )
    frugal = {"ours": [ours(folder, low_memory=True, **({"num_steps": 2} if steps is None else mine))]}
    table.rows.append(
        memory_row("the same with low_memory, GB", frugal, lambda reported: reported["peak"] / 1e9)
    )
    for found in table.rows:
        log.info("%s: %s", found["what"], ", ".join(f"{w} {found[w].median:.3g}" for w in runs if w in found))
    return table


def starting(folders: Mapping[str, Path], compare: bool, rounds: int, patience: float = 0.0) -> Table:
    """From the start of the interpreter to the first step of a sampler, for each network."""
    tasks: list[tuple[str, dict[str, Callable[[], FinishedProcess]]]] = [
        ("import the pipeline", {"ours": lambda: run_code("import triptych as tp\ntp.DiffusionPipeline")})
    ]
    if compare:
        tasks[0][1]["diffusers"] = lambda: run_code("from diffusers import StableDiffusionPipeline")
    for name, folder in folders.items():
        sides: dict[str, Callable[[], FinishedProcess]] = {
            "ours": lambda folder=folder: ours(folder, first=True)
        }
        if compare:
            sides["diffusers"] = lambda folder=folder: theirs(folder, first=True)
        tasks.append((f"import to first step, {name}", sides))
    table = Table(
        title="Startup",
        description=(
            "From the start of the interpreter to its exit, files in the system's cache: the pipeline imported, a "
            "network in bf16 loaded, the prompt encoded, one step of the sampler done."
        ),
        columns=columns("whole process, s", compare),
    )
    for what, sides in tasks:
        runs = interleave(sides, rounds, warmup=min(rounds - 1, 1), patience=patience).found
        seconds = {who: [done.seconds for done in all_of] for who, all_of in runs.items()}
        values: dict[str, Any] = {"what": what, **{who: Spread.of(found) for who, found in seconds.items()}}
        if compare:
            values["ratio"] = ratio(seconds["ours"], seconds["diffusers"])
        log.info("%s: %s", what, ", ".join(f"{who} {values[who].median:.2f} s" for who in seconds))
        table.rows.append(values)
    return table
