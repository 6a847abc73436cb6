"""`kernels/` is the only place for private names of PyTorch."""

import ast
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

SOURCE = Path(__file__).parents[2] / "src" / "triptych"


def private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@cache
def torch_attributes() -> frozenset[str]:
    """Return private attributes of PyTorch's modules and of its most common objects."""
    parameter = nn.Parameter(torch.zeros(1))
    loader = DataLoader([0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchdata 0.11 calls deprecated functions of torch
        stateful = StatefulDataLoader([0])
    objects = [
        torch.autograd.forward_ad,
        parameter,
        nn.Linear(1, 1),
        torch.optim.AdamW([parameter]),
        torch.optim.lr_scheduler.LRScheduler,
        torch.Generator(),
        loader,
        iter(loader),
        torch.utils.data.dataloader._MultiProcessingDataLoaderIter,
        stateful,
    ]
    return frozenset(name for thing in objects for name in dir(thing) if private(name))


def private_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each private import from torch, and of each attribute named like one of torch's own."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute) and node.attr in torch_attributes():
            yield node.lineno, node.attr
            continue
        elif (
            isinstance(node, ast.Attribute) and private(node.attr) and ast.unparse(node).startswith("torch.")
        ):
            yield node.lineno, ast.unparse(node)
            continue
        else:
            continue
        for name in names:
            if name.split(".")[0] in ("torch", "torchdata") and any(map(private, name.split("."))):
                yield node.lineno, name


def strings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield names that are passed to `getattr` and its relatives."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            for argument in node.args[1:2]:
                if isinstance(argument, ast.Constant) and argument.value in torch_attributes():
                    yield node.lineno, argument.value


def test_private_names_of_torch_are_in_kernels_only():
    findings = []
    for path in sorted(SOURCE.rglob("*.py")):
        if SOURCE / "kernels" not in path.parents:
            tree = ast.parse(path.read_text(encoding="utf-8"))
            findings += [
                f"{path.relative_to(SOURCE)}:{line}: {name}"
                for line, name in (*private_uses(tree), *strings(tree))
            ]
    assert findings == [], "use a public way, or put a named function into triptych/kernels"


def test_private_names_are_recognized():
    source = (
        "import torch._dynamo.config as config\n"
        "from torch.utils._python_dispatch import TorchDispatchMode\n"
        "from torch import _foreach_norm\n"
        "module._parameters\n"
        "torch.ops.mkldnn._linear_pointwise\n"
        "iterator._shutdown_workers()\n"
        "self._own\n"
        "getattr(net, '_buffers')\n"
    )
    tree = ast.parse(source)
    lines = [line for line, _ in (*private_uses(tree), *strings(tree))]
    assert sorted(lines) == [1, 2, 3, 4, 5, 6, 8]
