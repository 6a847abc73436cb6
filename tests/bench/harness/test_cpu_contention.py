import os

import pytest

from triptych.bench.harness import cpu_contention


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="processes are not bound to processors here")
def test_only_the_processors_that_one_may_run_on_count(tmp_path, monkeypatch):
    """Ticks are user, nice, system, idle, iowait, irq, softirq, steal, guest and guest's nice."""
    stat = tmp_path / "stat"
    monkeypatch.setattr(cpu_contention, "STAT", str(stat))
    monkeypatch.setattr(cpu_contention.os, "sched_getaffinity", lambda of: {1})

    def says(zeroth: int, first: int, idle: int) -> None:
        rows = [f"cpu{i} {busy} 0 0 {idle} 0 0 0 0 0 0" for i, busy in enumerate((zeroth, first))]
        stat.write_text("\n".join([f"cpu  {zeroth + first} 0 0 {2 * idle} 0 0 0 0 0 0", *rows, "intr 1 2"]))

    says(0, 0, 0)
    watched = cpu_contention.Others()
    says(100_000, 25_000, 75_000)
    assert watched.share() == pytest.approx(0.25, abs=0.01)
    monkeypatch.setattr(cpu_contention.os, "sched_getaffinity", lambda of: {7})
    assert watched.share() is None
