"""The table of the suite, with runs replaced; `triptych bench parallel --quick` tests the runs."""

import json
from pathlib import Path

from triptych.bench.harness.subprocesses import FinishedProcess
from triptych.bench.suites import parallel


def test_each_way_is_a_row_compared_with_one_process(monkeypatch):
    lines = []

    def program(line, environment):
        lines.append((line, environment))
        out = Path(line[line.index("--out") + 1])
        out.mkdir()
        loss = 1.0 + 1e-6 * ("fsdp" in line)
        rows = [{"step": 1, "loss": loss, "images_per_second": 9.0}, {"step": 2, "loss": loss}]
        rows += [{"step": 2, "eval": {"loss": 3.0}}, {"step": 3, "loss": loss, "images_per_second": 50.0}]
        (out / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return FinishedProcess(1.0, {})

    monkeypatch.setattr(parallel, "program", program)
    (table,) = parallel.run(parallel.QUICK).tables
    assert [row["way"] for row in table.rows] == list(parallel.WAYS)
    assert {row["speed"].median for row in table.rows} == {50.0}  # the first line includes the warm-up
    assert [round(row["apart"], 9) for row in table.rows] == [0.0, 0.0, 1e-6]
    assert {column.key for column in table.columns} == set(table.rows[0])
    assert [("torch.distributed.run" in line, env["OMP_NUM_THREADS"]) for line, env in lines] == [
        (size > 1, str(row["threads"])) for size, row in zip(parallel.WAYS.values(), table.rows, strict=True)
    ]
