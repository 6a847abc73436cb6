"""Rows of a log are plotted in panels by their fields; unusual logs are plotted or refused in one line."""

import json

import numpy as np
import pytest

from triptych.errors import DataError
from triptych.plots import style
from triptych.plots.curves import collect, read_log, sorted_out, training_curves

# Rows as `triptych train` writes them: one per step, and some with the results of an evaluation.
ROWS = [
    {
        "step": i,
        "images": 8 * i,
        "epoch": i / 10,
        "lr": 1e-3,
        "loss": 3 / i,
        "train_top1": 0.5,
        "grad_norm": 0.3,
    }
    for i in range(1, 100)
] + [
    {"step": 50, "images": 400, "eval": {"count": 7, "loss": 1.0, "top1": 0.4, "top5": 0.8}},
    {"step": 99, "images": 792, "loss": 1.0, "images_per_second": 31.0, "waiting": 0.02},
]


def test_each_field_has_its_panel():
    clock, series = collect(ROWS)
    panels = sorted_out(series)
    assert clock == "images"
    assert set(panels["loss"]) == {"loss", "eval/loss"}
    assert set(panels["scores"]) == {"train_top1", "eval/top1", "eval/top5"}
    assert set(panels["learning rate"]) == {"lr"}
    assert set(panels["images per second"]) == {"images_per_second"}
    assert set(panels["waiting for data"]) == {"waiting"}
    assert not panels["distance"]
    x, y = panels["scores"]["eval/top1"]
    assert (x.tolist(), y.tolist()) == ([400.0], [0.4])


def test_scores_are_those_that_a_task_names():
    row = {
        "step": 1,
        "loss": 1.0,
        "train_top1": 0.4,
        "peak_share": 0.4,
        "saving": 0.1,
        "grad_norm": 0.3,
        "mfu": 0.2,
    }
    evaluations = {
        "classification": ({"top1": 0.5, "top5": 0.8, "mean_per_class": 0.4, "animals": 0.6}, ()),
        "segmentation": ({"miou": 0.5, "pixel_accuracy": 0.8, "mean_accuracy": 0.4}, ()),
        "reconstruction": ({"ssim": 0.9}, ("psnr", "perceptual", "frechet", "perplexity", "codes_used")),
    }
    for task, (scores, others) in evaluations.items():
        rows = [row, {"step": 1, "eval": {"count": 1, "loss": 0.5, **scores, **dict.fromkeys(others, 0.7)}}]
        panels = sorted_out(collect(rows)[1])
        assert set(panels["scores"]) == {"train_top1", *(f"eval/{name}" for name in scores)}, task
        assert set(panels["PSNR in dB"]) == {"eval/psnr"} & {f"eval/{name}" for name in others}
        assert set(panels["distance"]) == {"eval/perceptual", "eval/frechet"} & {
            f"eval/{name}" for name in others
        }


def test_drawn(tmp_path):
    style.save(training_curves(ROWS, "a run"), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    "rows",
    [
        [{"step": 1, "loss": 1.0}],
        [{"loss": 1.0}, {"loss": 0.5}],  # without steps or images: rows are counted
        [{"step": i, "loss": float("nan")} for i in range(60)],
        [{"step": i, "loss": 10.0**-i, "note": "words"} for i in range(8)],
        [{"step": i, "eval": {f"score {j}": 0.1 * j for j in range(9)}} for i in range(3)],
    ],
)
def test_odd_logs_are_drawn(rows, tmp_path):
    style.save(training_curves(rows), tmp_path / "curves.png")


def test_tick_labels_are_distinct():
    rows = [{"step": i, "loss": 1.0, "waiting": 0.01 * i} for i in range(5)]
    figure = training_curves(rows)
    figure.canvas.draw()
    words = [label.get_text() for label in figure.axes[-1].yaxis.get_ticklabels()]
    assert all(word.endswith("%") for word in words)
    assert len(set(words)) == len(words) > 2


def test_nothing_to_draw():
    with pytest.raises(DataError, match="no loss"):
        training_curves([{"step": 1, "words": "hello"}])


def test_the_half_line_of_a_killed_run_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_log(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    ("text", "message"), [("", "no rows"), ("words\nwords\n", "line 1"), ("[1]\n[2]\n", "line 1")]
)
def test_a_file_that_is_not_a_log_is_refused(tmp_path, text, message):
    (tmp_path / "log.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        read_log(tmp_path / "log.jsonl")


def test_rows_as_json_lines_come_back(tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert read_log(tmp_path / "log.jsonl") == ROWS
    assert np.isclose(collect(ROWS)[1]["loss"][1][0], 3.0)
