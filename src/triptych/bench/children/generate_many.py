"""Generate many images, each written as it is finished: generate_many.py MODEL OUT COUNT BATCH STEPS."""

import sys
import time
from typing import Any

import triptych as tp
from triptych.bench.children.process_memory import memory, report, reset_peak
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.diffusion.records import with_seeds


def main(model: str, out: str, *numbers: str) -> None:
    count, batch, steps = map(int, numbers)
    pipe = tp.DiffusionPipeline(model)
    record = GenerationRecord(prompt="a red apple", num_steps=steps)
    pipe.generate(with_seeds([record], batch), batch_size=batch, progress=False)

    def save(image: Any) -> None:
        pipe.save([image], out)

    reset_peak()
    before, start = memory().current, time.perf_counter()
    records = with_seeds([record], count)
    pipe.generate(records, batch_size=batch, progress=False, on_image=save, return_images=False)
    report(seconds=(time.perf_counter() - start) / count, before=before, peak=memory().peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
