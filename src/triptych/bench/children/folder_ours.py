"""Classify or segment a folder of images with our pipelines, and time the network alone for comparison.

folder_ours.py classify|segment MODEL FOLDER OUT BATCH WORKERS COUNT DTYPE
"""

import json
import multiprocessing
import sys
import time

import numpy as np

import triptych as tp
from triptych.bench.children.process_memory import memory, private_memory, report, reset_peak
from triptych.pipelines.image_input import batched


def main(task: str, model: str, folder: str, out: str, *options: str) -> None:
    batch, workers, count, dtype = *map(int, options[:3]), options[3]
    pipelines = {"classify": tp.ClassificationPipeline, "segment": tp.SegmentationPipeline}
    pipe = pipelines[task](model, dtype=dtype, batch_size=batch, workers=workers)
    preprocess = pipe.card.preprocess
    pixels = np.random.default_rng(0).integers(0, 256, (batch, *preprocess.size, 3), dtype=np.uint8)
    images = batched(list(pixels), preprocess, pipe.config.in_channels)
    pipe.logits(images)

    def network_alone() -> float:
        """Return the seconds per image of the network on prepared tensors."""
        times = max(1, min(count, 1024) // batch)
        start = time.perf_counter()
        for _ in range(times):
            pipe.logits(images)
        return (time.perf_counter() - start) / times / batch

    network, private, done, first = [network_alone()], 0, 0, []
    reset_peak()
    before, start = memory().current, time.perf_counter()
    with open(out + ".jsonl", "w") as lines:
        for result in pipe(folder):
            if task == "segment":
                result.save(out, str(done), ("labels", "json"), durable=False)
            lines.write(json.dumps(result.to_json()) + "\n")
            if done < 64 and task == "classify":
                first.append({guess.name: guess.probability for guess in result})
            done += 1
            if done % (count // 4) == 0:
                children = multiprocessing.active_children()
                private = max([private, *(private_memory(child.pid) for child in children if child.pid)])
    seconds, peak = (time.perf_counter() - start) / done, memory().peak
    network.append(network_alone())
    report(
        network=network, seconds=seconds, before=before, peak=peak, private=private, count=done, first=first
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
