"""The suite with its quick plan, whose measurements are meaningless but must exist."""

import json

from triptych.bench.suites import sweep
from triptych.cli import main


def test_everything_is_swept_and_drawn(tmp_path, capsys):
    assert main(["bench", "sweep", "--quick", "--out", str(tmp_path)]) == 0
    section = json.loads((tmp_path / "benchmarks.json").read_text())["sweep"]
    _, batch, tokens, steps = section["tables"]
    plan = sweep.QUICK
    assert [(row["network"], row["n"]) for row in batch["rows"]] == [
        (name, n) for name in ("vit-ti16", "swin-t") for n in plan.batches
    ]
    assert all(row["ratio to transformers"]["median"] > 0 for row in batch["rows"])
    assert [row["n"] for row in tokens["rows"]] == list(plan.tokens)
    assert [row["n"] for row in steps["rows"]] == list(plan.steps)
    assert steps["rows"][0]["each"] is None
    for name in ("batch", "tokens", "steps"):
        assert f"![{name.title()}](images/sweep_{name}.png)" in (tmp_path / "benchmarks.md").read_text()
        assert (tmp_path / "images" / f"sweep_{name}.png").stat().st_size > 1000
