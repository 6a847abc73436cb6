"""From a config to a trained network in a folder: a family's `prepare` builds the parts, the loop trains them."""

import contextlib
import copy
import functools
import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from triptych import weights
from triptych.config import to_json
from triptych.data import manifest
from triptych.data.config import AugmentConfig
from triptych.data.loading.loader import Loader
from triptych.device import choose_device, choose_dtype, flush_denormals, log_dtype, peak_matmul_flops
from triptych.distributed import ProcessGroup
from triptych.layers.lora import merge_low_rank
from triptych.metrics.cost import count_macs, count_parameters
from triptych.model_card import Preprocess
from triptych.network import Network
from triptych.train.adversary import Adversary
from triptych.train.configs.registry import RUN_MODULES, RunConfig
from triptych.train.distributed.parallelize import SingleProcess, prepare_blocks, team_of
from triptych.train.distributed.process_group import join_processes
from triptych.train.loop import Outcome, endless_batches, fit, set_train_mode
from triptych.train.monitoring.throughput import Throughput, peak_memory
from triptych.train.optim import make_optimizer
from triptych.train.run_folder import EXAMPLES, claim_folder, resume_identity
from triptych.train.task import Task


@dataclass
class Run:
    """What a run is made of, built and placed."""

    config: RunConfig
    net: Network
    task: Task
    train_loader: Loader
    eval_loader: Loader
    device: torch.device
    dtype: torch.dtype
    """That products are computed in."""
    autocast: Any
    fingerprint: str
    num_images: tuple[int, int]
    """To train and to evaluate on."""
    macs: Callable[[], int] | None = None
    """Multiply-accumulates for one image, where the product of the task does not map images to something."""
    on_start: Callable[[Path], None] | None = None
    """Called with the run's folder before the first step."""
    adversary: Adversary | None = None
    """What learns against the network, on the same batches."""
    on_evaluation: Callable[[Path, int], None] | None = None
    """Called with the run's folder and the step after each evaluation."""
    save_best: Callable[[Network, dict[str, float], Path], None] | None = None
    """Writes the best network so far, of these figures, into the run's folder, where that is no model.safetensors."""
    on_finish: Callable[[Path], None] | None = None
    """Called with the run's folder once all steps are done, also when the same command is given again."""


@flush_denormals()
def run(config: RunConfig, out: str | Path) -> Outcome:
    """Train as `config` says into the folder `out`; called again with the same arguments it goes on.

    The folder holds config.json, examples.json.gz (which pictures it learns from), log.jsonl, checkpoints/, and
    model.safetensors: the best weights so far (the moving average's, if there is one), which `triptych.load(out)`
    reads.

    Raises:
        UserError: data, weights or config that do not fit together; a folder with another run in it.
    """
    with join_processes(config.loop, config.loading.batch_size) as world:
        return _run(config, Path(out), world)


def _run(config: RunConfig, out: Path, world: ProcessGroup) -> Outcome:
    parts = prepare(config)
    team = team_of(world, config.loop, parts.device, parts.dtype)
    said = {**to_json(config), "fingerprint": parts.fingerprint}
    if team.first:
        log_dtype(parts.dtype, parts.device)

    def keep_best(net: Network, figures: dict[str, float]) -> None:
        if parts.save_best is not None:
            return parts.save_best(net, figures, out)
        whole = parts.task.product(copy.deepcopy(net))
        merge_low_rank(whole)
        whole.card = replace(whole.card, figures={name: float(value) for name, value in figures.items()})
        weights.save(whole, out / "model.safetensors")

    def changed() -> str:
        return manifest.describe_changes(out / EXAMPLES, manifest.list_examples(parts.train_loader.source))

    flops = 0.0 if parts.device.type == "mps" else 6.0 * forward_macs(parts)
    meter = Throughput(parts.device, flops, lambda: team.size * peak_matmul_flops(parts.device, parts.dtype))
    with claim_folder(out, said, changed) if team.first else contextlib.nullcontext():
        if team.first and not (out / EXAMPLES).exists():
            manifest.write(out / EXAMPLES, manifest.list_examples(parts.train_loader.source))
        team.agree()  # none goes on before the folder is claimed
        if parts.on_start is not None:
            parts.on_start(out)
        outcome = fit(
            parts.net, parts.task, parts.train_loader, parts.eval_loader, config.loop, config.optim,
            config.loading.batch_size,
            out, resume_identity(said), keep_best, parts.device, parts.autocast, parts.adversary,
            functools.partial(parts.on_evaluation, out) if parts.on_evaluation else None, team, meter,
        )  # fmt: skip
    if outcome.finished and parts.on_finish is not None and team.first:
        parts.on_finish(out)
    return outcome


def prepare(config: RunConfig) -> Run:
    """The parts of a run of whatever kind."""
    return importlib.import_module(RUN_MODULES[type(config)]).prepare(config)


def make_run(
    config: RunConfig,
    net: Network,
    task: Task,
    train: Loader,
    evaluate: Loader,
    fingerprint: str,
    images: tuple[int, int],
) -> Run:
    """`Parts` with the network on its device, compiled if asked, and the precision chosen."""
    device = choose_device(None if config.loop.device == "auto" else config.loop.device)
    net.to(device)
    prepare_blocks(net, config.loop)
    dtype = choose_dtype(None if config.loop.precision == "auto" else config.loop.precision, device)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    return Run(config, net, task, train, evaluate, device, dtype, autocast, fingerprint, images)


def match_preprocessing(augment: AugmentConfig, how: Preprocess) -> AugmentConfig:
    """The augmentation for a network that is fed as its card says."""
    return replace(
        augment,
        image_size=how.size,
        mean=how.mean,
        std=how.std,
        background=tuple(map(float, how.background)),
    )


def forward_macs(parts: Run) -> int:
    """Multiply-accumulates of one forward pass for one image of the run's size."""
    if parts.macs is not None:
        return parts.macs()
    whole = parts.task.product(copy.deepcopy(parts.net))
    return count_macs(whole, (1, 3, *parts.net.card.preprocess.size))


@flush_denormals()
def dry_run(config: RunConfig, steps: int = 3) -> dict[str, Any]:
    """What the run would be: sizes, cost, and time and memory estimated from `steps` real steps. Writes nothing."""
    parts = prepare(config)
    optimizer = make_optimizer(parts.net, config.optim)
    set_train_mode(parts.net)
    times = []
    batch = next(endless_batches(parts.train_loader, SingleProcess()))
    for step in range(steps):
        start = time.monotonic()
        batch = {
            **batch,
            "seed": (config.loop.seed, step, 0),
            "progress": 1.0,
        }  # with all that joins in later
        batch = {k: v.to(parts.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        with parts.autocast():
            loss, _ = parts.task.loss(parts.net, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if parts.adversary is not None:
            parts.adversary.backward(batch, 1.0, parts.autocast)
            parts.adversary.step(0.5, torch.zeros((), device=parts.device))
        loss.item()  # waits for the device
        times.append(time.monotonic() - start)
    whole = parts.task.product(copy.deepcopy(parts.net))
    merge_low_rank(whole)
    total = config.loop.epochs * len(parts.train_loader)
    return {
        "config": to_json(replace(config, augment=parts.task.config)),
        "network": to_json(parts.net.config),
        "images": {
            "train": parts.num_images[0],
            "evaluation": parts.num_images[1],
        },
        "classes": len(parts.net.card.classes or ()),
        "parameters": count_parameters(whole),
        "parameters_trained": count_parameters(parts.net, trainable=True),
        "flops_per_image": 2 * forward_macs(parts),
        "steps": round(total / config.loop.accumulate),
        "seconds_per_step": sorted(times)[len(times) // 2] * config.loop.accumulate,
        "hours": sorted(times)[len(times) // 2] * total / 3600,
        "peak_memory_bytes": peak_memory(parts.device),
        "device": str(parts.device),
    }
