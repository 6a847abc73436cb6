"""From the config of a run to a trained network in a folder."""

import contextlib
import copy
import functools
import importlib
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from triptych.config import to_json
from triptych.data import manifest
from triptych.data.config import AugmentConfig
from triptych.data.example import TrainBatch
from triptych.data.loading.loader import Loader
from triptych.device import choose_device, choose_dtype, flush_denormals, log_dtype, peak_matmul_flops
from triptych.layers.lora import merge_low_rank
from triptych.metrics.cost import count_parameters
from triptych.model_card import Preprocess
from triptych.network import Network
from triptych.training.configs.registry import TASKS, RunConfig, task_of
from triptych.training.distributed.parallelize import make_parallel, prepare_blocks
from triptych.training.distributed.process_group import join_processes, own_process_groups
from triptych.training.loop import Outcome, endless_batches, fit, set_train_mode, to_device
from triptych.training.monitoring.throughput import Throughput, peak_memory
from triptych.training.optim import make_optimizer
from triptych.training.run_folder import EXAMPLES, claim_folder, with_absolute_paths
from triptych.training.task import Task
from triptych.training.training_run import Run


@flush_denormals()
def run(config: RunConfig, out: str | Path) -> Outcome:
    """Train a network as `config` says; called again with the same arguments, resume.

    Args:
        config: what to train, on what, and how; see `triptych.recipes`.
        out: the RUN folder. It gets config.json, examples.json.gz (the training examples), log.jsonl, checkpoints/, and
            model.safetensors: the best weights so far (of the exponential moving average, if there is one), which
            `triptych.load(out)` reads. If the newest evaluation was not the best, newest/model.safetensors has its
            weights.

    Raises:
        TriptychError: data, weights and config do not fit together, or the folder belongs to another run.
    """
    with own_process_groups():
        return _train(with_absolute_paths(config), Path(out))


def _train(config: RunConfig, out: Path) -> Outcome:
    with join_processes(config.loop, config.loading.batch_size) as group:
        run = prepare(config)
        run.folder = out
        run.parallel = make_parallel(group, config.loop, run.device, run.dtype)
        flops = 0.0 if run.device.type == "mps" else 6.0 * run.forward_macs()
        run.throughput = Throughput(
            run.device, flops, lambda: group.size * peak_matmul_flops(run.device, run.dtype)
        )
        if group.is_main:
            log_dtype(run.dtype, run.device)
        with _claimed(run) if group.is_main else contextlib.nullcontext():
            group.barrier()  # no process continues before the folder is claimed
            if run.on_start is not None:
                run.on_start(run.folder, group)
            outcome = fit(run)
        if outcome.finished and run.on_finish is not None and group.is_main:
            run.on_finish(run.folder)
        return outcome


@contextlib.contextmanager
def _claimed(run: Run) -> Any:
    """Claim the run's folder, and write the list of training examples if it is new."""
    examples = run.folder / EXAMPLES

    def data_changes() -> str:
        return manifest.describe_changes(examples, manifest.list_examples(run.train_loader.source))

    with claim_folder(run.folder, run.config_dict(), data_changes):
        if not examples.exists():
            manifest.write(examples, run.train_loader.source)
        yield


def prepare(config: RunConfig) -> Run:
    """Open the data, build the network, and place it on its device, for any task."""
    return importlib.import_module(TASKS[task_of(config)].module).prepare(config)


def make_run(
    config: RunConfig,
    net: Network,
    task: Task,
    train_loader: Loader,
    eval_loader: Loader,
    fingerprint: str,
    num_images: tuple[int, int],
) -> Run:
    """Return the run with its network on the device, compiled if the config says so, and its precision chosen."""
    device = choose_device(None if config.loop.device == "auto" else config.loop.device)
    net.to(device)
    prepare_blocks(net, config.loop)
    dtype = choose_dtype(None if config.loop.precision == "auto" else config.loop.precision, device)
    autocast = functools.partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    return Run(
        config=config,
        net=net,
        task=task,
        train_loader=train_loader,
        eval_loader=eval_loader,
        device=device,
        dtype=dtype,
        autocast=autocast,
        fingerprint=fingerprint,
        num_images=num_images,
    )


def match_preprocessing(augment: AugmentConfig, preprocess: Preprocess) -> AugmentConfig:
    """Return the augmentation with size, mean, std and background of a network's preprocessing."""
    return replace(
        augment,
        image_size=preprocess.size,
        mean=preprocess.mean,
        std=preprocess.std,
        background=tuple(map(float, preprocess.background)),
    )


@flush_denormals()
def dry_run(config: RunConfig, steps: int = 3) -> dict[str, Any]:
    """Estimate a run without writing anything: sizes and cost, and time and memory from `steps` real steps.

    Returns:
        "config", "network" (its config), "images" ("train" and "evaluation"), "classes", "parameters",
        "parameters_trained", "flops_per_image", "steps", "seconds_per_step", "hours", "peak_memory_bytes", "device".
    """
    run = prepare(config)
    optimizer = make_optimizer(run.net, config.optim)
    set_train_mode(run.net)
    times = []
    first = next(endless_batches(run.train_loader))
    for step in range(steps):
        start = time.monotonic()
        batch = cast(TrainBatch, to_device(first, run.device))
        batch["seed"], batch["progress"] = (config.loop.seed, step, 0), 1.0  # with all that begins late
        with run.autocast():
            loss, _, adversary_inputs = run.task.loss(run.net, batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if run.adversary is not None:
            run.adversary.backward(adversary_inputs, 1.0, run.autocast)
            run.adversary.step(0.5, torch.zeros((), device=run.device))
        loss.item()  # waits for the device
        times.append(time.monotonic() - start)
    product = run.task.product(copy.deepcopy(run.net))
    merge_low_rank(product)
    num_batches, seconds = config.loop.epochs * len(run.train_loader), sorted(times)[len(times) // 2]
    return {
        "config": to_json(replace(config, augment=run.task.config)),
        "network": to_json(run.net.config),
        "images": {"train": run.num_images[0], "evaluation": run.num_images[1]},
        "classes": len(run.net.card.classes or ()),
        "parameters": count_parameters(product),
        "parameters_trained": count_parameters(run.net, trainable=True),
        "flops_per_image": 2 * run.forward_macs(),
        "steps": round(num_batches / config.loop.accumulate),
        "seconds_per_step": seconds * config.loop.accumulate,
        "hours": seconds * num_batches / 3600,
        "peak_memory_bytes": peak_memory(run.device),
        "device": str(run.device),
    }
