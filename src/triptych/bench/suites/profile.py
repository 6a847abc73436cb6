"""`triptych bench profile`: where the time of forward passes and training steps goes, and the time of other attention
implementations."""

import logging
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from triptych.bench.harness.forward import DTYPES, Effort, measure_peaks
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.suite import suite
from triptych.bench.measurements.attention_kernels import SHAPES, Shape, attending
from triptych.bench.measurements.train_step import training_step
from triptych.bench.suites import ldm, swin, train, vit
from triptych.bench.suites.swin import Plan as SwinPlan
from triptych.bench.suites.train import Plan as TrainPlan
from triptych.bench.suites.vit import Plan as ViTPlan
from triptych.layers.resnet import packed
from triptych.models.configs import swin as swin_config
from triptych.models.configs import vit as vit_config
from triptych.models.configs.latent_diffusion import SIZES, LatentDiffusionConfig

log = logging.getLogger(__name__)

# Categories of operators, by the first pattern that the name matches.
CATEGORIES = (
    ("attention", "scaled_dot_product|flash_attention"),
    ("optimizer", "fused_adamw|_foreach"),
    ("products", r"::(mm|addmm|bmm|baddbmm|matmul)$|linear|convolution|conv2d"),
    ("norms, softmax", "norm|softmax"),
    ("copies", "copy|::cat$|roll|index|::stack$|fill|zero|::empty|::clone$|resize"),
    ("by element", "aten::|mkldnn::"),
)


@dataclass(frozen=True, kw_only=True)
class Plan(Effort):
    """The calls that are profiled."""

    vit: ViTPlan = field(default_factory=lambda: ViTPlan(networks=("vit-b16",)))
    swin: SwinPlan = field(default_factory=SwinPlan)
    ldm: LatentDiffusionConfig = SIZES["sd1"]
    train: TrainPlan = field(default_factory=TrainPlan)
    batch: int = 8
    attention: dict[str, Shape] = field(default_factory=lambda: SHAPES)
    compiled: bool = True
    """Also measure compiled attention."""
    passes: int = 3
    rounds: int = 5
    patience: float = 20.0
    sides: tuple[int, ...] = (1024, 2048)


FULL = Plan()
QUICK = Plan(
    vit=vit.QUICK,
    swin=swin.QUICK,
    ldm=ldm.TINY,
    train=train.QUICK,
    batch=2,
    attention={"tiny": (2, 2, 64, 16)},
    compiled=False,
    passes=1,
    rounds=1,
    seconds=0.0,
    patience=0.0,
    sides=(256,),
    copied=2**22,
)


@suite("profile", FULL)
def run(report: Report, plan: Plan) -> None:
    """Profile everything in the plan."""
    peaks, limits = measure_peaks(plan)
    categories = [name for name, _ in CATEGORIES]
    table = Table(
        title="Where the time goes",
        description=(
            "Fractions of the time of a call by PyTorch's operators, by their own time in torch.profiler, which slows "
            "down many small ones; the rest is Python and waiting. Utilization refers to the time of the call, as in "
            "the other sections; that of products refers to their own time: where it is near 100%, only fewer "
            "products would be faster."
        ),
        columns=[
            Column(key="what", heading="call"),
            Column(key="dtype", heading="precision"),
            Column(key="seconds", heading="s", form=".3g"),
            *(Column(key=name, heading=name, form=".0%") for name in (*categories, "rest")),
            Column(key="utilization", heading="utilization", form=".0%"),
            Column(key="of products", heading="of products", form=".0%"),
        ],
    )
    with tempfile.TemporaryDirectory() as folder:
        for what, label, call, flops in calls(plan, Path(folder)):
            seconds, own = profiled(call, plan.passes)
            shares = {name: own[name] / seconds for name in categories}
            row: dict[str, Any] = {"what": what, "dtype": label, "seconds": seconds, **shares}
            row["rest"] = max(0.0, 1 - sum(shares.values()))
            row["utilization"] = flops / seconds / peaks[label]
            multiplied = own["products"] + own["attention"]
            row["of products"] = flops / multiplied / peaks[label] if multiplied else None
            table.rows.append(row)
            log.info("%s, %s: %s", what, label, {name: f"{share:.0%}" for name, share in shares.items()})
    report.tables = [limits, table, attending(plan.attention, plan.compiled, plan)]


def calls(plan: Plan, folder: Path) -> Iterator[tuple[str, str, Callable[[], object], float]]:
    """Yield the calls to profile: name, precision, function, and FLOPs of a call."""
    for label, dtype in DTYPES.items():
        forwards: list[tuple[str, Any, Any]] = [
            (plan.vit.networks[0], vit.make(plan.vit, plan.vit.networks[0]), vit_config.macs),
            (plan.swin.network, swin.make(plan.swin), swin_config.macs),
        ]
        for name, net, macs in forwards:
            net = net.to(dtype)
            x = vit.images(net, plan.batch, dtype)

            @torch.inference_mode()
            def forward(net: Any = net, x: Any = x) -> object:
                return net(x)

            with packed(net):
                yield f"{name}, {plan.batch} images", label, forward, 2.0 * plan.batch * macs(net.config)
    yield from diffusion_calls(plan.ldm)
    tasks = [*train.diffusion_tasks(plan.train, folder, ()), *train.classifier_tasks(plan.train, folder, ())]
    for task in tasks:
        for label, dtype in DTYPES.items():
            step = training_step(task.what, "ours", task.folder, task.size, dtype)
            yield f"a training step: {task.name}", label, step, 6.0 * task.macs


def diffusion_calls(config: LatentDiffusionConfig) -> Iterator[tuple[str, str, Callable[[], object], float]]:
    """Yield the calls of image generation: a step of the denoiser, as with guidance, and the decoder."""
    step, decode = ldm.step_flops(config), ldm.decode_flops(config)
    for label, dtype in DTYPES.items():
        net: Any = ldm.make(config).to(dtype)
        (x, t, context), z = ldm.step_inputs(config, dtype), ldm.latent(config, dtype)
        with torch.inference_mode():
            once = net.network.project_context(context)

        @torch.inference_mode()
        def denoise(net: Any = net, x: Any = x, t: Any = t, once: Any = once) -> object:
            return net.network(x, t, once)

        @torch.inference_mode()
        def decoded(net: Any = net, z: Any = z) -> object:
            return net.autoencoder.decode(z)

        with packed(net.network):
            yield "a pass of the UNet, two latents", label, denoise, step
        yield "a decoder's, one image", label, decoded, decode


def profiled(call: Callable[[], object], passes: int) -> tuple[float, Counter[str]]:
    """Return the seconds of a call, and the seconds of each category of operators within it."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        start = time.perf_counter()
        for _ in range(passes):
            call()
        seconds = (time.perf_counter() - start) / passes
    own: Counter[str] = Counter()
    for event in profile.key_averages():
        category = next((name for name, pattern in CATEGORIES if re.search(pattern, event.key)), None)
        if category is not None:
            own[category] += event.self_cpu_time_total / 1e6 / passes
    return seconds, own
