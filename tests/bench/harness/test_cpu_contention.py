from types import SimpleNamespace
from typing import NamedTuple

import pytest

from triptych.bench.harness import cpu_contention


class Times(NamedTuple):
    """CPU times as psutil returns them on Linux."""

    user: float = 0.0
    system: float = 0.0
    idle: float = 0.0
    iowait: float = 0.0
    guest: float = 0.0


@pytest.fixture
def cores(monkeypatch):
    """Two cores, of which this process may use only the second and has used none."""
    times = [Times(), Times()]
    own = SimpleNamespace(user=0.0, system=0.0, children_user=0.0, children_system=0.0)
    monkeypatch.setattr(cpu_contention.psutil, "cpu_times", lambda percpu: list(times))
    monkeypatch.setattr(cpu_contention.psutil, "Process", lambda: SimpleNamespace(cpu_times=lambda: own))
    monkeypatch.setattr(cpu_contention.os, "sched_getaffinity", lambda of: {1}, raising=False)
    times.append(own)
    return times


def test_only_usable_cores_count(cores, monkeypatch):
    contention = cpu_contention.CpuContention()
    cores[0] = Times(user=1000.0)
    cores[1] = Times(user=200.0, system=50.0, idle=700.0, iowait=50.0, guest=100.0)
    assert contention.share() == pytest.approx(0.25)
    assert contention.describe() == "25% of the CPU, over the whole run"
    monkeypatch.setattr(cpu_contention.os, "sched_getaffinity", lambda of: {7})
    assert contention.share() is None
    assert contention.describe() == "unknown"


def test_own_work_does_not_count(cores):
    contention = cpu_contention.CpuContention()
    cores[1] = Times(user=300.0, idle=700.0)
    cores[2].user, cores[2].children_user = 100.0, 150.0
    assert contention.share() == pytest.approx(0.05)
