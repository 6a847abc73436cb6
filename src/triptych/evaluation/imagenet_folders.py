"""Match data whose classes are named by WordNet id, by synonym or by index to a network with ImageNet's classes."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from triptych.weights.mapping.defaults import imagenet_names, imagenet_synsets

SYNSET = re.compile(r"(?<![A-Za-z0-9])n\d{8}(?!\d)")  # also as a part of a name, as in n01440764_tench
SAME_NAMES = (
    0.8  # share of a network's names that must be ImageNet's, since lists spell some of them differently
)


@dataclass(frozen=True)
class ImageNetMatch:
    """The classes of a network for ImageNet, the network's index of each class of the data, and how the data names
    them."""

    names: tuple[str, ...]
    index: tuple[int, ...]
    origin: str


def match_imagenet(
    names: Sequence[str] | None, num_classes: int, classes: Sequence[str]
) -> ImageNetMatch | None:
    """Match the classes of data to those of a network for ImageNet.

    The data may name all of its classes by WordNet id (n01440764, n01440764_tench), by index (0, 0001), or by a synonym
    that only one class has (tench, Tinca_tinca), in any letter case.

    Args:
        names: class names of the network; None if it has none.
        num_classes: number of classes of the network.
        classes: names of the data's classes.

    Returns:
        None if the network is not one for ImageNet, or not all classes are named in one of these ways.
    """
    standard, synsets = imagenet_names(num_classes), imagenet_synsets(num_classes)
    if standard is None or synsets is None or not (names is None or _are_imagenet(names, standard)):
        return None
    by_synset = {synset: i for i, synset in enumerate(synsets)}

    def by_id(name: str) -> int | None:
        ids = SYNSET.findall(name)
        return by_synset.get(ids[0]) if len(ids) == 1 else None

    def by_index(name: str) -> int | None:
        return int(name) if name.isascii() and name.isdigit() and int(name) < num_classes else None

    known = tuple(names or standard)
    by_synonym = _by_synonym(known)
    ways: list[tuple[str, Callable[[str], int | None]]] = [
        ("WordNet ids", by_id),
        ("indices of ImageNet's classes", by_index),
        ("synonyms of ImageNet's classes", lambda name: by_synonym.get(_plain(name))),
    ]
    for origin, way in ways:
        index = tuple(i for i in map(way, classes) if i is not None)
        if len(index) == len(classes) and len(set(index)) == len(index):
            return ImageNetMatch(known, index, f"{origin} ({classes[0]} is {known[index[0]]})")
    return None


def _are_imagenet(names: Sequence[str], standard: Sequence[str]) -> bool:
    same = sum(bool(_synonyms(a) & _synonyms(b)) for a, b in zip(names, standard, strict=False))
    return len(names) == len(standard) and same >= SAME_NAMES * len(standard)


def _by_synonym(names: Sequence[str]) -> dict[str, int]:
    """Return the index of each synonym that only one class has."""
    index: dict[str, int | None] = {}
    for i, name in enumerate(names):
        for synonym in _synonyms(name):
            index[synonym] = None if synonym in index else i
    return {synonym: i for synonym, i in index.items() if i is not None}


def _synonyms(name: str) -> set[str]:
    return {_plain(name), *map(_plain, name.split(","))}


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", " ", name.replace("'", "")).strip().lower()
