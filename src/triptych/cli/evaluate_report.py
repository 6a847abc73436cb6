"""Summaries of what `triptych.evaluate` returns: metrics.json, the confusion matrix, and tables on stdout."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from triptych.cli.output import percent, plain, table

WORST = 10  # lines in each list on the screen
PAIRS = 100  # pairs of confused classes in metrics.json

Metrics = dict[str, Any]


def summarize_classification(result: Metrics) -> Metrics:
    """Return the metrics of a classifier by class and group name, with the confusion matrix as its largest pairs."""
    names = result["classes"]
    arrays = ("per_class", "per_class_count", "confusion", "classes", "bad", "groupings")
    return {
        **{name: value for name, value in result.items() if name not in arrays},
        "per_class": {
            name: {"accuracy": accuracy, "count": count}
            for name, accuracy, count in zip(
                names, result["per_class"], result["per_class_count"], strict=True
            )
        },
        "per_group": {
            grouping: by_group(groups, result["per_class"], result["per_class_count"])
            for grouping, groups in result["groupings"].items()
        },
        "most_confused": _most_confused(result),
        "skipped": result["bad"],
    }


def summarize_segmentation(result: Metrics) -> Metrics:
    """Return the metrics of a segmenter by class name; counts are pixels."""
    per_class = zip(
        result["classes"],
        result["per_class_iou"],
        result["per_class_accuracy"],
        result["per_class_count"],
        strict=True,
    )
    return {
        **{name: result[name] for name in ("task", "count", "miou", "pixel_accuracy", "mean_accuracy")},
        "per_class": {
            name: {"iou": iou, "accuracy": accuracy, "count": count}
            for name, iou, accuracy, count in per_class
        },
        "most_confused": _most_confused(result),
        "skipped": result["bad"],
    }


def summarize_reconstruction(result: Metrics) -> Metrics:
    """Return the metrics of an autoencoder."""
    metrics = {name: value for name, value in result.items() if name != "bad"}
    return {**metrics, "skipped": result["bad"]}


def _most_confused(result: Metrics) -> list[Metrics]:
    from triptych.metrics.classification import most_confused

    names, matrix = result["classes"], result["confusion"]
    pairs = [] if matrix is None else most_confused(matrix, PAIRS)
    return [
        {"truth": names[truth], "prediction": names[predicted], "count": count}
        for truth, predicted, count in pairs
    ]


def by_group(
    groups: Sequence[str], accuracies: Sequence[float], counts: Sequence[int]
) -> dict[str, dict[str, Any]]:
    """Return for each group the share of its images whose class, not just group, was predicted.

    Args:
        groups: the group of each class.
        accuracies, counts: of each class.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, accuracy, count in zip(groups, accuracies, counts, strict=True):
        if count:
            group = result.setdefault(name, {"accuracy": 0.0, "count": 0})
            group["accuracy"] += float(accuracy) * int(count)
            group["count"] += int(count)
    for group in result.values():
        group["accuracy"] /= group["count"]
    return result


def write(metrics: Metrics, result: Metrics, out: Path) -> None:
    """Write metrics.json, and confusion.png where there are classes."""
    from triptych.atomic_write import write_text_atomically
    from triptych.plots import style
    from triptych.plots.confusion import confusion

    text = json.dumps(plain(metrics), indent=1, ensure_ascii=False) + "\n"
    write_text_atomically(out / "metrics.json", text)
    if result.get("confusion") is not None:
        # The coarsest grouping orders many classes best.
        groups = min(result["groupings"].values(), key=lambda names: len(set(names)), default=None)
        counted = "pixels" if result["task"] == "segmentation" else "images"
        figure = confusion(result["confusion"], result["classes"], groups, counted=counted)
        style.save(figure, out / "confusion.png")


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
    classes = {n: scores for n, scores in metrics["per_class"].items() if scores["iou"] == scores["iou"]}
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


class TaskReport(NamedTuple):
    """How the result of a task is summarized and printed."""

    summarize: Callable[[Metrics], Metrics]
    show: Callable[[Metrics], None]


REPORTS = {
    "classification": TaskReport(summarize_classification, show_classification),
    "segmentation": TaskReport(summarize_segmentation, show_segmentation),
    "reconstruction": TaskReport(summarize_reconstruction, show_reconstruction),
}
