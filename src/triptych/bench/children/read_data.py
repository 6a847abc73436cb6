"""Open a data set and read 20 shuffled batches: read_data.py CACHE DATA stream|table WORKERS."""

import multiprocessing
import os
import sys
import time
from pathlib import Path

from triptych.bench.children.process_memory import memory, private_memory, report, reset_peak

BATCH, BATCHES = 256, 20


def main(cache: str, data: str, mode: str, workers: str) -> None:
    os.environ["HF_DATASETS_CACHE"] = cache
    import datasets  # noqa: F401  # part of the size before
    import pyarrow.parquet  # noqa: F401

    from triptych.data.config import DataConfig
    from triptych.data.loading.loader import make_loader
    from triptych.data.open import train_and_eval
    from triptych.data.resizing import Resize

    stream = mode == "stream"
    reset_peak()
    before, start = memory().current, time.perf_counter()
    train, held_out = train_and_eval(data, 0.1, stream=stream)
    _ = train.fingerprint
    opened, indexed = time.perf_counter() - start, memory().peak
    config = DataConfig(batch_size=BATCH, workers=int(workers), cache="off", stream=stream)
    loader = make_loader(train, config, Resize(size=(4, 4)), train=True)
    start, count, private = time.perf_counter(), 0, 0
    for batch in loader:
        count += len(batch["id"])
        if count >= BATCHES * BATCH:
            children = multiprocessing.active_children()
            private = max((private_memory(child.pid) for child in children if child.pid), default=0)
            break
    report(
        count=len(train) + len(held_out),
        opened=opened,
        before=before,
        indexed=indexed,
        peak=memory().peak,
        private=private,
        batches=time.perf_counter() - start,
        disk=sum(file.stat().st_size for file in Path(cache).glob("triptych/*/*")),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
