"""`triptych bench ldm`: denoising step, decoder, image generation, loading and startup, compared with diffusers."""

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
    METHOD,
    TOLERANCES,
    Effort,
    compare_seconds,
    comparison_columns,
    frozen,
    measure_peaks,
)
from triptych.bench.harness.report import Column, Report, Table
from triptych.bench.harness.suite import suite
from triptych.bench.measurements.image_generation import generating, starting
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
    """Also measure compiled networks, which takes minutes for each library and precision."""
    steps: tuple[int, int] | None = None
    """Sampling steps of ours and of diffusers; None means the defaults, 30 and 50."""
    num_images: int = 2
    """Number of images that each library generates."""
    rounds: int = 5
    patience: float = 60.0
    peers: tuple[str, ...] = ("diffusers",)


def small(config: LatentDiffusionConfig) -> LatentDiffusionConfig:
    """Return a config of the same structure with few channels and blocks, for an eighth of the height and width."""
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
SHORT = Plan(dtypes=("bf16",), steps=(3, 5), num_images=1, rounds=3, seconds=0.0, patience=0.0, sides=(1024,))
QUICK = Plan(
    config=TINY, steps=(2, 3), num_images=1, rounds=1, seconds=0.0, patience=0.0, sides=(256,), copied=2**22
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
        # Other programs are measured first, while this process uses little memory.
        started = starting(
            {"Stable Diffusion 1": folder, "a tiny one": tiny}, compare, plan.rounds, plan.patience
        )
        generated = generating(folder, compare, plan.steps, plan.num_images)
        peaks, limits = measure_peaks(plan)
        step = table(
            "A step of the denoiser",
            "Seconds per pass of the UNet over two latents, as with guidance. Ours runs as in its pipeline, with keys "
            "and values of the prompt computed beforehand and weights packed for the CPU; that of diffusers runs as "
            "in its pipeline. Compiled means `torch.compile` with frozen weights.",
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
    """Create a network with random weights in bf16, none of them zero: by default, zero weights at the end of branches
    would hide errors in them."""
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
    """Write the same random weights as our file and as a folder of diffusers."""
    folder.mkdir(exist_ok=True)
    net = make(config)
    save(net, folder / "model.safetensors")
    if compare:
        export(net, folder / "diffusers", "diffusers")


def table(title: str, description: str, compare: bool) -> Table:
    utilization = METHOD.replace("2 x MACs x images/s", "2 x MACs / seconds")
    return Table(
        title=title,
        description=f"{description} Weights and inputs are random. {utilization}",
        columns=[
            Column(key="mode", heading="mode"),
            Column(key="dtype", heading="precision"),
            *comparison_columns(("diffusers",) if compare else ()),
        ],
    )


def steps(
    plan: Plan, label: str, folder: Path, compare: bool, peaks: Mapping[str, float], compiled: bool = False
) -> dict[str, Any]:
    """Time a pass of the UNet."""
    dtype, config = DTYPES[label], plan.config
    x, t, context = step_inputs(config, dtype)
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


def step_inputs(config: LatentDiffusionConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return two random latents, their timesteps, and an encoded prompt for each."""
    text = config.text_encoder
    assert text is not None
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, config.network.in_channels, *config.network.latent_size, generator=generator).to(dtype)
    context = torch.randn(2, text.max_length, config.network.context_dim, generator=generator).to(dtype)  # type: ignore[union-attr]
    return x, torch.tensor([501, 501]), context


def step_flops(config: LatentDiffusionConfig) -> float:
    """Return the FLOPs of a pass of the UNet over `step_inputs`."""
    with on_meta_device():
        outline = UNet(config.network)  # type: ignore[arg-type]  # the plans have UNets only
    return flops(outline, *(like.to("meta") for like in step_inputs(config, torch.float32)))


def latent(config: LatentDiffusionConfig, dtype: torch.dtype) -> Tensor:
    """Return random latents of one image."""
    shape = (1, config.autoencoder.latent_channels, *config.network.latent_size)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def decode_flops(config: LatentDiffusionConfig) -> float:
    """Return the FLOPs of decoding one image."""
    with on_meta_device():
        outline: Any = LatentDiffusion(config).autoencoder
    return flops(outline.decoder, latent(config, torch.float32).to("meta"))


def decoding(
    plan: Plan, label: str, folder: Path, compare: bool, peaks: Mapping[str, float]
) -> dict[str, Any]:
    """Time a pass of the autoencoder's decoder."""
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


def flops(net: nn.Module, *inputs: Tensor) -> float:
    """Return the FLOPs of a forward pass, as PyTorch counts them for tensors on the meta device."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(*inputs)
    return counter.get_total_flops()
