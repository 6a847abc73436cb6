"""Generate an image with diffusers' pipeline, or its first step: generate_diffusers.py FOLDER OPTIONS.

OPTIONS is a JSON object: arguments of the pipeline, and "first", which ends the program after one step.
"""

import json
import sys
import time
from typing import Any

start = time.perf_counter()

import torch  # noqa: E402
from diffusers import StableDiffusionPipeline  # noqa: E402

imported = time.perf_counter()


def main(folder: str, encoded: str) -> None:
    options = json.loads(encoded)
    first = options.pop("first", False)

    def stop(*_: Any) -> None:
        print("REPORT " + json.dumps({"first": time.perf_counter() - start}))
        sys.exit()

    pipe: Any = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    loaded = time.perf_counter()
    if first:
        options["callback_on_step_end"] = stop
    pipe("a red apple", **options)
    image = time.perf_counter() - loaded
    from triptych.bench.children.process_memory import memory, report

    report(load=loaded - imported, image=image, peak=memory().peak)


if __name__ == "__main__":
    main(*sys.argv[1:])
