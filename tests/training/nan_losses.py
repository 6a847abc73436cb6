"""Losses that are NaN at some steps."""

import math

import pytest

from triptych.training.first_stage.task import Compress
from triptych.training.tasks.classification import Classify
from triptych.training.tasks.segmentation import Segment


def make_losses_nan(patch: pytest.MonkeyPatch, *steps: int) -> None:
    """Make the loss of these steps, counted from 0, NaN."""
    for task in (Classify, Segment, Compress):

        def broken(self, model, batch, sound=task.loss):
            output = sound(self, model, batch)
            return output._replace(loss=output.loss * math.nan) if batch["seed"][1] in steps else output

        patch.setattr(task, "loss", broken)
