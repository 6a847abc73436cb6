"""Classify a folder of images with transformers' pipeline: folder_transformers.py MODEL FOLDER BATCH WORKERS DTYPE."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

from triptych.bench.children.process_memory import memory, report, reset_peak


def main(model: str, folder: str, batch: str, workers: str, dtype: str) -> None:
    files = sorted(str(path) for path in Path(folder).rglob("*") if path.is_file())
    dtypes = {"bf16": torch.bfloat16, "fp32": torch.float32}
    pipe: Any = pipeline("image-classification", model=model, dtype=dtypes[dtype])

    def classify(files: list[str]) -> list[Any]:
        return pipe(files, batch_size=int(batch), num_workers=int(workers), top_k=5)

    classify(files[: int(batch)])
    reset_peak()
    before, start = memory().current, time.perf_counter()
    results = classify(files)
    seconds = (time.perf_counter() - start) / len(files)
    first = [{guess["label"]: guess["score"] for guess in result} for result in results[:64]]
    report(seconds=seconds, before=before, peak=memory().peak, first=first)


if __name__ == "__main__":
    main(*sys.argv[1:])
