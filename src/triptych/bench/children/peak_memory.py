"""Run one forward pass of a classifier: peak_memory.py LIBRARY FILE DTYPE BATCH HEIGHT WIDTH THREADS."""

import sys

import torch

from triptych.bench.children.process_memory import memory, report, reset_peak


def main(library: str, source: str, dtype: str, *numbers: str) -> None:
    batch, height, width, threads = map(int, numbers)
    torch.set_num_threads(threads)
    torch.manual_seed(1)
    images = torch.randn(batch, 3, height, width).to(getattr(torch, dtype))
    if library == "ours":
        from triptych.weights import load

        net = load(source)
    else:
        from transformers import AutoModelForImageClassification

        net = AutoModelForImageClassification.from_pretrained(source, attn_implementation="sdpa").eval()
    net = net.to(getattr(torch, dtype))
    with torch.inference_mode():
        # Weights are read, in their precision, before memory is: what grows is of the pass alone.
        sum(float(p.sum()) for p in net.parameters())
        reset_peak()
        before = memory().current
        logits = net(images) if library == "ours" else net(images).logits
    report(before=before, peak=memory().peak, logits=logits.float().flatten().tolist())


if __name__ == "__main__":
    main(*sys.argv[1:])
