"""Generate an image with our pipeline, or its first step: generate_ours.py MODEL OPTIONS.

OPTIONS is a JSON object: "num_steps", "low_memory", and "first", which ends the program after one step.
"""

import json
import sys
import time
from typing import Any

start = time.perf_counter()

import triptych as tp  # noqa: E402

_ = tp.DiffusionPipeline  # imported at its first use
imported = time.perf_counter()


def main(model: str, encoded: str) -> None:
    options = json.loads(encoded)

    def stop(*_: Any) -> None:
        print("REPORT " + json.dumps({"first": time.perf_counter() - start}))
        sys.exit()

    pipe = tp.DiffusionPipeline(model, dtype="bf16", low_memory=options.get("low_memory", False))
    loaded = time.perf_counter()
    preview = stop if options.get("first") else None
    pipe.text_to_image("a red apple", num_steps=options.get("num_steps", 30), preview=preview, progress=False)
    image = time.perf_counter() - loaded
    from triptych.bench.children.process_memory import memory, report

    report(load=loaded - imported, image=image, peak=memory().peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
