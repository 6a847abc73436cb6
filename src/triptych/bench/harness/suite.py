"""What all suites have in common: a report of the run, with the machine and the load by other programs."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from triptych.bench.harness import machine
from triptych.bench.harness.cpu_contention import CpuContention
from triptych.bench.harness.report import Report, Table
from triptych.kernels.inductor import backend_error

P = TypeVar("P", contravariant=True)


class Suite(Protocol[P]):
    """Runs a plan, by default the full one; `command` is what repeats it. Nothing else should run meanwhile."""

    def __call__(self, plan: P = ..., command: str = ...) -> Report: ...


def suite(name: str, full: P) -> Callable[[Callable[[Report, P], None]], Suite[P]]:
    """Turn a function that fills a report by a plan into the suite `name`, whose plan is `full` by default.

    The report gets the facts of the machine, and the share of the CPU that other programs took during the run.
    """

    def decorate(fill: Callable[[Report, P], None]) -> Suite[P]:
        @functools.wraps(fill)
        def run(plan: P = full, command: str = f"triptych bench {name} --out docs") -> Report:
            contention, facts = CpuContention(), machine.describe()
            report = Report(suite=name, command=command, machine=facts)
            fill(report, plan)
            facts["used by others"] = contention.describe()
            return report

        return run

    return decorate


def add_compiled(report: Report, table: Table, measure: Callable[[], list[dict[str, Any]]]) -> None:
    """Append the rows that `measure` returns, which compiles networks; if the compiler fails, add a note to the report
    instead."""
    try:
        table.rows += measure()
    except backend_error() as problem:
        report.notes.append(f"Not all compiled is measured: {str(problem).splitlines()[0]}")
