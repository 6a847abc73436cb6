"""How processes that torchrun started meet, and what they must have in common."""

import contextlib
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch

from triptych import distributed
from triptych.distributed import ProcessGroup
from triptych.errors import UserError
from triptych.train.configs.base import LoopConfig

PATIENCE = timedelta(hours=2)  # for the process that evaluates, encodes or writes longest


@contextlib.contextmanager
def join_processes(config: LoopConfig, batch_size: int) -> Iterator[ProcessGroup]:
    """Meet the other processes, if torchrun started any; this one has its device from then on.

    Raises:
        UserError: what `processes` refuses, or another process ended.
    """
    size = world_size(config, batch_size, os.environ)
    if size is None:
        yield distributed.world
        return
    import torch.distributed as dist

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    cuda = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    if cuda:
        if local >= torch.cuda.device_count():
            raise UserError(
                f"this is process {local + 1} of a machine with {torch.cuda.device_count()} GPUs; start one a GPU, "
                "or give --loop.device cpu"
            )
        torch.cuda.set_device(local)
    mine = not dist.is_initialized()
    if mine:
        init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo")
    distributed.world.rank, distributed.world.size = rank, size
    distributed.world.cpu_group, distributed.world.checkpoint_group = (
        dist.new_group(backend="gloo", timeout=PATIENCE) for _ in range(2)
    )
    try:
        yield distributed.world
    except RuntimeError as problem:
        if "Connection closed by peer" in str(problem) or "Connection reset" in str(problem):
            raise UserError(
                "another process of this run ended; it says why, or its machine does"
            ) from problem
        raise
    finally:
        (
            distributed.world.rank,
            distributed.world.size,
            distributed.world.cpu_group,
            distributed.world.checkpoint_group,
        ) = 0, 1, None, None
        if mine:
            dist.destroy_process_group()


def init_process_group(backend: str) -> None:
    """`torch.distributed.init_process_group` for processes that torchrun started, the first time or again.

    The agent of torchrun keeps its store when it starts them again, and with it the addresses of the dead, which the
    living would wait for (PyTorch 2.11 to 2.13). So what each start writes there has a prefix of its own.
    """
    import torch.distributed as dist

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store, _, _ = next(dist.rendezvous("env://", rank, size, timeout=PATIENCE))
    store = dist.PrefixStore(_this_start(store, rank, size), store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)


def _this_start(store: Any, rank: int, size: int) -> str:
    """A name that the processes of this start have agreed on, and none before had.

    Each other one leaves a number that nobody else has, and waits for an answer to it. The first answers whatever it
    finds, which may be of an earlier start, until all say that they know the name.
    """
    mine = uuid.uuid4().hex
    if rank:
        store.set(f"triptych/{rank}", mine)
        name = store.get(f"triptych/{mine}").decode()
        store.set(f"triptych/{name}/{rank}", "")
        return name
    missing, answered = set(range(1, size)), {}
    end = time.monotonic() + PATIENCE.total_seconds()
    while missing := {other for other in missing if not store.check([f"triptych/{mine}/{other}"])}:
        if time.monotonic() > end:
            raise UserError(f"of {size} processes {len(missing)} did not come; see what they say")
        for other in missing:
            if store.check([f"triptych/{other}"]):
                number = store.get(f"triptych/{other}").decode()
                if answered.get(other) != number:
                    store.set(f"triptych/{number}", mine)
                    answered[other] = number
        time.sleep(0.01)
    return mine


def world_size(config: LoopConfig, batch_size: int, environment: Mapping[str, str]) -> int | None:
    """How many train together, by what torchrun says; None for a process alone, without `torch.distributed`.

    Raises:
        UserError: a way to train together and no others, others and no way, or a batch that cannot be divided.
    """
    size = int(environment.get("WORLD_SIZE", "1")) if "RANK" in environment else 0
    if config.parallel in ("ddp", "fsdp") and not size:
        raise UserError(
            f"--loop.parallel {config.parallel} needs processes to train together; start them with torchrun "
            "--nproc-per-node N -m triptych train ..., or leave it out"
        )
    if size <= 1 and config.parallel in ("auto", "none"):
        return None
    if config.parallel == "none":
        raise UserError(
            f"torchrun started {size} processes and --loop.parallel is none; give ddp or fsdp, or leave it out"
        )
    if batch_size % size:
        near = max(1, round(batch_size / size)) * size
        raise UserError(
            f"the batch of {batch_size} cannot be divided among {size} processes; give --loading.batch-size {near}"
        )
    if config.device not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"--loop.device is {config.device} for {size} processes; give cpu, or cuda for one GPU each"
        )
    return size
