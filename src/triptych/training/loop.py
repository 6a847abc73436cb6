"""The training loop of all tasks.

All randomness of a step is a function of (seed, step), and the order of the data of (seed, epoch): a run that is
interrupted and resumed does what it would have done uninterrupted, bit for bit.
"""

import contextlib
import functools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch

from triptych import distributed
from triptych.data.example import Batch, TrainBatch
from triptych.data.loading.loader import Loader
from triptych.device import copy_to_device
from triptych.errors import DataError
from triptych.network import Network
from triptych.training.checkpoints import Checkpoints
from triptych.training.distributed.parallelize import SingleProcess
from triptych.training.ema import Ema
from triptych.training.monitoring.anomalies import AnomalyDetector, PendingMetrics, nonfinite_flag
from triptych.training.monitoring.log import NullLog, RunLog
from triptych.training.monitoring.signals import Interrupts, interrupts
from triptych.training.monitoring.step_reporter import StepRecord, StepReporter
from triptych.training.optim import clip, lr_at, make_optimizer, set_lr, update
from triptych.training.run_folder import MODEL_FILE, NEWEST, require_same, resume_identity
from triptych.training.state import TrainState
from triptych.training.training_run import Run

MIN_STEPS = 50  # a shorter run gets a warning
RISE = 1.02  # of the held-out loss over its minimum, that gets a warning
WARN_AFTER = (3, 10, 30, 100, 300)  # evaluations since the minimum


@dataclass
class Outcome:
    """How a run ended."""

    step: int
    finished: bool
    """False after an interrupt; the same command resumes the run."""
    best: dict[str, float]
    """Metrics of the best evaluation, with its step."""
    headline: str = "top1"
    """Name of the metric that says how good the model is."""


@dataclass(frozen=True)
class StepPlan:
    """Lengths of a run in steps."""

    total: int
    """Steps of the run."""
    between_evaluations: int
    images_per_step: int
    batches_per_step: int
    batches_per_epoch: int

    @classmethod
    def of(cls, run: Run) -> "StepPlan":
        config, batches = run.config.loop, len(run.train_loader)
        return cls(
            total=max(1, math.ceil(config.epochs * batches / config.accumulate)),
            between_evaluations=max(1, round(config.eval_every * batches / config.accumulate)),
            images_per_step=config.accumulate * run.config.loading.batch_size,
            batches_per_step=config.accumulate,
            batches_per_epoch=batches,
        )

    def epoch(self, step: int) -> float:
        """Return the epochs that are done after `step` steps."""
        return step * self.batches_per_step / self.batches_per_epoch

    def evaluates_after(self, step: int) -> bool:
        """Return whether an evaluation follows step `step`."""
        return step > 0 and (step % self.between_evaluations == 0 or step == self.total)


def fit(run: Run) -> Outcome:
    """Train `run.net` for `config.loop.epochs`, from the newest checkpoint in `run.folder` if there is one.

    All processes of `run.parallel` call this; the main process writes.

    Raises:
        TriptychError: the loss is not finite, or the checkpoint is of another run or cannot be written.
    """
    config, group, plan = run.config.loop, run.parallel.group, StepPlan.of(run)
    state = prepare_training(run)
    checkpoints = Checkpoints(run.folder / "checkpoints", config.keep, group)
    messages = resume(run, state, checkpoints)
    batches = endless_batches(run.train_loader, run.parallel)
    last_saved = time.monotonic()
    with (
        contextlib.closing(checkpoints),
        open_log(run, state, plan) as log,
        StepReporter(log, state.anomalies, run.throughput, group) as reporter,
        interrupts() as interrupted,
        torch.random.fork_rng(),
    ):
        for message in messages:
            log.message(message)
        if plan.total < MIN_STEPS and state.step == 0:
            log.message(f"only {plan.total} steps in all: raise --loop.epochs, or lower --loading.batch-size")
        set_train_mode(run.net)
        run.throughput.restart()
        while True:
            evaluate_if_due(run, state, plan, log, interrupted)
            if interrupted.aborted:  # the resumed run evaluates again
                break
            overdue = not checkpoints.busy and time.monotonic() - last_saved > config.save_every
            stop, save, show = run.parallel.any(interrupted(), overdue and group.is_main, log.due())
            if save:
                save_checkpoint(run, state, checkpoints, reporter)
                last_saved = time.monotonic()
            if stop or state.step >= plan.total:
                break
            record = train_step(run, state, plan, batches, reporter)
            reporter.submit(record, on_screen=show or plan.evaluates_after(state.step))
        save_checkpoint(run, state, checkpoints, reporter)
        checkpoints.wait()
        log_bad_images(log, group.all_gather(dict(run.train_loader.bad)))
    finished = state.step >= plan.total and state.last_evaluated == state.step
    return Outcome(state.step, finished, state.best, run.task.headline)


def prepare_training(run: Run) -> TrainState:
    """Spread the run over its processes, and return the state of step 0."""
    config = run.config.loop
    ema = Ema(run.net, config.ema) if config.ema else None
    run.parallel.split_loaders(run.train_loader, run.eval_loader)
    run.parallel.parallelize(run.net, ema, run.task, run.adversary)
    return TrainState(
        net=run.net,
        optimizer=make_optimizer(run.net, run.config.optim),
        loader=run.train_loader,
        anomalies=AnomalyDetector(run.folder, config.on_nonfinite, run.parallel.group),
        ema=ema,
        adversary=run.adversary,
    )


def resume(run: Run, state: TrainState, checkpoints: Checkpoints) -> list[str]:
    """Restore the newest checkpoint if there is one, and return messages for the log.

    Raises:
        CheckpointError: it is of another run, or all checkpoints are damaged.
    """
    if run.parallel.group.is_main:
        checkpoints.remove_partial()
    run.parallel.group.barrier()  # so that no process reads before
    newest = checkpoints.newest()
    if newest is None:
        return []
    checkpoint, messages = newest
    facts = dict(checkpoint.facts)
    identity = facts.pop("identity")
    require_same(run.folder, identity, resume_identity(run.config_dict()))
    state.load_tensors(checkpoint)
    state.load_state_dict(facts)
    messages = [*messages, f"resuming from step {state.step}"]
    if run.config.loop.epochs != identity["loop"]["epochs"]:
        messages.append(describe_extension(run, state.step, identity["loop"]["epochs"]))
    return messages


def describe_extension(run: Run, step: int, epochs_before: float) -> str:
    """Return the log's message for a run that continues with more epochs: on the schedule of the longer run, as if it
    had been at this step of it."""
    loop, optim = run.config.loop, run.config.optim
    total = StepPlan.of(run).total
    before = StepPlan.of(
        replace(run, config=replace(run.config, loop=replace(loop, epochs=epochs_before)))
    ).total
    rates = [lr_at((step + 0.5) / steps, optim) for steps in (before, total)]
    return (
        f"epochs raised from {epochs_before:g} to {loop.epochs:g}: step {step + 1} to {total} follow the schedule of "
        f"{loop.epochs:g} epochs; the learning rate goes from {rates[0]:.2g} to {rates[1]:.2g}"
    )


def save_checkpoint(run: Run, state: TrainState, checkpoints: Checkpoints, reporter: StepReporter) -> None:
    """Save the state, in the background; whatever is pending is logged first."""
    reporter.flush()
    reporter.log.sync()
    with run.throughput.timed("saving"):
        facts = {"identity": resume_identity(run.config_dict()), **state.state_dict()}
        checkpoints.save(state.step, state.tensors(), facts)


def evaluate_if_due(
    run: Run, state: TrainState, plan: StepPlan, log: RunLog | NullLog, interrupted: Interrupts
) -> None:
    """Evaluate after some of the steps, and save the network. A signal aborts it, if there is one process."""
    step, parallel = state.step, run.parallel
    if step == state.last_evaluated or not plan.evaluates_after(step):
        return
    # Several processes evaluate to the end: if one aborted, the others would wait for its part.
    abortable = interrupted.abortable if parallel.group.size == 1 else lambda work: work()
    with run.throughput.paused(), parallel.full_network(state.evaluated_net) as net:
        evaluation = functools.partial(_evaluate, run, net, parallel.eval_batches(run.eval_loader))
        metrics = abortable(evaluation)
        if metrics is not None:
            log.write([{"step": step, "images": step * plan.images_per_step, "eval": metrics}])
            is_best = not state.best or run.task.rank(metrics) > run.task.rank(state.best)
            if is_best:
                state.best = {**metrics, "step": step}
            if parallel.group.is_main:
                run.save_network(net, metrics, is_best)
            log.message(_summary(plan.epoch(step), metrics, is_best))
            if (note := overfitting_note(run.task.headline, metrics, state.best, step, plan)) is not None:
                log.message(note)
            if run.on_evaluation is not None and parallel.group.is_main:
                abortable(functools.partial(run.on_evaluation, run.folder, step))
    if not interrupted.aborted:
        state.last_evaluated = step
        set_train_mode(run.net)


def train_step(
    run: Run, state: TrainState, plan: StepPlan, batches: Iterator[Batch], reporter: StepReporter
) -> StepRecord:
    """Do one step: forward and backward passes over its batches, then the update.

    The device decides whether the step is finite, and the host does not wait for it: the values of a step are read when
    the next one has been queued up to its update.
    """
    config, optim = run.config.loop, run.config.optim
    progress = (state.step + 0.5) / plan.total  # the middle of the step: no step is at 0
    lr = lr_at(progress, optim)
    set_lr(state.optimizer, lr)
    values: dict[str, torch.Tensor] = {}
    used: list[Batch] = []
    for part in range(config.accumulate):
        with run.throughput.timed("waiting"):
            batch = cast(TrainBatch, to_device(next(batches), run.device))
        batch["seed"], batch["progress"] = (config.seed, state.step, part), progress
        for name, value in backward(run, batch, last=part == config.accumulate - 1).items():
            values[name] = values.get(name, 0) + value
        used.append(batch)
        run.throughput.images += batch["shard"].total if "shard" in batch else len(batch["label"])
    values["grad_norm"], norms = clip(run.net, optim.clip or math.inf)
    if run.adversary is not None:
        more_values, more_norms = run.adversary.clip()
        values, norms = values | more_values, norms + more_norms
    values = run.parallel.mean(values)  # so that all processes decide alike
    skip, metrics = nonfinite_flag(values), PendingMetrics(values, norms)
    reporter.flush()
    update(state.optimizer, skip)
    state.optimizer.zero_grad(set_to_none=True)
    if run.adversary is not None:
        run.adversary.step(progress, skip)
    state.step += 1
    if state.ema:
        state.ema.update(run.net, state.step, skip)
    row = {"step": state.step, "images": state.step * plan.images_per_step, "epoch": plan.epoch(state.step)}
    return StepRecord({**row, "lr": lr}, metrics, used)


def backward(run: Run, batch: TrainBatch, last: bool) -> dict[str, torch.Tensor]:
    """Add the gradients of a batch, and return its part of the step's values.

    Args:
        last: whether it is the last batch of the step.
    """
    accumulate = run.config.loop.accumulate
    torch.manual_seed(_mixed(*batch["seed"]))
    with run.parallel.step_context(batch, last):
        weight = distributed.shard_weight()
        with run.autocast():
            loss, logs, adversary_inputs = run.parallel.loss(batch)
        (loss * weight / accumulate).backward()
        if run.adversary is not None:
            logs = logs | run.adversary.backward(adversary_inputs, weight / accumulate, run.autocast)
    return {name: value * weight / accumulate for name, value in {"loss": loss.detach(), **logs}.items()}


def open_log(run: Run, state: TrainState, plan: StepPlan) -> RunLog | NullLog:
    """Return the log of the run, which only the main process has."""
    if not run.parallel.group.is_main:
        return NullLog()
    config = run.config.loop
    return RunLog(
        run.folder, plan.total, state.step, config.log_every, config.tensorboard, state.last_evaluated
    )


def log_bad_images(log: RunLog | NullLog, bad_images: Sequence[dict[str, str]]) -> None:
    """Log which images could not be read, and why."""
    for name, reason in {name: reason for bad in bad_images for name, reason in bad.items()}.items():
        log.message(f"left out: {name}: {reason}")


def set_train_mode(net: Network) -> None:
    """Set training mode for all parts that are trained. Frozen parts stay in evaluation mode: their running statistics
    do not change and they drop nothing."""
    net.train()
    for part in net.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.eval()


def endless_batches(loader: Loader, parallel: SingleProcess | None = None) -> Iterator[Batch]:
    """Yield the batches of one epoch after the other.

    Raises:
        DataError: no image of an epoch could be read.
    """
    parallel = parallel or SingleProcess()
    while True:
        empty = True
        for batch in parallel.train_batches(loader):
            empty = False
            yield batch
        if (
            empty and loader.bad
        ):  # an epoch without bad images is empty if the run was resumed at its very end
            first = next(iter(loader.bad.values()))
            raise DataError(f"no training image could be read; the first: {first}")


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to the device, except "aspect", which numpy's random draws depend on."""
    return cast(
        Batch,
        {
            name: copy_to_device(value, device)
            if isinstance(value, torch.Tensor) and name != "aspect"
            else value
            for name, value in batch.items()
        },
    )


def _evaluate(run: Run, net: Network, batches: Iterable[Batch]) -> dict[str, float]:
    net.eval()
    with run.autocast():
        return dict(run.task.evaluate(net, batches, run.parallel.group))


def overfitting_note(
    headline: str, metrics: dict[str, float], best: dict[str, float], step: int, plan: StepPlan
) -> str | None:
    """Return a warning if the held-out loss that ranks the networks has risen since its minimum; None if it has not, or
    if the warning was given a moment ago."""
    evaluations = (step - int(best["step"])) // plan.between_evaluations
    if headline != "loss" or metrics["loss"] < RISE * best["loss"] or evaluations not in WARN_AFTER:
        return None
    return (
        f"the held-out loss has risen by {metrics['loss'] / best['loss'] - 1:.0%} since step {best['step']:.0f}: the "
        f"network overfits; {MODEL_FILE} has the weights of that step, {NEWEST}/ the newest"
    )


def _summary(epoch: float, metrics: dict[str, float], best: bool) -> str:
    text = "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name != "count")
    return f"epoch {epoch:.2f}: {text}" + ("  (best)" if best else "")


def _mixed(*numbers: int) -> int:
    """Return one seed made from several numbers, for torch's global generator (drop path, dropout)."""
    import numpy as np

    return int(np.random.SeedSequence([n % 2**64 for n in numbers]).generate_state(1, np.uint64)[0])
