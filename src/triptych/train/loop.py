"""The loop that every model of the package is trained by.

All randomness of a step is a function of (seed, step), and the data's order of (seed, epoch): a run that was
cut off and started again does what it would have done.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from triptych import distributed
from triptych.data.loading.loader import Loader
from triptych.device import copy_to_device
from triptych.errors import UserError
from triptych.network import Network
from triptych.train.adversary import Adversary
from triptych.train.checkpoints import Checkpoints, Facts
from triptych.train.configs.base import LoopConfig, OptimConfig
from triptych.train.distributed.parallelize import SingleProcess
from triptych.train.ema import Ema
from triptych.train.monitoring.anomalies import AnomalyDetector, PendingMetrics, nonfinite_flag
from triptych.train.monitoring.log import NullLog, RunLog
from triptych.train.monitoring.signals import interrupts
from triptych.train.monitoring.step_reporter import StepRecord, StepReporter
from triptych.train.monitoring.throughput import Throughput
from triptych.train.optim import clip, lr_at, make_optimizer, set_lr, update
from triptych.train.run_folder import require_same
from triptych.train.state import gather, scatter
from triptych.train.task import Batch, Task

T = TypeVar("T")

REPORT_STEPS = 50  # between figures of speed in the log
FEW_STEPS = 50  # fewer teach little, and the user had better know


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    finished: bool
    """False after an interrupt; the same command goes on."""
    best: dict[str, float]
    """Figures of the best evaluation, with its step."""
    headline: str = "top1"
    """Which of them says how good the model is."""


def fit(
    net: Network,
    task: Task,
    train: Loader,
    evaluate: Loader,
    config: LoopConfig,
    optim: OptimConfig,
    batch_size: int,
    out: Path,
    identity: Facts,
    keep_best: Callable[[Network, dict[str, float]], None],
    device: torch.device,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]],
    opponent: Adversary | None = None,
    illustrate: Callable[[int], None] | None = None,
    team: SingleProcess | None = None,
    meter: Throughput | None = None,
) -> Outcome:
    """Train `net` to the end of `config.epochs`, from the newest checkpoint in `out` if there is one.

    Args:
        net: on `device`; what requires gradients learns.
        identity: facts that a checkpoint must share to be gone on from (the run's config).
        keep_best: called with the network and its figures whenever the task ranks them the best so far.
        autocast: makes the context that forward passes run in.
        opponent: learns on the same batches, after `net`'s loss on each.
        illustrate: called with the step after each evaluation.
        team: the processes that train together; all of them call this, and the first one writes.
        meter: counts what the log says of speed.

    Raises:
        UserError: the loss is not finite, the checkpoint in `out` is of another run, or cannot be written.
    """
    team = team or SingleProcess()
    total = max(1, math.ceil(config.epochs * len(train) / config.accumulate))
    eval_steps = max(1, round(config.eval_every * len(train) / config.accumulate))
    ema = Ema(net, config.ema) if config.ema else None
    measured = ema.net if ema else net
    team.divide(train, evaluate)
    learn = team.place(net, ema, task, opponent)
    optimizer = make_optimizer(net, optim)
    checkpoints = Checkpoints(out / "checkpoints", config.keep)
    guard = AnomalyDetector(out, config.on_nonfinite, team.rank if team.size > 1 else None)
    meter = meter or Throughput(device)
    step, evaluated, best, notes = _resume(
        checkpoints, out, identity, net, ema, optimizer, opponent, train, team, guard
    )
    batches = endless_batches(train, team)
    saved = time.monotonic()

    def images_at(step: int) -> int:
        return step * config.accumulate * batch_size

    def epoch_at(step: int) -> float:
        return step * config.accumulate / len(train)

    def save(log: RunLog | NullLog, told: StepReporter) -> None:
        told.flush()
        log.sync()
        facts = {
            "identity": identity,
            "step": step,
            "evaluated": evaluated,
            "loader": train.state_dict(),
            "best": best,
            "guard": guard.state_dict(),
        }
        with meter.timed("saving"):
            checkpoints.save(step, gather(net, ema, optimizer, opponent), facts)

    with (
        contextlib.closing(checkpoints),
        RunLog(out, total, step, config.log_every, config.tensorboard, evaluated)
        if team.first
        else NullLog() as log,
        StepReporter(log, guard, meter, team.size == 1) as told,
        interrupts() as interrupted,
        torch.random.fork_rng(),
    ):
        for note in notes:
            log.message(note)
        if total < FEW_STEPS and step == 0:
            log.message(f"only {total} steps in all: raise --loop.epochs, or lower --loading.batch-size")
        # Several processes evaluate to the end: one that broke off would leave the others waiting for its part.
        breakable = interrupted.abortable if team.size == 1 else _to_the_end
        set_train_mode(net)
        meter.restart()
        while True:
            # Once in a while, between two steps.
            if step and step != evaluated and (step % eval_steps == 0 or step == total):
                with meter.paused(), team.whole(measured) as whole:
                    figures = breakable(
                        functools.partial(_evaluate, task, whole, team.evaluated(evaluate), autocast)
                    )
                    if figures is not None:
                        log.write([{"step": step, "images": images_at(step), "eval": figures}])
                        if not best or task.rank(figures) > task.rank(best):
                            best = {**figures, "step": step}
                            if team.first:
                                keep_best(whole, figures)
                        log.message(_scores(epoch_at(step), figures, best["step"] == step))
                        if illustrate is not None and team.first:
                            breakable(functools.partial(illustrate, step))
                if interrupted.aborted:  # it is done again when the run goes on
                    break
                evaluated = step
                set_train_mode(net)
            late = not checkpoints.busy and time.monotonic() - saved > config.save_every
            ending, late, due = team.agree(interrupted(), late and team.first, log.due())
            if late:
                save(log, told)
                saved = time.monotonic()
            if step >= total or ending:
                break

            # One step: forward and backward over the batches of the step, then the update.
            progress = (step + 0.5) / total  # its middle: no step is at zero
            lr = lr_at(progress, optim)
            set_lr(optimizer, lr)
            terms: dict[str, torch.Tensor] = {}
            parts: list[Batch] = []
            for part in range(config.accumulate):
                with meter.timed("waiting"):
                    batch = to_device(next(batches), device)
                batch["seed"] = (config.seed, step, part)
                batch["progress"] = progress
                parts.append(dict(batch))  # without what tasks leave in it
                torch.manual_seed(_stream(config.seed, step, part))
                with team.share(batch, last=part == config.accumulate - 1):
                    weight = distributed.shard_weight()
                    with autocast():
                        loss, found = learn(batch)
                    (loss * weight / config.accumulate).backward()
                    if opponent is not None:
                        found = {**found, **opponent.backward(batch, weight / config.accumulate, autocast)}
                for name, value in {"loss": loss.detach(), **found}.items():
                    terms[name] = terms.get(name, 0) + value * weight / config.accumulate
                meter.images += batch["share"].whole if "share" in batch else len(batch["label"])
            terms["grad_norm"], norms = clip(net, optim.clip or math.inf)
            if opponent is not None:
                found, more = opponent.clip()
                terms, norms = terms | found, norms + more
            terms = dict(team.means([terms])[0])  # so that all processes decide alike
            # The device decides whether the step is finite, and nobody waits for it: its numbers are read when the next
            # step has got as far as here.
            bad, numbers = nonfinite_flag(terms), PendingMetrics(terms, norms)
            told.flush()
            update(optimizer, bad)
            optimizer.zero_grad(set_to_none=True)
            if opponent is not None:
                opponent.step(progress, bad)
            step += 1
            if ema:
                ema.update(net, step, bad)

            # What is told of it.
            row = {"step": step, "images": images_at(step), "epoch": epoch_at(step), "lr": lr}
            due = due or step % eval_steps == 0 or step == total
            if due:
                numbers.wait()  # what stands on the screen is of work that is done
            speed = meter.report() if due or step % REPORT_STEPS == 0 else {}
            told.pending = StepRecord(row, numbers, parts, speed, shown=due)
            if due:
                told.flush()
        save(log, told)
        checkpoints.wait()
        for name, why in team.merged(train.bad).items():
            log.message(f"left out: {name}: {why}")
    return Outcome(step, step >= total and evaluated == step, best, task.headline)


def _resume(
    checkpoints: Checkpoints,
    out: Path,
    identity: Facts,
    net: Network,
    ema: Ema | None,
    optimizer: torch.optim.Optimizer,
    opponent: Adversary | None,
    loader: Loader,
    team: SingleProcess,
    guard: AnomalyDetector,
) -> tuple[int, int, dict[str, float], list[str]]:
    """Step, step of the last evaluation, its best figures, and what to say."""
    if team.first:
        checkpoints.tidy()
    team.agree()  # so that none reads before
    found = checkpoints.newest()
    if found is None:
        return 0, 0, {}, []
    checkpoint, notes = found
    facts = checkpoint.facts
    require_same(out, facts["identity"], identity)
    scatter(checkpoint, net, ema, optimizer, opponent)
    loader.load_state_dict(facts["loader"])
    guard.load_state_dict(facts["guard"])
    return facts["step"], facts["evaluated"], facts["best"], [*notes, f"going on from step {facts['step']}"]


def _evaluate(task: Task, net: Network, loader: Iterable[Batch], autocast: Any) -> dict[str, float]:
    net.eval()
    with autocast():
        return dict(task.evaluate(net, loader))


def _scores(epoch: float, figures: dict[str, float], best: bool) -> str:
    scores = "  ".join(f"{name} {value:.4f}" for name, value in figures.items() if name != "count")
    return f"epoch {epoch:.2f}: {scores}" + ("  (best)" if best else "")


def _to_the_end(work: Callable[[], T]) -> T | None:
    return work()


def set_train_mode(net: Network) -> None:
    """Training mode for what learns. A frozen part runs as in evaluation: its statistics stay and it drops nothing."""
    net.train()
    for part in net.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.eval()


def endless_batches(loader: Loader, team: SingleProcess | None = None) -> Iterator[Batch]:
    """Epoch after epoch.

    Raises:
        UserError: an epoch without a single image that could be read.
    """
    team = team or SingleProcess()
    while True:
        read = False
        for batch in team.batches(loader):
            read = True
            yield batch
        if not read and loader.bad:  # without any bad, a run was gone on from at an epoch's very end
            first = next(iter(loader.bad.values()))
            raise UserError(f"no training image could be read; the first: {first}")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on the device, but for what numpy's draws depend on."""
    return {
        k: copy_to_device(v, device) if isinstance(v, torch.Tensor) and k != "aspect" else v for k, v in batch.items()
    }


def _stream(*numbers: int) -> int:
    """One seed from several numbers, for what draws from torch's own stream (drop path, dropout)."""
    import numpy as np

    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0])
