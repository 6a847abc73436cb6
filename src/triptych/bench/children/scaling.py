"""Time forward passes of one square image, and measure the memory of the first: scaling.py NETWORK CHANGES SIDE SECONDS
THREADS."""

import ast
import sys
import time

import torch

from triptych.bench.children.process_memory import memory, report, reset_peak
from triptych.models.registry import create


def main(name: str, changes: str, side: str, seconds: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    net = create(name, **ast.literal_eval(changes)).eval()
    image = torch.randn(1, 3, int(side), int(side))
    times: list[float] = []
    with torch.inference_mode():
        sum(float(p.sum()) for p in net.parameters())
        reset_peak()
        before = memory().current
        net(image)
        grown = memory().peak - before
        while not times or sum(times) < float(seconds):
            start = time.perf_counter()
            net(image)
            times.append(time.perf_counter() - start)
    report(seconds=sorted(times)[len(times) // 2], grown=grown)


if __name__ == "__main__":
    main(*sys.argv[1:])
