"""Run two training steps: train_step.py TASK LIBRARY FOLDER DTYPE THREADS SIZE..."""

import sys

import torch

from triptych.bench.children.process_memory import memory, report, reset_peak
from triptych.bench.measurements.train_step import training_step


def main(task: str, library: str, folder: str, dtype: str, threads: str, *size: str) -> None:
    torch.set_num_threads(int(threads))
    step = training_step(task, library, folder, tuple(map(int, size)), getattr(torch, dtype))
    sum(float(p.sum()) for p in step.net.parameters())
    reset_peak()
    before = memory().current
    losses = [step().tolist() for _ in range(2)]
    report(before=before, peak=memory().peak, losses=losses)


if __name__ == "__main__":
    main(*sys.argv[1:])
