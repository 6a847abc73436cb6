"""Write a network as graphs that are checked first: read back, run, and compared with the network."""

import contextlib
import copy
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from triptych.atomic_write import fsync_folder, storage_error
from triptych.errors import CheckpointError, ConfigError, StorageError, TriptychError
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.weights.graphs.formats import FORMATS, GraphFormat, Metadata, metadata_of, traced
from triptych.weights.graphs.parts import Graph, graphs_of
from triptych.weights.graphs.pipeline import PIPELINE_FILE, write_pipeline

log = logging.getLogger(__name__)

Dynamic = Literal["size", "batch", "none"]
OPEN_AXES: dict[Dynamic, tuple[str, ...]] = {
    "size": ("batch", "tokens", "height", "width"),
    "batch": ("batch",),
    "none": (),
}
TOLERANCE = 1e-3
"""Largest difference between graph and network, as a share of the largest output."""


@dataclass(frozen=True)
class ExportedGraph:
    """A graph that was written."""

    path: Path
    format: str
    dynamic: Dynamic
    """What is open: batch, height and width; the batch; nothing."""
    difference: float
    """Largest difference from the network's outputs."""
    largest: float
    """Largest absolute output of the network."""
    shapes: list[list[tuple[int, ...]]]
    """Shapes of the inputs that were compared."""
    note: str = ""
    """What was requested and could not be done, and why."""


def format_for(path: Path) -> str | None:
    """Return the graph format that a file's suffix stands for, or None."""
    return next((name for name, item in FORMATS.items() if item.suffix == path.suffix), None)


def export_graphs(
    net: nn.Module,
    path: str | os.PathLike[str],
    format: str | None = None,
    dynamic: Dynamic = "size",
    size: tuple[int, int] | None = None,
) -> list[ExportedGraph]:
    """Write a network as ONNX, PT2 or OpenVINO graphs in fp32.

    Each graph is read back from the disk, run by onnxruntime, torch.export or OpenVINO, and compared with the network,
    at a second size too if sizes are open. Only then it gets its name, so that no incomplete or wrong file is left.

    Args:
        net: a network of this package. It is not changed.
        path: a file .onnx, .pt2 or .xml; for a folder (required for networks of several graphs: autoencoders and latent
            diffusion models) give the format.
        format: "onnx", "pt2" or "openvino"; None is that of the suffix.
        dynamic: what another input may differ in: "size" batch, height and width (and the number of tokens); "batch";
            "none". What the format cannot keep open is fixed, which the result's `note` says.
        size: height and width in pixels to export at: the only ones if they are not open. None is the model card's.

    Returns:
        What was written, with the largest difference from the network.

    Raises:
        ConfigError: an unknown format or size, a missing package, or several graphs for one file.
        CheckpointError: the network cannot be exported, or the graph computes something else.
        StorageError: the files cannot be written.
    """
    path = Path(path)
    target_format = _format(path, format)
    if dynamic not in OPEN_AXES:
        raise ConfigError(f"dynamic is {dynamic!r}, which must be one of {', '.join(OPEN_AXES)}")
    target_format.require_packages()
    if any(hasattr(p, "tensor_data_names") for p in net.parameters()):  # torchao's
        raise ConfigError("a quantized network has no graph; export the network that it was made from")
    exported = _plain_copy(net)
    graphs = graphs_of(exported, size)
    is_file = path.suffix == target_format.suffix
    if is_file and len(graphs) > 1:
        raise ConfigError(
            f"{type(net).__name__} has {len(graphs)} graphs ({', '.join(g.name for g in graphs)}), and {path.name} is "
            f"one file; give a folder, and the format {target_format.name}"
        )
    destination = path.parent if is_file else path
    if destination.exists() and not destination.is_dir():
        raise StorageError(f"{destination} is a file, and a folder is needed; give another path")
    with torch.no_grad(), _staging(path.parent if is_file else path, path.name) as folder:
        results = [
            _export(
                exported,
                graph,
                folder / (path.name if is_file else f"{graph.name}{target_format.suffix}"),
                target_format,
                dynamic,
            )
            for graph in graphs
        ]
        if isinstance(exported, LatentDiffusion):
            write_pipeline(
                exported, folder, {g.name: r.path.name for g, r in zip(graphs, results, strict=True)}
            )
        _publish(folder, destination, [target_format.second_path(destination / r.path.name) for r in results])
    return [replace(result, path=destination / result.path.name) for result in results]


def _format(path: Path, name: str | None) -> GraphFormat:
    by_suffix = format_for(path)
    if name is None and by_suffix is None:
        raise ConfigError(
            f"{path.name} has no suffix of a graph; give .onnx, .pt2 or .xml, or a folder and a format"
        )
    if name is not None and name not in FORMATS:
        raise ConfigError(f"no graph format is called {name!r}; choose one of {', '.join(FORMATS)}")
    result = FORMATS[name or by_suffix or ""]
    if path.suffix and path.suffix != result.suffix and not path.is_dir():
        raise ConfigError(f"{result.title} is written to {result.suffix} or to a folder, not to {path.name}")
    return result


def _plain_copy(net: nn.Module) -> Any:
    """Return a copy in evaluation mode, in fp32, on the CPU, without gradients."""
    dtype = next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)
    if dtype != torch.float32:
        log.info("the graph is written in fp32, the network is %s", str(dtype).removeprefix("torch."))
    return copy.deepcopy(net).to("cpu", torch.float32).eval().requires_grad_(False)


def _export(net: Any, graph: Graph, path: Path, format: GraphFormat, dynamic: Dynamic) -> ExportedGraph:
    """Write a graph to `path` and check it, with as many open axes as it can have."""
    metadata, note = metadata_of(net, graph), ""
    has_size = any(item.axes for item in graph.inputs.values())
    levels: list[Dynamic] = list(OPEN_AXES)[list(OPEN_AXES).index(dynamic) :]  # type: ignore[arg-type]
    if not has_size and levels[0] == "size":
        levels = levels[1:]
    for level in levels:
        try:
            return _attempt(graph, path, format, level, metadata, note)
        except (OSError, MemoryError):
            raise
        except Exception as problem:  # exporters and runtimes raise anything
            reason = _first_line(problem)
            if level == "none":
                raise CheckpointError(
                    f"{graph.name} cannot be written as {format.title}: {reason}"
                ) from problem
            fixed = "height and width are" if level == "size" else "the batch is"
            note = f"{fixed} fixed in {path.name}: {reason}"
            log.info("%s", note)
    raise AssertionError("unreachable")


def _attempt(
    graph: Graph, path: Path, format: GraphFormat, level: Dynamic, metadata: Metadata, note: str
) -> ExportedGraph:
    metadata = metadata | {"dynamic": level}
    format.write(traced(graph, OPEN_AXES[level]), graph, path, metadata)
    inputs = [graph.examples(1)]
    if level != "none":
        inputs = [graph.examples(2), graph.examples(3, graph.other_sizes() if level == "size" else None)]
    difference, largest, run = 0.0, 0.0, format.read(path)
    for example in inputs:
        theirs, ours = run(example), graph.module(*example)
        ours = list(ours) if isinstance(ours, list | tuple) else [ours]
        for a, b in zip(theirs, ours, strict=True):
            one_difference, one_largest = _compare(a, b)
            difference, largest = max(difference, one_difference), max(largest, one_largest)
            if not one_difference <= TOLERANCE * max(one_largest, TOLERANCE):
                shape = " x ".join(map(str, example[0].shape))
                raise CheckpointError(
                    f"{format.title} computes something else than the network for an input of {shape}: they differ by "
                    f"{one_difference:.2g} in outputs up to {one_largest:.2g}"
                )
    shapes = [[tuple(x.shape) for x in example] for example in inputs]
    return ExportedGraph(path, format.name, level, difference, largest, shapes, note)


def _compare(theirs: Tensor, ours: Tensor) -> tuple[float, float]:
    """Return the largest difference, infinite for other shapes, and the largest of our outputs."""
    largest = float(ours.abs().max()) if ours.numel() else 0.0
    return (float((theirs - ours).abs().max()) if theirs.shape == ours.shape else float("inf")), largest


@contextlib.contextmanager
def _staging(parent: Path, name: str) -> Iterator[Path]:
    """Yield a temporary folder on the disk of the destination; it is removed afterwards."""
    near = parent
    while not near.exists():
        near = near.parent
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".part", dir=near))
    except OSError as problem:
        raise storage_error(near, problem) from problem
    try:
        yield folder
    except OSError as problem:
        raise storage_error(parent / name, problem) from problem
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _publish(folder: Path, destination: Path, weights: list[Path | None]) -> None:
    """Move all files of `folder` to their destination. What names others comes last, and is removed first, so that it
    never names files of an earlier export."""
    destination.mkdir(parents=True, exist_ok=True)
    seconds = {path.name for path in weights if path is not None}
    files = sorted(
        (p.name for p in folder.iterdir()), key=lambda name: (name == PIPELINE_FILE, name not in seconds)
    )
    for name in reversed(files):
        (destination / name).unlink(missing_ok=True)
    for name in seconds - set(files):  # of an earlier export
        (destination / name).unlink(missing_ok=True)
    for name in files:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
        os.replace(folder / name, destination / name)
    fsync_folder(destination)


def _first_line(problem: BaseException) -> str:
    """Return the reason of an exporter's error, which may have pages."""
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    if not isinstance(problem, TriptychError):
        cause = problem.__cause__
        if cause is not None and str(cause).strip():
            lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return (lines[0] if lines else type(problem).__name__)[:200]


def results_json(results: list[ExportedGraph]) -> list[dict[str, Any]]:
    """Return JSON values of results."""
    return [json.loads(json.dumps(vars(result) | {"path": str(result.path)})) for result in results]
