"""What is told of a step: a row of the log, and what the guard says of it."""

from dataclasses import dataclass

from triptych.train.monitoring.anomalies import (
    AnomalyDetector,
    Batch,
    PendingMetrics,
    example_ids,
    nonfinite_names,
)
from triptych.train.monitoring.log import NullLog, Row, RunLog
from triptych.train.monitoring.throughput import Throughput, format_speed


@dataclass
class StepRecord:
    """What a step leaves to be told."""

    row: Row
    numbers: PendingMetrics
    parts: list[Batch]
    """The batches that it was made of."""
    speed: Row
    """Empty but for some."""
    shown: bool
    """On the screen."""


class StepReporter:
    """Tells of each step when the next one has been queued, so that the device always has something to do: the numbers
    have come by then. Whatever depends on a step settles it first: an evaluation, a checkpoint, a line on the screen.

    A step that is to stop the run does so from here. The next one's update has not been made then, and nothing of
    either is saved.

    Several processes settle at the same points: they exchange the names of examples. A failure elsewhere, which one of
    them may have by itself, settles the last step of a process that is alone.
    """

    def __init__(self, log: RunLog | NullLog, guard: AnomalyDetector, meter: Throughput, alone: bool):
        self.log, self.guard, self.meter, self.alone = log, guard, meter, alone
        self.pending: StepRecord | None = None

    def flush(self) -> None:
        """Tell of the last step, if that has not been done.

        Raises:
            UserError: it was not finite, and the run is to stop; the log cannot be written.
        """
        told, self.pending = self.pending, None
        if told is None:
            return
        row, step = told.row, told.row["step"]
        values, gradients = told.numbers.read()
        if self.guard.finite(step, values, gradients, told.parts):
            row |= values
            height = self.guard.spike(values["loss"])
            if height is not None:
                row |= {"spike": height, "ids": example_ids(told.parts)}
                self.log.message(
                    f"step {step}: the loss jumped to {values['loss']:.4g}, {height:.0f} deviations up; "
                    "its examples are in log.jsonl"
                )
        else:
            wrong = nonfinite_names(values)
            row |= {"skipped": wrong, "ids": example_ids(told.parts)}
            self.log.message(
                f"step {step} is skipped: {', '.join(wrong)} not finite; see nonfinite-step-{step}.json"
            )
        row |= told.speed
        if told.shown:
            line = f"epoch {row['epoch']:.2f}  loss {values['loss']:.3f}  {format_speed(told.speed)}"
            self.log.show(step, line)
        if told.speed and (line := self.meter.starvation_warning(told.speed)):
            self.log.message(line)
        self.log.write([row])

    def __enter__(self) -> "StepReporter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_problem: object) -> None:
        if self.alone and kind is not None and issubclass(kind, Exception):
            self.flush()
