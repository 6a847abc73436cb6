"""Where the time goes, with the suite's quick plan, and the verdicts on targets."""

import json
from pathlib import Path

from triptych.bench.harness.targets import TARGETS, judged, measured
from triptych.bench.suites import profile
from triptych.cli import main


def test_each_call_is_profiled(tmp_path):
    assert main(["bench", "profile", "--quick", "--out", str(tmp_path)]) == 0
    _, table, attention = json.loads((tmp_path / "benchmarks.json").read_text())["profile"]["tables"]
    assert len(table["rows"]) == 16
    for row in table["rows"]:
        shares = [row[name] for name, _ in profile.CATEGORIES] + [row["rest"]]
        assert all(0 <= share <= 1.1 for share in shares)
        assert 0.95 < sum(shares) < 1.2
        assert 0 < row["utilization"] < row["of products"]
    (row,) = attention["rows"]
    assert all(row[way]["median"] > 0 for way in ("ours", "plain", "slabs", "softmax"))
    assert "## Targets" in (tmp_path / "benchmarks.md").read_text()


def test_categories_of_operators():
    def category_of(name):
        return next(category for category, pattern in profile.CATEGORIES if profile.re.search(pattern, name))

    assert category_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "attention"
    assert category_of("mkldnn::_linear_pointwise") == category_of("aten::convolution_backward") == "products"
    assert (
        category_of("aten::native_layer_norm_backward") == category_of("aten::_softmax") == "norms, softmax"
    )
    assert category_of("aten::_fused_adamw_") == "optimizer"
    assert category_of("aten::copy_") == "copies"
    assert category_of("aten::gelu") == "by element"


def test_targets_are_compared_with_the_median():
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


def test_either_of_two_peers_is_enough():
    over = {t.peer: t for t in TARGETS if t.what.startswith("vit-b16 eager, bf16, batch 8")}
    compiled = next(t for t in TARGETS if t.what.startswith("vit-b16 compiled"))

    def verdicts(transformers, timm):
        """Return the verdicts on the two targets of the row; a third, of another row, is missed."""
        row = {**over["timm"].row, "ratio to transformers": transformers, "ratio to timm": timm}
        rows = [row, {**compiled.row, compiled.key: 0.1}]
        sections = {"vit": {"tables": [{"title": compiled.table, "rows": rows}]}}
        verdict_of = {cells[0]: cells[3] for cells in judged(sections)}
        assert verdict_of.pop(compiled.what) == "missed"
        pair = [verdict_of.pop(over[peer].what) for peer in ("transformers", "timm")]
        assert set(verdict_of.values()) == {"not measured"}
        return pair

    assert verdicts(0.8, 0.9) == ["met", "met"]
    assert verdicts(0.9, 0.9) == ["met over timm", "met"]
    assert verdicts(0.8, 1.0) == ["met", "met over transformers"]
    assert verdicts(0.8, None) == ["met", "met over transformers"]
    assert verdicts(0.9, 1.0) == ["missed", "missed"]
    assert verdicts(0.9, None) == ["missed", "not measured"]


def without_timm(section):
    return any(note.startswith("timm is not measured") for note in section["notes"])


def not_compiled(section):
    return "--compiled" not in section["command"]


# The targets that a recorded run of their suite may lack, and how to recognize such a run.
LACKING = {
    "vit-b16 eager, bf16, batch 1, over timm": without_timm,
    "vit-b16 eager, bf16, batch 8, over timm": without_timm,
    "Stable Diffusion 1's UNet compiled, bf16, over diffusers": not_compiled,
}


def test_targets_name_rows_that_suites_write():
    """A renamed column or row would leave its target unmeasured."""
    recorded = json.loads((Path(__file__).parents[3] / "docs" / "benchmarks.json").read_text())
    missing = {t.what: recorded[t.suite] for t in TARGETS if measured(t, recorded) is None}
    assert set(missing) <= set(LACKING)
    assert all(LACKING[what](section) for what, section in missing.items())
