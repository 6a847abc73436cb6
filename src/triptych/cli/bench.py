"""`triptych bench`"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from triptych.cli.output import print_json
from triptych.cli.parsing import flag, logged_to_stderr, parse
from triptych.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Benchmark speed, loading, startup and training against a reference with the same weights, interleaved in one run.

    A suite takes ten to thirty minutes; run nothing else meanwhile. References that are not installed are skipped and
    reported. `resume` has no reference: it kills training runs, compares them with uninterrupted ones, and times
    checkpoints. `data` measures memory against the number of examples, and needs 3 GB of temporary files. `bulk`
    compares folders of up to 100,000 images with the network alone. `approximate` and `int8` compare opt-in
    approximations, and integer weights, with the exact network.
    """

    suite: Annotated[
        Literal[
            "vit",
            "swin",
            "ldm",
            "train",
            "parallel",
            "resume",
            "data",
            "sweep",
            "profile",
            "bulk",
            "approximate",
            "int8",
        ],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="SUITE"),
    ]
    """vit, swin, ldm, train, parallel, resume, data, sweep, profile, bulk, approximate or int8."""
    out: Annotated[Path | None, flag("FOLDER", "print only")] = None
    """Folder for benchmarks.md and benchmarks.json; sections of other suites are kept."""
    quick: bool = False
    """Tiny networks and few rounds: a smoke test, not a measurement."""
    short: bool = False
    """ldm: only bf16, few rounds, and a tenth of the sampler steps."""
    compiled: bool = False
    """ldm and train: also measure compiled networks, which takes many more minutes."""
    json: bool = False
    """Print everything as JSON."""

    def run(self) -> int:
        for name, suites in {"short": ["ldm"], "compiled": ["ldm", "train"]}.items():
            if getattr(self, name) and self.suite not in suites:
                raise ConfigError(
                    f"--{name} applies to {' and '.join(suites)}, not to {self.suite}; leave it out"
                )
        if self.quick and self.short:
            raise ConfigError("--quick and --short cannot be combined; give one of them")
        if importlib.util.find_spec("psutil") is None:
            raise ConfigError("triptych bench needs psutil; run: pip install 'triptych[bench]'")
        from triptych.bench.harness import report
        from triptych.bench.suites import (
            approximate,
            bulk,
            data,
            int8,
            ldm,
            parallel,
            profile,
            resume,
            sweep,
            swin,
            train,
            vit,
        )

        suites = {
            "vit": vit,
            "swin": swin,
            "ldm": ldm,
            "train": train,
            "parallel": parallel,
            "resume": resume,
            "data": data,
            "sweep": sweep,
            "profile": profile,
            "bulk": bulk,
            "approximate": approximate,
            "int8": int8,
        }
        suite = suites[self.suite]
        plan: Any = suite.QUICK if self.quick else ldm.SHORT if self.short else suite.FULL
        if self.compiled:
            plan = replace(plan, compiled=True)
        flags = [f"--{name}" for name in ("quick", "short", "compiled") if getattr(self, name)]
        out = ["--out", str(self.out)] if self.out else []
        result = suite.run(plan, " ".join(["triptych", "bench", self.suite, *out, *flags]))
        written = report.write(result, self.out) if self.out else []
        if self.json:
            print_json(result.as_json(), indent=1)
        elif written:
            print(*written, sep="\n")
        else:
            print(report.markdown(result.as_json()))
        return 0


def bench(args: Sequence[str]) -> int:
    """The verb."""
    command = parse(Bench, args, "triptych bench")
    with logged_to_stderr():
        return command.run()
