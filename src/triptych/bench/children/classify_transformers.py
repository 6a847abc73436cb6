"""Classify one image with transformers' pipeline: classify_transformers.py MODEL IMAGE."""

import json
import sys

from transformers import pipeline


def main(model: str, image: str) -> None:
    pipe = pipeline("image-classification", model=model)
    result = pipe(image, top_k=5)
    probabilities = {guess["label"]: guess["score"] for guess in result}
    print("REPORT " + json.dumps({"probabilities": probabilities}))


if __name__ == "__main__":
    main(*sys.argv[1:])
