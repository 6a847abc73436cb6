"""`triptych bench int8`: time, memory and accuracy of 8-bit weights, compared with bf16 and fp32."""

import copy
import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from triptych.bench.harness import machine
from triptych.bench.harness.forward import Effort
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.suite import suite
from triptych.bench.suites.approximate import compare
from triptych.data.builtin import emoji
from triptych.models.registry import create
from triptych.network import Network
from triptych.pipelines.base import batches
from triptych.pipelines.classification import ClassificationPipeline
from triptych.pipelines.image_input import batched, fitted
from triptych.torch_compile import compile_blocks
from triptych.training import evaluate
from triptych.weights import load, quantize
from triptych.weights.quantization import SCHEMES

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan(Effort):
    """What is measured, and for how long."""

    networks: tuple[str, ...] = ("vit-s16", "vit-b16", "swin-t")
    compiled: tuple[str, ...] = ("vit-s16",)
    """Networks that are also measured compiled."""
    changes: tuple[tuple[str, Any], ...] = ()
    """Fields of the networks' configs that are changed."""
    batch: int = 4
    rounds: int = 5
    model: str = "vit-emoji"
    """Classifier whose accuracy is measured, on the test split of the built-in data."""
    stride: int = 1
    """Compare the logits of every n-th image."""
    accuracy: bool = True


FULL = Plan()
TINY = (("depth", 2), ("embed_dim", 48), ("num_heads", 3), ("mlp_ratio", 2.0), ("image_size", 32))
QUICK = Plan(networks=("vit-s16",), compiled=(), changes=TINY, batch=2, rounds=1, stride=100, accuracy=False)


@suite("int8", FULL)
def run(report: Report, plan: Plan) -> None:
    """Measure everything in the plan."""
    report.tables = [speed(plan), accuracy(plan)]
    report.notes = [
        "int8 means `triptych.quantize`: the weights of the blocks' linear layers are stored as integers with one "
        f"scale per row, by torchao {machine.version_of('torchao')}; dynamic also quantizes activations. It saves "
        "memory."
    ]


def make(name: str, **changes: Any) -> Network:
    """Create a network with random weights, none of them zero."""
    torch.manual_seed(0)
    net = create(name, **changes).eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return net


def megabytes(net: nn.Module) -> float:
    """Return the size of all weights, including scales, in MB."""
    total = 0
    for parameter in net.parameters():
        held = getattr(parameter, "tensor_data_names", None)
        total += sum(getattr(parameter, name).nbytes for name in held) if held else parameter.nbytes
    return total / 1e6


@torch.inference_mode()
def speed(plan: Plan) -> Table:
    """Time a forward pass of each network in each precision, relative to bf16."""
    result = Table(
        title="Speed and memory",
        description=(
            f"Seconds per forward pass of {plan.batch} images, with random weights and inputs. Ratios are to bf16, "
            "eager."
        ),
        columns=[
            Column(key="network", heading="network"),
            Column(key="what", heading="form"),
            Column(key="seconds", heading="seconds", form=".3g"),
            Column(key="ratio", heading="time / bf16", form=".2f"),
            Column(key="megabytes", heading="weights, MB", form=".1f"),
        ],
    )
    for name in plan.networks:
        exact = make(name, **dict(plan.changes))
        bf16 = copy.deepcopy(exact).bfloat16()
        forms: dict[str, Network] = {"bf16": bf16, "fp32": exact}
        forms |= {f"bf16, {scheme}": quantize(bf16, scheme) for scheme in SCHEMES}  # type: ignore[arg-type]
        if name in plan.compiled:
            for form in ("bf16", *(f"bf16, {scheme}" for scheme in SCHEMES)):
                forms[f"{form}, compiled"] = again = copy.deepcopy(forms[form])
                compile_blocks(again)
        size = exact.config.image_size
        x = torch.randn(plan.batch, 3, *size, generator=torch.Generator().manual_seed(1))
        sides: dict[str, Callable[[], object]] = {
            form: functools.partial(net, x if form == "fp32" else x.bfloat16()) for form, net in forms.items()
        }
        for work in sides.values():
            work()  # compiles
        for row in compare(sides, plan.rounds, {}):
            result.rows.append(row | {"network": name, "megabytes": megabytes(forms[row["what"]])})
    return result


def accuracy(plan: Plan) -> Table:
    """Measure the accuracy of `plan.model` with 8-bit weights, in fp32 so that nothing else differs."""
    result = Table(
        title=f"Accuracy of {plan.model}",
        description=(
            "In fp32 on the emoji of the test split. The difference of logits is the mean absolute difference, divided "
            "by the mean absolute value of the exact logits."
        ),
        columns=[
            Column(key="what", heading="form"),
            Column(key="top1", heading="top-1", form=".2%"),
            Column(key="group", heading="group", form=".2%"),
            Column(key="same", heading="same first class", form=".2%"),
            Column(key="apart", heading="difference of logits", form=".2%"),
            Column(key="megabytes", heading="weights, MB", form=".1f"),
        ],
    )
    exact = load(plan.model)
    forms: dict[str, Network] = {"fp32": exact} | {scheme: quantize(exact, scheme) for scheme in SCHEMES}  # type: ignore[arg-type]
    pipes = {form: ClassificationPipeline(net, dtype="fp32") for form, net in forms.items()}
    source = emoji.emoji("test")
    logits = {}
    for form, pipe in pipes.items():
        fed = (fitted(source[i].image, exact.card.preprocess) for i in range(0, len(source), plan.stride))
        outputs = [pipe.logits(batched(group, exact.card.preprocess)) for group in batches(fed, 64)]
        logits[form] = torch.cat(outputs)
    for form, net in forms.items():
        metrics = evaluate(net, "emoji", dtype="fp32", workers=0).metrics() if plan.accuracy else {}
        apart = (logits[form] - logits["fp32"]).abs().mean() / logits["fp32"].abs().mean()
        same = (logits[form].argmax(1) == logits["fp32"].argmax(1)).float().mean()
        row = {"what": form, "top1": metrics.get("top1"), "group": metrics.get("group")}
        result.rows.append(row | {"apart": float(apart), "same": float(same), "megabytes": megabytes(net)})
        log.info("%s: top-1 %s, logits %.2g apart", form, metrics.get("top1"), float(apart))
    return result
