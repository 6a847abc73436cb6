"""Reports of each step: a row of the log, and what the anomaly detector finds."""

from dataclasses import dataclass, field

from triptych.data.example import Batch
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.training.monitoring.anomalies import (
    AnomalyDetector,
    PendingMetrics,
    example_ids,
    nonfinite_names,
)
from triptych.training.monitoring.log import NullLog, Row, RunLog
from triptych.training.monitoring.throughput import Throughput, format_speed

SPEED_STEPS = 50  # steps between rows that report the speed


@dataclass
class StepRecord:
    """What is reported of a step."""

    row: Row
    metrics: PendingMetrics
    batches: list[Batch]
    speed: Row = field(default_factory=dict)
    """Throughput since the last report of it; empty in most steps."""
    on_screen: bool = False


class StepReporter:
    """Reports each step when the next one has been queued, so that the device always has work: by then its values have
    arrived. Whatever depends on a step flushes the reporter first: an evaluation, a checkpoint, a line on the screen.

    A step that stops the run raises from here. The next step has not been applied then, and nothing of either step is
    saved.

    All processes flush at the same points, since they exchange the ids of examples. After a failure elsewhere, which
    may be that of one process only, the last step is still reported if there is a single process.
    """

    def __init__(
        self,
        log: RunLog | NullLog,
        anomalies: AnomalyDetector,
        throughput: Throughput,
        group: ProcessGroup = SINGLE_PROCESS,
    ):
        self.log, self.anomalies, self.throughput, self.group = log, anomalies, throughput, group
        self.pending: StepRecord | None = None

    def submit(self, record: StepRecord, on_screen: bool) -> None:
        """Report a step later, or now if it is to be on the screen.

        Raises:
            TriptychError: as `flush`.
        """
        if on_screen:
            record.metrics.wait()  # so that the speed is that of finished work
        if on_screen or record.row["step"] % SPEED_STEPS == 0:
            record.speed = self.throughput.report()
        record.on_screen = on_screen
        self.pending = record
        if on_screen:
            self.flush()

    def flush(self) -> None:
        """Report the pending step, if there is one.

        Raises:
            TriptychError: it was not finite and the run is to stop, or the log cannot be written.
        """
        record, self.pending = self.pending, None
        if record is None:
            return
        row, step = record.row, record.row["step"]
        values, gradients = record.metrics.read()
        if self.anomalies.is_finite(step, values, gradients, record.batches):
            row |= values
            height = self.anomalies.spike(values["loss"])
            if height is not None:
                row |= {"spike": height, "ids": example_ids(record.batches, self.group)}
                self.log.message(
                    f"step {step}: loss spike to {values['loss']:.4g}, {height:.0f} standard deviations above the "
                    "median; the examples are in log.jsonl"
                )
        else:
            names = nonfinite_names(values)
            row |= {"skipped": names, "ids": example_ids(record.batches, self.group)}
            self.log.message(
                f"step {step} skipped: {', '.join(names)} not finite; see nonfinite-step-{step}.json"
            )
        row |= record.speed
        if record.on_screen:
            line = f"epoch {row['epoch']:.2f}  loss {values['loss']:.3f}  {format_speed(record.speed)}"
            self.log.show(step, line)
        if record.speed and (warning := self.throughput.starvation_warning(record.speed)):
            self.log.message(warning)
        self.log.write([row])

    def __enter__(self) -> "StepReporter":
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_error: object) -> None:
        if self.group.size == 1 and error_type is not None and issubclass(error_type, Exception):
            self.flush()
