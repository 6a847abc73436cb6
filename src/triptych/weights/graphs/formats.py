"""ONNX, torch.export's PT2 and OpenVINO: how each is written, and run for a check. Their packages are imported when
they are needed."""

import contextlib
import importlib.util
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from triptych.errors import CheckpointError, ConfigError
from triptych.weights.graphs.parts import Graph

RunGraph = Callable[[Sequence[Tensor]], list[Tensor]]
"""Runs a graph that was read back."""
Metadata = dict[str, str]

MAX_EMBEDDED = 1_500_000_000  # bytes of weights inside an .onnx file, which protobuf limits to 2 GB


@dataclass(frozen=True)
class GraphFormat:
    """A format of graphs."""

    name: str
    title: str
    suffix: str
    second: str
    """What follows the file's stem or name in that of a second file, with the weights; "" if there is none."""
    packages: tuple[str, ...]
    """Packages to write and run it."""
    write: Callable[[ExportedProgram, Graph, Path, Metadata], None]
    read: Callable[[Path], RunGraph]

    def second_path(self, path: Path) -> Path | None:
        """Return the path of the file of weights that belongs to `path`, whether it exists or not."""
        if not self.second:
            return None
        return path.with_suffix(self.second) if self.name == "openvino" else Path(f"{path}{self.second}")

    def require_packages(self) -> None:
        """Raise a `ConfigError` if a package is missing."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise ConfigError(
                f"{self.title} needs {', '.join(missing)}, which is not installed: pip install 'triptych[export]'"
            )


def traced(graph: Graph, open_axes: tuple[str, ...]) -> ExportedProgram:
    """Return the program of a graph.

    Args:
        graph: its module is in evaluation mode, on the CPU, and needs no gradients.
        open_axes: axes that stay open: "batch", "height", "width", "tokens".
    """
    batch = 2 if "batch" in open_axes else 1  # an open axis of size 1 would become fixed
    shapes: list[Any] = []
    for item in graph.inputs.values():
        names = {0: "batch", **item.axes}
        shapes.append({axis: Dim.AUTO if name in open_axes else Dim.STATIC for axis, name in names.items()})
    # `Method` and `Denoising` take their inputs as *args, whose shapes are one tuple.
    spec: Any = _by_signature(graph, shapes)
    with without_messages(), torch.no_grad():
        return torch.export.export(graph.module, graph.examples(batch), dynamic_shapes=spec, strict=False)


def _by_signature(graph: Graph, shapes: list[Any]) -> tuple[Any, ...]:
    import inspect

    parameters = list(inspect.signature(graph.module.forward).parameters.values())
    named = sum(p.kind is not p.VAR_POSITIONAL for p in parameters[: len(shapes)])
    has_rest = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    return (*shapes[:named], tuple(shapes[named:])) if has_rest else tuple(shapes)


def _write_onnx(program: ExportedProgram, graph: Graph, path: Path, metadata: Metadata) -> None:
    with without_messages():
        onnx_program: Any = torch.onnx.export(
            program,
            dynamo=True,
            verbose=False,
            input_names=list(graph.inputs),
            output_names=_output_names(program, graph),
        )
    _name_axes(onnx_program.model, graph)
    onnx_program.model.metadata_props.update(metadata)
    numbers = sum(p.numel() * p.element_size() for p in graph.module.state_dict().values())
    onnx_program.save(str(path), external_data=numbers > MAX_EMBEDDED)


def _output_names(program: ExportedProgram, graph: Graph) -> list[str]:
    count = len(program.graph_signature.user_outputs)
    return [graph.output, *(f"{graph.output}_{i}" for i in range(1, count))]


def _name_axes(model: Any, graph: Graph) -> None:
    """Give the symbols of open axes, s34 and the like, the names of their axes."""
    names: dict[str, str] = {}
    for value, item in zip(model.graph.inputs, graph.inputs.values(), strict=True):
        for axis, name in {0: "batch", **item.axes}.items():
            if not isinstance(value.shape[axis], int):
                names.setdefault(str(value.shape[axis].value), name)
    values = [*model.graph.inputs, *(out for node in model.graph.all_nodes() for out in node.outputs)]
    for value in values:
        for axis, side in enumerate(value.shape or ()):
            if not isinstance(side, int) and str(side.value) in names:
                value.shape[axis] = names[str(side.value)]


def _read_onnx(path: Path) -> RunGraph:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        feed = {name: x.numpy() for name, x in zip(names, inputs, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, feed)]

    return run


def _write_pt2(program: ExportedProgram, graph: Graph, path: Path, metadata: Metadata) -> None:
    with without_messages():
        torch.export.save(program, path, extra_files=dict(metadata))


def _read_pt2(path: Path) -> RunGraph:
    with without_messages():
        module = torch.export.load(path).module()

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        output = module(*inputs)
        return list(output) if isinstance(output, list | tuple) else [output]

    return run


def _write_openvino(program: ExportedProgram, graph: Graph, path: Path, metadata: Metadata) -> None:
    """OpenVINO's converter reads the ONNX form: from torch's own it lacks some operators."""
    with without_messages():
        import openvino

    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        onnx_path = Path(folder) / "model.onnx"
        _write_onnx(program, graph, onnx_path, {})
        model = openvino.convert_model(onnx_path)
        for key, value in metadata.items():
            model.set_rt_info(value, [key])
        openvino.save_model(model, path, compress_to_fp16=False)


def _read_openvino(path: Path) -> RunGraph:
    with without_messages():
        import openvino

    # In fp32: on some CPUs OpenVINO computes in bf16 by default.
    compiled = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})

    def run(inputs: Sequence[Tensor]) -> list[Tensor]:
        result = compiled([x.numpy() for x in inputs])
        return [torch.from_numpy(result[output].copy()) for output in compiled.outputs]

    return run


FORMATS = {
    item.name: item
    for item in (
        GraphFormat(
            "onnx", "ONNX", ".onnx", ".data", ("onnx", "onnxscript", "onnxruntime"), _write_onnx, _read_onnx
        ),
        GraphFormat("pt2", "PT2", ".pt2", "", (), _write_pt2, _read_pt2),
        GraphFormat(
            "openvino",
            "OpenVINO",
            ".xml",
            ".bin",
            ("openvino", "onnx", "onnxscript"),
            _write_openvino,
            _read_openvino,
        ),
    )
}


@contextlib.contextmanager
def without_messages() -> Iterator[None]:
    """Silence what exporters print about themselves, and undo the logging that importing some of them configures."""
    root, handlers = logging.getLogger(), list(logging.getLogger().handlers)
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    before = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
            root.handlers[:] = handlers


def metadata_of(net: Any, graph: Graph) -> Metadata:
    """Return what a graph's file says about its use, as JSON by key: preprocessing, classes, sizes of inputs.

    Raises:
        CheckpointError: the card holds what JSON cannot.
    """
    from triptych.config import to_json
    from triptych.version import __version__

    card = net.card
    sizes = {
        name: {"axes": {"0": "batch", **{str(a): n for a, n in item.axes.items()}}, "multiple": item.multiple}
        for name, item in graph.inputs.items()
    }
    values = {"producer": f"triptych {__version__}", "inputs": sizes}
    if "images" in graph.inputs:
        values["preprocess"] = to_json(card.preprocess)
    if card.classes:
        values["classes"] = list(card.classes)
    if card.license:
        values["license"] = card.license
    try:
        return {
            key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
            for key, value in values.items()
        }
    except (TypeError, ValueError) as problem:
        raise CheckpointError(
            f"the model card cannot be written as JSON: {problem}; correct net.card"
        ) from problem
