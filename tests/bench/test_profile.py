"""Where the time goes, in the suite's quick form; and what the page says of targets."""

import json
from pathlib import Path

from triptych.bench import profile
from triptych.bench.targets import TARGETS, judged, measured
from triptych.cli import main


def test_every_call_is_taken_apart(tmp_path):
    assert main(["bench", "profile", "--quick", "--out", str(tmp_path)]) == 0
    _, table = json.loads((tmp_path / "benchmarks.json").read_text())["profile"]["tables"]
    assert len(table["rows"]) == 12
    for row in table["rows"]:
        shares = [row[name] for name, _ in profile.KINDS] + [row["rest"]]
        assert all(0 <= share <= 1.1 for share in shares)
        assert 0.95 < sum(shares) < 1.2
        assert 0 < row["utilisation"] < row["of products"]
    assert "## Targets" in (tmp_path / "benchmarks.md").read_text()


def test_kinds_of_operators():
    def kind(name):
        return next(kind for kind, pattern in profile.KINDS if profile.re.search(pattern, name))

    assert kind("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert kind("mkldnn::_linear_pointwise") == kind("aten::convolution_backward") == "products"
    assert kind("aten::native_layer_norm_backward") == kind("aten::_softmax") == "norms, softmax"
    assert kind("aten::_fused_adamw_") == "optimiser"
    assert kind("aten::copy_") == "copies"
    assert kind("aten::gelu") == "by element"


def test_targets_are_held_to_the_median():
    target = next(t for t in TARGETS if t.what.startswith("vit-b16 eager, bf16, batch 8, over transformers"))
    row = dict(target.row) | {target.key: {"median": 0.84, "low": 0.7, "high": 0.9}}
    sections = {"vit": {"tables": [{"title": target.table, "rows": [{"mode": "compiled"}, row]}]}}
    assert measured(target, sections) == 0.84
    by_name = {cells[0]: cells[1:] for cells in judged(sections)}
    assert by_name[target.what] == ["at most 0.85", "0.84", "met"]
    row[target.key]["median"] = 0.86
    assert {cells[0]: cells[3] for cells in judged(sections)}[target.what] == "missed"
    least = next(t for t in TARGETS if not t.most)
    row |= dict(least.row) | {least.key: 0.79}
    assert {cells[0]: cells[3] for cells in judged(sections)}[least.what] == "missed"
    assert {cells[3] for cells in judged({})} == {"not measured"}


def test_targets_name_rows_that_suites_write():
    """What was recorded holds most of them: a renamed column or row would leave its target unmeasured."""
    recorded = json.loads((Path(__file__).parents[2] / "docs" / "benchmarks.json").read_text())
    missing = [t.what for t in TARGETS if measured(t, recorded) is None]
    assert len(missing) < len(TARGETS) / 2, missing
