"""Programs that generate images: seconds from prompt to image and from start to first step, and memory."""

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
    """Run our program in a fresh process."""
    return run_child("generate_ours", folder / "model.safetensors", json.dumps(options))


def theirs(folder: Path, **options: Any) -> FinishedProcess:
    """Run the program of diffusers in a fresh process."""
    return run_child("generate_diffusers", folder / "diffusers", json.dumps(options))


def columns(heading: str, compare: bool) -> list[Column]:
    values = [Column(key="what", heading=heading), Column(key="ours", heading="ours", form=".3g")]
    if compare:
        values.append(Column(key="diffusers", heading="diffusers", form=".3g"))
        values.append(Column(key="ratio", heading="ours / diffusers", form=".2f"))
    return values


def generating(folder: Path, compare: bool, steps: tuple[int, int] | None = None, rounds: int = 2) -> Table:
    """Generate an image with the model in `folder`, with the default settings of each library or the given steps."""
    mine, other = ({}, {}) if steps is None else ({"num_steps": steps[0]}, {"num_inference_steps": steps[1]})
    sides: dict[str, Callable[[], FinishedProcess]] = {"ours": lambda: ours(folder, **mine)}
    if compare:
        sides["diffusers"] = lambda: theirs(folder, **other)
    runs = interleave(sides, rounds, warmup=0).measurements
    table = Table(
        title="Generating an image",
        description=(
            "One prompt in bf16, each program in a process of its own, with files in the operating system's cache: "
            f"{steps[0] if steps else 30} steps of dpm++2m for ours, {steps[1] if steps else 50} steps of PNDM for "
            "diffusers' `StableDiffusionPipeline`, "
            + ("fewer than the defaults" if steps else "the defaults")
            + ". The images differ because the samplers do; a step and the decoder are checked equal above. Our "
            "weights stay memory-mapped until they are used, which all are before the image is finished. Memory is "
            "the peak of the process (VmHWM)."
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
    for values in table.rows:
        log.info(
            "%s: %s", values["what"], ", ".join(f"{w} {values[w].median:.3g}" for w in runs if w in values)
        )
    return table


def starting(folders: Mapping[str, Path], compare: bool, rounds: int, patience: float = 0.0) -> Table:
    """Measure the time from the start of the interpreter to the first step of a sampler, for each network."""
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
            "From the start of the interpreter to its exit, with files in the operating system's cache: import the "
            "pipeline, load a network in bf16, encode the prompt, and run one step of the sampler."
        ),
        columns=columns("whole process, s", compare),
    )
    for what, sides in tasks:
        runs = interleave(sides, rounds, warmup=min(rounds - 1, 1), patience=patience).measurements
        seconds = {who: [done.seconds for done in all_of] for who, all_of in runs.items()}
        values: dict[str, Any] = {"what": what, **{who: Spread.of(times) for who, times in seconds.items()}}
        if compare:
            values["ratio"] = ratio(seconds["ours"], seconds["diffusers"])
        log.info("%s: %s", what, ", ".join(f"{who} {values[who].median:.2f} s" for who in seconds))
        table.rows.append(values)
    return table
