"""The process group of processes that torchrun started."""

import contextlib
import gc
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch

from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import ConfigError, DeviceError
from triptych.training.configs.base import LoopConfig

TIMEOUT = timedelta(hours=2)  # for the process that evaluates, encodes or writes longest


@contextlib.contextmanager
def own_process_groups() -> Iterator[None]:
    """Destroy the process groups that the block initializes, when it has ended and no variable of its functions refers
    to them any longer."""
    if "RANK" not in os.environ:  # a single process without `torch.distributed`
        yield
        return
    import torch.distributed as dist

    if dist.is_initialized():  # by the caller
        yield
        return
    try:
        yield
    finally:
        if dist.is_initialized():
            destroy_process_groups()


def destroy_process_groups() -> None:
    """Destroy all process groups and end their threads.

    Groups are in reference cycles, so that their threads would live on. A thread of gloo may still hold the tensors of
    the last sum; if it released them while the interpreter shuts down, the process would be aborted
    (https://github.com/pytorch/pytorch/issues/190489).
    """
    import torch.distributed as dist

    dist.destroy_process_group()
    gc.collect()


@contextlib.contextmanager
def join_processes(config: LoopConfig, batch_size: int) -> Iterator[ProcessGroup]:
    """Join the other processes if torchrun started any, and set the CUDA device of this one.

    Raises:
        TriptychError: as `world_size`, or another process ended.
    """
    size = world_size(config, batch_size, os.environ)
    if size is None:
        yield SINGLE_PROCESS
        return
    import torch.distributed as dist

    rank, local_rank = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    if cuda:
        if local_rank >= torch.cuda.device_count():
            raise DeviceError(
                f"this is process {local_rank + 1} of a machine with {torch.cuda.device_count()} GPUs; start one "
                "process per GPU, or give --loop.device cpu"
            )
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    cpu_group, checkpoint_group = (dist.new_group(backend="gloo", timeout=TIMEOUT) for _ in range(2))
    group = ProcessGroup(rank, size, cpu_group, checkpoint_group)
    try:
        yield group
    except RuntimeError as error:
        if "Connection closed by peer" in str(error) or "Connection reset" in str(error):
            raise DeviceError(
                "another process of this run ended; its own output, or that of its machine, has the reason"
            ) from error
        raise


def init_process_group(backend: str) -> None:
    """Call `torch.distributed.init_process_group` for processes that torchrun started, the first time or again.

    The agent of torchrun keeps its store when it restarts processes, and with it the addresses of the dead ones, which
    the living would wait for (PyTorch 2.11 to 2.13). So what each start writes there gets a prefix of its own.
    """
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=TIMEOUT))
    store = dist.PrefixStore(_agree_on_prefix(store, rank, size), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)


def _agree_on_prefix(store: Any, rank: int, size: int) -> str:
    """Return a name that all processes of this start agree on and that no earlier start had.

    Every process but the first writes a unique token and waits for an answer to it. The first process answers every
    token that it finds, which may be of an earlier start, until all processes have confirmed the name.
    """
    own = uuid.uuid4().hex
    if rank:
        store.set(f"triptych/{rank}", own)
        name = store.get(f"triptych/{own}").decode()
        store.set(f"triptych/{name}/{rank}", "")
        return name
    missing, answered = set(range(1, size)), {}
    end = time.monotonic() + TIMEOUT.total_seconds()
    while missing := {other for other in missing if not store.check([f"triptych/{own}/{other}"])}:
        if time.monotonic() > end:
            raise DeviceError(f"{len(missing)} of {size} processes did not start; see their output")
        for other in missing:
            if store.check([f"triptych/{other}"]):
                token = store.get(f"triptych/{other}").decode()
                if answered.get(other) != token:
                    store.set(f"triptych/{token}", own)
                    answered[other] = token
        time.sleep(0.01)
    return own


def world_size(config: LoopConfig, batch_size: int, environment: Mapping[str, str]) -> int | None:
    """Return the number of processes that train together, from torchrun's environment variables; None for a single
    process without `torch.distributed`.

    Raises:
        ConfigError: `config.parallel` needs several processes and there is one, or the reverse; or the batch cannot be
            divided among them.
    """
    size = int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 0
    if config.parallel in ("ddp", "fsdp") and not size:
        raise ConfigError(
            f"--loop.parallel {config.parallel} needs several processes; start them with torchrun "
            "--nproc-per-node N -m triptych train ..., or leave it out"
        )
    if size <= 1 and config.parallel in ("auto", "none"):
        return None
    if config.parallel == "none":
        raise ConfigError(
            f"torchrun started {size} processes and --loop.parallel is none; give ddp or fsdp, or leave it out"
        )
    if batch_size % size:
        near = max(1, round(batch_size / size)) * size
        raise ConfigError(
            f"the batch of {batch_size} cannot be divided among {size} processes; give --loading.batch-size {near}"
        )
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(
            f"--loop.device is {config.device} for {size} processes; give cpu, or cuda for one GPU each"
        )
    return size
