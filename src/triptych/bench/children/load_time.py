"""Load a classifier from a file and classify one image: load_time.py LIBRARY FILE HEIGHT WIDTH."""

import sys
import time
from typing import Any

import torch

from triptych.bench.children.process_memory import memory, report


def main(library: str, source: str, height: str, width: str) -> None:
    if library == "ours":
        from triptych.weights import load
    else:
        from transformers import ViTForImageClassification

        def load(source: str) -> Any:
            return ViTForImageClassification.from_pretrained(source).eval()

    image = torch.linspace(-1, 1, 3 * int(height) * int(width)).view(1, 3, int(height), int(width))
    before, start = memory().current, time.perf_counter()
    net: Any = load(source)
    loaded = time.perf_counter()
    # Every weight is used before memory is read: ours stay mapped to the file until then.
    with torch.inference_mode():
        logits = net(image) if library == "ours" else net(image).logits
    end = time.perf_counter()
    report(
        load=loaded - start,
        result=end - start,
        before=before,
        peak=memory().peak,
        logits=logits[0].tolist(),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
