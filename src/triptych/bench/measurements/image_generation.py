"""Whole programs that paint: seconds from prompt to picture, from start to first step, and memory."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from triptych.bench.harness.report import Column, Table
from triptych.bench.harness.subprocesses import Process, python
from triptych.bench.harness.timing import Spread, interleave, ratio
from triptych.bench.measurements.load_time import memory_row, row

log = logging.getLogger(__name__)

BEGIN = """
begun = time.perf_counter()
source, asked = sys.argv[1], json.loads(sys.argv[2])
first = asked.pop("first")

def stop(*given):
    say(first=time.perf_counter() - begun)
    sys.exit()
"""
END = """
say(load=loaded - imported, image=time.perf_counter() - loaded, peak=memory()[1])
"""
OURS = f"""{BEGIN}
import triptych as tp
tp.DiffusionPipeline
imported = time.perf_counter()
pipe = tp.DiffusionPipeline(source, dtype="bf16", low_memory=asked.pop("low_memory", False))
loaded = time.perf_counter()
pipe.text_to_image("a red apple", preview=stop if first else None, progress=False, **asked)
{END}"""
THEIRS = f"""{BEGIN}
import torch
from diffusers import StableDiffusionPipeline
imported = time.perf_counter()
pipe = StableDiffusionPipeline.from_pretrained(source, torch_dtype=torch.bfloat16)
pipe.set_progress_bar_config(disable=True)
loaded = time.perf_counter()
if first:
    asked["callback_on_step_end"] = stop
pipe("a red apple", **asked)
{END}"""


def ours(folder: Path, **asked: Any) -> Process:
    """A program of ours in a fresh process."""
    return python(OURS, folder / "model.safetensors", json.dumps({"first": False} | asked))


def theirs(folder: Path, **asked: Any) -> Process:
    """The same of diffusers."""
    return python(THEIRS, folder / "diffusers", json.dumps({"first": False} | asked))


def columns(heading: str, there: bool) -> list[Column]:
    made = [Column(key="what", heading=heading), Column(key="ours", heading="ours", form=".3g")]
    if there:
        made.append(Column(key="diffusers", heading="diffusers", form=".3g"))
        made.append(Column(key="ratio", heading="ours / diffusers", form=".2f"))
    return made


def painting(folder: Path, there: bool, steps: tuple[int, int] | None = None, rounds: int = 2) -> Table:
    """A picture of the network in `folder` with the default settings of each side, or with so many steps."""
    mine, other = ({}, {}) if steps is None else ({"num_steps": steps[0]}, {"num_inference_steps": steps[1]})
    sides: dict[str, Callable[[], Process]] = {"ours": lambda: ours(folder, **mine)}
    if there:
        sides["diffusers"] = lambda: theirs(folder, **other)
    runs = interleave(sides, rounds, warmup=0).found
    table = Table(
        title="A whole picture",
        says=(
            "From one prompt in bf16, every program in a process of its own, files in the system's cache: ours of "
            f"{steps[0] if steps else 30} steps of dpm++2m, diffusers' `StableDiffusionPipeline` of "
            f"{steps[1] if steps else 50} of PNDM, "
            + ("fewer than each one's default" if steps else "the defaults of each")
            + ". The pictures differ as the samplers do; a step and the decoder are checked equal above. Our weights "
            "stay mapped to the file until they are used, by the picture that is. Memory is the "
            "process's peak (VmHWM) in all."
        ),
        columns=columns("what", there),
        rows=[
            row("load, s", "load", runs),
            row("prompt to picture, s", "image", runs),
            memory_row("peak memory, GB", runs, lambda said: said["peak"] / 1e9),
        ],
    )
    frugal = {"ours": [ours(folder, low_memory=True, **({"num_steps": 2} if steps is None else mine))]}
    table.rows.append(memory_row("the same with low_memory, GB", frugal, lambda said: said["peak"] / 1e9))
    for found in table.rows:
        log.info("%s: %s", found["what"], ", ".join(f"{w} {found[w].median:.3g}" for w in runs if w in found))
    return table


def starting(folders: Mapping[str, Path], there: bool, rounds: int, patience: float = 0.0) -> Table:
    """From the start of the interpreter to the first step of a sampler, for each network."""
    tasks: list[tuple[str, dict[str, Callable[[], Process]]]] = [
        ("import the pipeline", {"ours": lambda: python("import triptych as tp\ntp.DiffusionPipeline")})
    ]
    if there:
        tasks[0][1]["diffusers"] = lambda: python("from diffusers import StableDiffusionPipeline")
    for name, folder in folders.items():
        sides: dict[str, Callable[[], Process]] = {"ours": lambda folder=folder: ours(folder, first=True)}
        if there:
            sides["diffusers"] = lambda folder=folder: theirs(folder, first=True)
        tasks.append((f"import to first step, {name}", sides))
    table = Table(
        title="Starting",
        says=(
            "From the start of the interpreter to its exit, files in the system's cache: the pipeline imported, a "
            "network in bf16 loaded, the prompt encoded, one step of the sampler done."
        ),
        columns=columns("whole process, s", there),
    )
    for what, sides in tasks:
        runs = interleave(sides, rounds, warmup=min(rounds - 1, 1), patience=patience).found
        seconds = {who: [done.seconds for done in all_of] for who, all_of in runs.items()}
        made: dict[str, Any] = {"what": what, **{who: Spread.of(found) for who, found in seconds.items()}}
        if there:
            made["ratio"] = ratio(seconds["ours"], seconds["diffusers"])
        log.info("%s: %s", what, ", ".join(f"{who} {made[who].median:.2f} s" for who in seconds))
        table.rows.append(made)
    return table
