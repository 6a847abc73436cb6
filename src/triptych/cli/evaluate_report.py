"""Summaries of what `triptych.evaluate` returns: metrics.json, the confusion matrix, and tables on stdout."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triptych.cli.output import percent, table

WORST = 10  # lines in each list on the screen

Metrics = dict[str, Any]

if TYPE_CHECKING:
    from triptych.evaluation.results import EvaluationResult


def write(result: "EvaluationResult", metrics: Metrics, out: Path) -> None:
    """Write metrics.json, and confusion.png where there are classes."""
    from triptych.atomic_write import write_text_atomically
    from triptych.plots import style
    from triptych.plots.confusion import confusion

    text = json.dumps(metrics, indent=1, ensure_ascii=False) + "\n"
    write_text_atomically(out / "metrics.json", text)
    matrix = getattr(result, "confusion", None)
    if matrix is not None:
        # The coarsest grouping orders many classes best.
        groups = min(result.groupings.values(), key=lambda names: len(set(names)), default=None)  # type: ignore[attr-defined]
        counted = "pixels" if result.task == "segmentation" else "images"
        style.save(confusion(matrix, result.classes, groups, counted=counted), out / "confusion.png")  # type: ignore[attr-defined]


def show_classification(metrics: Metrics) -> None:
    """Print the scores, the classes with the lowest accuracy, and the pairs confused most."""
    titles = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
    scores = {name: value for name, value in metrics.items() if isinstance(value, float) and name != "loss"}
    rows = [(titles.get(name, name), f"{share:.2%}") for name, share in scores.items()]
    rows += [("loss", f"{metrics['loss']:.4f}"), ("images", f"{metrics['count']:,}")]
    table("", {"metric": "left", "": "right"}, rows)
    columns = {"accuracy": "right", "images": "right"}
    if metrics["per_group"]:
        grouping, groups = min(metrics["per_group"].items(), key=lambda item: len(item[1]))
        table(
            f"accuracy of classes, by {grouping}", {grouping: "left", **columns}, _accuracies(groups.items())
        )
    classes = {name: scores for name, scores in metrics["per_class"].items() if scores["count"]}
    if max(scores["count"] for scores in classes.values()) > 1:  # with one image a class none is the lowest
        worst = sorted(classes, key=lambda name: (classes[name]["accuracy"], -classes[name]["count"]))[:WORST]
        table("lowest accuracy", {"class": "left", **columns}, _accuracies((n, classes[n]) for n in worst))
    _show_confused(metrics, "images", str)
    _report_skipped(metrics)


def show_segmentation(metrics: Metrics) -> None:
    """Print the scores, the classes from the lowest IoU, and the pairs confused most."""
    titles = {"miou": "mIoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean class accuracy"}
    rows = [(title, f"{metrics[name]:.2%}") for name, title in titles.items()]
    table("", {"metric": "left", "": "right"}, [*rows, ("pixels", f"{metrics['count']:,}")])
    classes = {n: scores for n, scores in metrics["per_class"].items() if scores["iou"] is not None}
    few = len(classes) <= 2 * WORST
    shown = list(classes) if few else sorted(classes, key=lambda name: classes[name]["iou"])[:WORST]
    table(
        "" if few else f"lowest IoU, {WORST} of {len(classes)} classes",
        {"class": "left", "IoU": "right", "accuracy": "right", "share of pixels": "right"},
        (
            (
                name,
                f"{classes[name]['iou']:.1%}",
                f"{classes[name]['accuracy']:.1%}" if classes[name]["count"] else "-",
                percent(classes[name]["count"] / metrics["count"]),
            )
            for name in shown
        ),
    )
    _show_confused(metrics, "share of pixels", lambda count: f"{count / metrics['count']:.2%}")
    _report_skipped(metrics)


def show_reconstruction(metrics: Metrics) -> None:
    """Print the scores."""
    titles = {
        "psnr": "PSNR (dB)",
        "ssim": "SSIM",
        "l1": "mean absolute error, of [-1, 1]",
        "perceptual": "perceptual distance",
        "frechet": "Fréchet distance",
        "kernel": "kernel distance",
    }
    rows = [
        (titles.get(name, name.replace("_", " ")), f"{value:.4f}")
        for name, value in metrics.items()
        if isinstance(value, float)
    ]
    table("", {"metric": "left", "": "right"}, [*rows, ("images", f"{metrics['count']:,}")])
    if "frechet" in metrics:
        layer = metrics["identity"]["extractor"]["layer"]
        print(f"Fréchet and kernel distance are in features of {metrics['extractor']} ({layer})")
    _report_skipped(metrics)


def _accuracies(scores: Iterable[tuple[str, Metrics]]) -> Iterator[tuple[str, str, str]]:
    return ((name, f"{one['accuracy']:.0%}", f"{one['count']:,}") for name, one in scores)


def _show_confused(metrics: Metrics, heading: str, amount: Callable[[int], str]) -> None:
    if pairs := metrics["most_confused"][:WORST]:
        columns = {"truth": "left", "predicted as": "left", heading: "right"}
        rows = ((pair["truth"], pair["prediction"], amount(pair["count"])) for pair in pairs)
        table("most confused", columns, rows)


def _report_skipped(metrics: Metrics) -> None:
    for name, reason in metrics["skipped"].items():
        print(f"skipped: {name}: {reason}", file=sys.stderr)


SHOW = {
    "classification": show_classification,
    "segmentation": show_segmentation,
    "reconstruction": show_reconstruction,
}
