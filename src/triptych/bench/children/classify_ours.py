"""Classify one image with our pipeline: classify_ours.py MODEL IMAGE. Imports no more than a user's program would."""

import json
import sys

import triptych as tp


def main(model: str, image: str) -> None:
    pipe = tp.ClassificationPipeline(model, dtype="fp32")
    result = pipe(image, top=5)
    probabilities = {guess.name: guess.probability for guess in result}
    print("REPORT " + json.dumps({"probabilities": probabilities}))


if __name__ == "__main__":
    main(*sys.argv[1:])
