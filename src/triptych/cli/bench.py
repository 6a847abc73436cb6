"""`triptych bench`"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from triptych.cli.output import print_json
from triptych.cli.parsing import logged_to_stderr, parse


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure speed, loading and starting beside a peer with the same weights, in turn, in one run.

    Each suite takes ten to fifteen minutes; let nothing else run meanwhile. Peers that are not installed are left
    out, and named.
    """

    suite: Annotated[Literal["vit", "swin"], tyro.conf.Positional, tyro.conf.arg(metavar="vit|swin")]
    """What to measure."""
    out: Path | None = None
    """Folder for benchmarks.md and benchmarks.json; sections of other suites in it stay. Else printed only."""
    quick: bool = False
    """Tiny networks and few rounds: shows that everything runs, and measures nothing."""
    json: bool = False
    """Print everything as JSON."""

    def run(self) -> int:
        from triptych.bench import report, swin, vit

        suite = {"vit": vit, "swin": swin}[self.suite]
        command = f"triptych bench {self.suite}" + (f" --out {self.out}" if self.out else "")
        found = suite.run(
            suite.QUICK if self.quick else suite.FULL, command + (" --quick" if self.quick else "")
        )
        written = report.write(found, self.out) if self.out else []
        if self.json:
            print_json(found.as_json(), indent=1)
        elif written:
            print(*written, sep="\n")
        else:
            print(report.markdown(found.as_json()))
        return 0


def bench(args: Sequence[str]) -> int:
    """The verb."""
    command = parse(Bench, args, "triptych bench")
    with logged_to_stderr():
        return command.run()
