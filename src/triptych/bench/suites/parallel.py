"""`triptych bench parallel`: the same run in one process and in two, on this machine's cores."""

import json
import logging
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.subprocesses import run as program
from triptych.bench.harness.suite import suite
from triptych.bench.harness.timing import Spread, interleave

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained, and for how long."""

    flags: tuple[str, ...] = ("--loop.epochs", "1")
    rounds: int = 3
    patience: float = 60.0
    """Most seconds spent on rounds that other programs disturb."""


FULL = Plan()
QUICK = Plan(
    flags=(
        *(
            "--model-args",
            "depth=1",
            "embed_dim=48",
            "num_heads=3",
            "mlp_ratio=2.0",
            "--image-size",
            "32",
            "32",
        ),
        *("--loop.epochs", "0.1", "--loading.batch-size", "32", "--loading.cache", "off"),
    ),
    rounds=1,
    patience=0.0,
)
WAYS = {"one process": 1, "two, DDP": 2, "two, FSDP2": 2}


@suite("parallel", FULL)
def run(report: Report, plan: Plan) -> None:
    """Train the ViT on emoji with each way of parallelism, in alternation."""
    cores = torch.get_num_threads()
    calls = {name: (lambda name=name: trained(plan, name, max(1, cores // WAYS[name]))) for name in WAYS}
    done = interleave(calls, plan.rounds, warmup=0, patience=plan.patience)
    alone = done.measurements["one process"][0]["loss"]
    table = Table(
        title="One process and two on the same cores",
        description=(
            "`triptych train vit_emoji` in fp32, with the same total batch of 64 and the same steps, and the cores "
            "divided among the processes: images per second in the log after the first line, and the largest "
            "difference of a step's loss to that of a single process. On one machine two processes can only gain what "
            "one leaves idle; the rows show the cost of exchanging gradients over gloo."
        ),
        columns=[
            Column(key="way", heading="processes"),
            Column(key="threads", heading="threads each", form="d"),
            Column(key="speed", heading="images/s", form=".0f"),
            Column(key="apart", heading="loss apart", form=".1e"),
            Column(key="others", heading="used by others", form=".0%"),
        ],
    )
    for name, size in WAYS.items():
        runs = done.measurements[name]
        speed = Spread.of(result["speed"] for result in runs)
        apart = max(abs(a - b) for result in runs for a, b in zip(result["loss"], alone, strict=True))
        threads = max(1, cores // size)
        table.rows.append(
            {"way": name, "threads": threads, "speed": speed, "apart": apart, "others": done.others}
        )
        log.info("%s: %.0f images/s", name, speed.median)
    report.tables = [table]


def trained(plan: Plan, way: str, threads: int) -> dict[str, Any]:
    """Run the training in a fresh process; return its images per second and the loss of each step."""
    start = [sys.executable, "-m"]
    if WAYS[way] > 1:
        start += ["torch.distributed.run", "--nproc-per-node", str(WAYS[way]), "-m"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        flags = [
            "--loop.eval-every",
            "1000",
            "--loop.log-every",
            "1",
            "--loop.precision",
            "fp32",
            "--loop.device",
            "cpu",
        ]
        flags += [
            "--loading.workers",
            "0",
            "--loop.parallel",
            {"two, DDP": "ddp", "two, FSDP2": "fsdp"}.get(way, "auto"),
        ]
        line = [*start, "triptych", "train", "vit_emoji", "--out", str(out), *flags, *plan.flags]
        program(
            line, {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        )
        rows = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    speeds = [row["images_per_second"] for row in rows if "images_per_second" in row]
    speeds = speeds[1:] or speeds
    return {"speed": sorted(speeds)[len(speeds) // 2], "loss": [row["loss"] for row in rows if "loss" in row]}
