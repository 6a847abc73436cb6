"""Match the classes of a data set to those of a network by name."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from triptych.errors import UserError
from triptych.model_card import ModelCard


@dataclass(frozen=True)
class ClassMatch:
    """The classes of a network, and where those of a data set are among them."""

    names: tuple[str, ...]
    """Of the network, by index."""
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
    """Match classes by name. A network without class names takes those of data with as many classes.

    Args:
        card: of the network.
        num_classes: of the network.
        classes, groupings: of the data.

    Raises:
        UserError: the data has classes that the network does not know.
    """
    names = card.classes or (tuple(classes) if len(classes) == num_classes else ())
    unknown = sorted(set(classes) - set(names))
    if unknown:
        raise UserError(
            f"the data has {len(unknown)} classes that the model does not know ({', '.join(unknown[:3])}); "
            "fine-tune on that data first, or rename its classes to the model's"
        )
    same = tuple(classes) == tuple(names)
    return ClassMatch(
        tuple(names),
        tuple(names.index(name) for name in classes),
        card.groupings or (dict(groupings or {}) if same else {}),
    )
