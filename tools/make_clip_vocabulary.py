"""Make src/triptych/assets/clip_vocabulary.txt.gz: the merges of CLIP's byte pairs, from open_clip's wheel.

    python -m pip download --no-deps -d DIR open_clip_torch
    python tools/make_clip_vocabulary.py DIR/open_clip_torch-*.whl

One merge a line, in the order in which they were learned. The published list has 262,144; CLIP's vocabulary is the
256 bytes, once inside a word and once at its end, the first 48,894 merges, and two tokens for a text's start and end.

License: the list is `bpe_simple_vocab_16e6.txt` of openai/CLIP (MIT, Copyright (c) 2021 OpenAI), in the copy that
open_clip carries (MIT, Copyright (c) 2012-2021 Gabriel Ilharco, Mitchell Wortsman and others).
"""

import gzip
import sys
import zipfile
from pathlib import Path

LIST = "open_clip/bpe_simple_vocab_16e6.txt.gz"
VOCABULARY = 49_408
MERGES = VOCABULARY - 2 * 256 - 2
OUT = Path(__file__).parent.parent / "src" / "triptych" / "assets" / "clip_vocabulary.txt.gz"


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:
        title, *merges = gzip.decompress(archive.read(LIST)).decode().splitlines()
    if title != '"bpe_simple_vocab_16e6.txt#version: 0.2' or len(merges) < MERGES:
        raise SystemExit(f"{LIST} is another list: {title!r} with {len(merges)} merges")
    text = "".join(f"{merge}\n" for merge in merges[:MERGES])
    OUT.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{OUT}: {MERGES} merges, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
