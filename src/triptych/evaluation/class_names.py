"""Match the classes of a data set to those of a network by name."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from triptych.errors import DataError
from triptych.evaluation.imagenet_folders import match_imagenet
from triptych.model_card import ModelCard

log = logging.getLogger(__name__)
LISTED = 10  # classes that are named in a message


def describe_unmeasured(counts: Int[np.ndarray, " k"], classes: Sequence[str]) -> str | None:
    """Return a sentence that names the classes that do not occur, whose accuracy is unknown; None if there are none."""
    names = [name for name, count in zip(classes, counts, strict=True) if not count]
    if not names:
        return None
    listed = ", ".join(names[:LISTED]) + (", ..." if len(names) > LISTED else "")
    return f"{len(names)} of {len(classes)} classes do not occur in the data and are not measured: {listed}"


@dataclass(frozen=True)
class ClassMatch:
    """The classes of a network, and the position of each class of the data among them."""

    names: tuple[str, ...]
    """The network's classes, by index."""
    index: tuple[int, ...]
    """The network's index of each class of the data."""
    groupings: Mapping[str, Sequence[str]]
    """Coarser names of the network's classes, as in `ModelCard.groupings`."""


def match_classes(
    card: ModelCard,
    num_classes: int,
    classes: Sequence[str],
    groupings: Mapping[str, Sequence[str]] | None = None,
) -> ClassMatch:
    """Match the classes of data to those of a network by name.

    A network without class names takes those of the data, if it has the same number of classes. The classes of a
    network for ImageNet may also be named by WordNet id, synonym or index in the data (`match_imagenet`), which is
    logged.

    Args:
        card: model card of the network.
        num_classes: number of classes of the network.
        classes, groupings: names of the data's classes, and their coarser names.

    Raises:
        DataError: the data has classes that the network does not have.
    """
    names = card.classes or (tuple(classes) if len(classes) == num_classes else ())
    unknown = sorted(set(classes) - set(names))
    if matched := match_imagenet(card.classes, num_classes, classes) if unknown or not card.classes else None:
        log.warning("the data's classes are %s; matched to those of the model", matched.origin)
        return ClassMatch(matched.names, matched.index, card.groupings)
    if unknown:
        raise DataError(
            f"the data has {len(unknown)} classes that the model does not know ({', '.join(unknown[:3])}); "
            "fine-tune on that data first, or rename its classes to the model's"
        )
    same = tuple(classes) == tuple(names)
    return ClassMatch(
        tuple(names),
        tuple(names.index(name) for name in classes),
        card.groupings or (dict(groupings or {}) if same else {}),
    )
