"""`triptych bench ldm`: a step of the denoiser, the decoder, whole pictures, loading and starting, beside diffusers."""

import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from triptych.bench.harness import machine
from triptych.bench.harness.forward import (
    DTYPES,
    HOW,
    TOLERANCES,
    Effort,
    beside,
    compare_seconds,
    frozen,
    measure_peaks,
)
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.suite import suite
from triptych.bench.measurements.image_generation import painting, starting
from triptych.bench.peers import build as peers
from triptych.bench.peers.readers import diffusers_part
from triptych.layers.resnet import packed
from triptych.models.configs.latent_diffusion import SIZES, LatentDiffusionConfig
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.unet import UNet
from triptych.network import Network, on_meta_device
from triptych.weights import export, load, save

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Plan(Effort):
    """What is measured, and for how long."""

    config: LatentDiffusionConfig = SIZES["sd1"]
    dtypes: tuple[str, ...] = ("fp32", "bf16")
    compiled: bool = False
    """Steps of compiled networks too, which takes minutes for each side and precision."""
    steps: tuple[int, int] | None = None
    """Of a whole picture, ours and theirs; none is each one's default, 30 and 50."""
    pictures: int = 2
    """Whole pictures of each."""
    rounds: int = 5
    patience: float = 60.0
    peers: tuple[str, ...] = ("diffusers",)


def small(config: LatentDiffusionConfig) -> LatentDiffusionConfig:
    """The same form with few channels and no depth, for pictures an eighth as wide and high."""
    assert config.text_encoder is not None
    sizes = {"base_channels": 32, "norm_groups": 16, "num_res_blocks": 1}
    side = config.image_size[0] // config.autoencoder.downsample_factor // 8
    return replace(
        config,
        network=replace(config.network, context_dim=32, latent_size=(side, side), **sizes),
        autoencoder=replace(
            config.autoencoder, image_size=(side * config.autoencoder.downsample_factor,) * 2, **sizes
        ),
        text_encoder=replace(config.text_encoder, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2.0),
    )


TINY = small(SIZES["sd1"])
FULL = Plan()
SHORT = Plan(dtypes=("bf16",), steps=(3, 5), pictures=1, rounds=3, seconds=0.0, patience=0.0, sides=(1024,))
QUICK = Plan(
    config=TINY, steps=(2, 3), pictures=1, rounds=1, seconds=0.0, patience=0.0, sides=(256,), copied=2**22
)


@suite("ldm", FULL)
def run(report: Report, plan: Plan) -> None:
    """Measure everything in the plan."""
    available, report.notes = peers.present(plan.peers)
    compare = available == plan.peers
    if compare and machine.version_of("accelerate") is None:
        report.notes.append(
            "accelerate is not installed: diffusers fills its networks with random numbers before it loads them."
        )
    with tempfile.TemporaryDirectory() as place:
        folder, tiny = Path(place), Path(place) / "tiny"
        write(plan.config, folder, compare)
        write(TINY, tiny, compare)
        # The programs come first: they are best measured while this one is small.
        started = starting(
            {"Stable Diffusion 1": folder, "a tiny one": tiny}, compare, plan.rounds, plan.patience
        )
        generated = painting(folder, compare, plan.steps, plan.pictures)
        peaks, limits = measure_peaks(plan)
        step = table(
            "A step of the denoiser",
            "Seconds of one pass of the UNet over two latents, as guidance takes it: ours as its pipeline does, with "
            "keys and values of the prompt made before and weights packed for the CPU; diffusers' as its "
            "pipeline does. Compiled is `torch.compile` with weights frozen.",
            compare,
        )
        decode = table(
            "Decoding",
            "Seconds from latents to one image, by the autoencoder.",
            compare,
        )
        for label in plan.dtypes:
            step.rows.append(steps(plan, label, folder, compare, peaks))
            decode.rows.append(decoding(plan, label, folder, compare, peaks))
        for label in plan.dtypes if plan.compiled else ():
            step.rows.append(steps(plan, label, folder, compare, peaks, compiled=True))
    report.tables = [limits, step, decode, generated, started]


def make(config: LatentDiffusionConfig) -> LatentDiffusion:
    """A network with random weights in bf16, none of them zero: what ends a branch starts so, and hides all of it."""
    torch.manual_seed(0)
    with on_meta_device():
        net = LatentDiffusion(config)
    net = net.bfloat16().to_empty(device="cpu")
    for name, parameter in net.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:
            nn.init.normal_(parameter, mean=float(name.endswith("weight")), std=0.02)
    return net.eval()


def write(config: LatentDiffusionConfig, folder: Path, compare: bool) -> None:
    """The same random weights as a file of ours, and as a folder of diffusers."""
    folder.mkdir(exist_ok=True)
    net = make(config)
    save(net, folder / "model.safetensors")
    if compare:
        export(net, folder / "diffusers", "diffusers")


def table(title: str, description: str, compare: bool) -> Table:
    utilization = HOW.replace("2 x MACs x images/s", "2 x MACs / seconds")
    return Table(
        title=title,
        description=f"{description} Weights and inputs random. {utilization}",
        columns=[
            Column(key="mode", heading="mode"),
            Column(key="dtype", heading="precision"),
            *beside(("diffusers",) if compare else ()),
        ],
    )


def steps(
    plan: Plan, label: str, folder: Path, compare: bool, peaks: Mapping[str, float], compiled: bool = False
) -> dict[str, Any]:
    """Seconds of a pass of the UNet."""
    dtype, config = DTYPES[label], plan.config
    x, t, context = given(config, dtype)
    with ExitStack() as stack:
        if compiled:
            stack.enter_context(frozen())
        ours: Any = loaded(folder).network.to(dtype)
        once = ours.project_context(context)
        if not compiled:
            stack.enter_context(packed(ours))
        call = torch.compile(ours) if compiled else ours
        sides: dict[str, Callable[[], Tensor]] = {"ours": lambda: call(x, t, once)}
        if compare:
            theirs = diffusers_part(folder / "diffusers", "unet", dtype)
            their_call: Any = torch.compile(theirs) if compiled else theirs
            sides["diffusers"] = lambda: their_call(x, t, context).sample
        row = compare_seconds(sides, TOLERANCES[label], plan)
    return noted(row, "compiled" if compiled else "eager", label, step_flops(config), peaks)


def given(config: LatentDiffusionConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Two latents, their time, and a prompt of each."""
    text = config.text_encoder
    assert text is not None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.network.in_channels, *config.network.latent_size, generator=generator).to(dtype)
    context = torch.randn(2, text.max_length, config.network.context_dim, generator=generator).to(dtype)  # type: ignore[union-attr]
    return x, torch.tensor([501, 501]), context


def step_flops(config: LatentDiffusionConfig) -> float:
    """Of a pass of the UNet over what is `given`."""
    with on_meta_device():
        outline = UNet(config.network)  # type: ignore[arg-type]  # the plan's is one
    return flops(outline, *(like.to("meta") for like in given(config, torch.float32)))


def latent(config: LatentDiffusionConfig, dtype: torch.dtype) -> Tensor:
    """Of one picture."""
    shape = (1, config.autoencoder.latent_channels, *config.network.latent_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def decode_flops(config: LatentDiffusionConfig) -> float:
    """Of the decoder's pass over one latent."""
    with on_meta_device():
        outline: Any = LatentDiffusion(config).autoencoder
    return flops(outline.decoder, latent(config, torch.float32).to("meta"))


def decoding(
    plan: Plan, label: str, folder: Path, compare: bool, peaks: Mapping[str, float]
) -> dict[str, Any]:
    """Seconds of a pass of the autoencoder's decoder."""
    dtype = DTYPES[label]
    z = latent(plan.config, dtype)
    ours: Any = loaded(folder).autoencoder.to(dtype)
    sides: dict[str, Callable[[], Tensor]] = {"ours": lambda: ours.decode(z)}
    if compare:
        theirs = diffusers_part(folder / "diffusers", "vae", dtype)
        sides["diffusers"] = lambda: theirs.decode(z / theirs.config.scaling_factor).sample
    row = compare_seconds(sides, TOLERANCES[label], plan)
    return noted(row, "eager", label, decode_flops(plan.config), peaks)


def noted(
    row: dict[str, Any], mode: str, label: str, count: float, peaks: Mapping[str, float]
) -> dict[str, Any]:
    log.info("%s, %s: %.3g s", mode, label, row["ours"].median)
    return row | {"mode": mode, "dtype": label, "utilization": count / row["ours"].median / peaks[label]}


def loaded(folder: Path) -> LatentDiffusion:
    net: Network = load(folder / "model.safetensors")
    assert isinstance(net, LatentDiffusion)
    return net


def flops(net: nn.Module, *given: Tensor) -> float:
    """Operations of a pass, as PyTorch counts them, without doing them."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*given)
    return counter.get_total_flops()
