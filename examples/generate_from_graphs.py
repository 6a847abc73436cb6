"""Generate images from the graphs of a text-to-image model, without torch:

    triptych export ldm-emoji EXPORTED
    python generate_from_graphs.py EXPORTED "a red apple" apple.png

It needs numpy, onnxruntime, tokenizers and pillow.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image
from tokenizers import Tokenizer


def generate(folder, prompt, negative_prompt="", num_steps=30, guidance_scale=None, noise=None, seed=0):
    """Return one image (H, W, 3), uint8, sampled by Euler's method (DDIM).

    Args:
        noise: what sampling starts from, (1, channels, h, w); drawn from `seed` if None.
    """
    pipeline = json.loads((Path(folder) / "pipeline.json").read_text())
    graphs = {name: onnxruntime.InferenceSession(Path(folder) / file, providers=["CPUExecutionProvider"])
              for name, file in pipeline["graphs"].items() if name != "encoder"}

    def run(name, **inputs):
        return graphs[name].run(None, inputs)[0]

    tokens = pipeline["tokenizer"]
    tokenizer, length = Tokenizer.from_file(str(Path(folder) / tokens["file"])), tokens["length"]
    rows = []
    for text in (prompt, negative_prompt):
        ids = tokenizer.encode(text, add_special_tokens=False).ids[: length - 2]
        ids = [tokens["start"], *ids, tokens["end"]]
        rows.append(ids + [tokens["pad"]] * (length - len(ids)))
    context = run("text_encoder", token_ids=np.array(rows, np.int64))

    if noise is None:
        shape = (1, pipeline["latents"]["channels"], *pipeline["latents"]["size"])
        noise = np.random.default_rng(seed).standard_normal(shape, np.float32)
    if guidance_scale is None:
        guidance_scale = pipeline["guidance_scale"] or 7.5
    first, alphas, sigmas = pipeline["first_time"], pipeline["alphas"], pipeline["sigmas"]
    # Whole times, evenly spaced from the very end: "trailing".
    times = [first - 1 + round(t) for t in np.arange(len(alphas), 0, -len(alphas) / num_steps)[:num_steps]]
    levels = [(alphas[t - first], sigmas[t - first], t) for t in times] + [(1.0, 0.0, 0.0)]
    x = noise.astype(np.float64)
    for (alpha, sigma, t), (next_alpha, next_sigma, _) in zip(levels, levels[1:]):
        pair = np.concatenate([x, x]).astype(np.float32)
        output = run("network", x=pair, t=np.full(2, t, np.float32), context=context)
        positive, negative = (to_x0(pipeline["prediction"], x, half, alpha, sigma) for half in np.split(output, 2))
        x0 = negative + guidance_scale * (positive - negative)
        x = next_sigma / sigma * x + (next_alpha - next_sigma / sigma * alpha) * x0
    pixels = run("decoder", latents=x.astype(np.float32))[0].transpose(1, 2, 0)
    return np.clip((pixels / 2 + 0.5) * 255 + 0.5, 0, 255).astype(np.uint8)


def to_x0(prediction, x, output, alpha, sigma):
    """Return the clean latents that the network's output implies, of x = alpha x0 + sigma eps."""
    if prediction == "eps":
        return (x - sigma * output) / alpha
    if prediction == "v":
        return (alpha * x - sigma * output) / (alpha**2 + sigma**2)
    return output if prediction == "x0" else (x - sigma * output) / (alpha + sigma)


if __name__ == "__main__":
    folder, prompt, out = sys.argv[1:4]
    Image.fromarray(generate(folder, prompt)).save(out)
