"""What a classifier says of an image."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, overload


class Guess(NamedTuple):
    """A class, and how probable it is."""

    name: str
    index: int
    probability: float


@dataclass(frozen=True, repr=False)
class Classification(Sequence[Guess]):
    """The most probable classes of one image, best first: a sequence of `Guess` with the best one's
    attributes."""

    guesses: tuple[Guess, ...]
    source: str = ""
    """The file, or what else the image came from."""

    @property
    def name(self) -> str:
        return self.guesses[0].name

    @property
    def label(self) -> int:
        """Index of the best class. (`index` is a method of every Python sequence.)"""
        return self.guesses[0].index

    @property
    def probability(self) -> float:
        return self.guesses[0].probability

    @overload
    def __getitem__(self, at: int) -> Guess: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Guess]: ...
    def __getitem__(self, at: int | slice) -> Guess | Sequence[Guess]:
        return self.guesses[at]

    def __len__(self) -> int:
        return len(self.guesses)

    def __iter__(self) -> Iterator[Guess]:
        return iter(self.guesses)

    def __repr__(self) -> str:
        words = ", ".join(f"{guess.name} {guess.probability:.3f}" for guess in self.guesses)
        return f"<{self.source}: {words}>" if self.source else f"<{words}>"

    def to_json(self) -> dict[str, Any]:
        return {"image": self.source, "top": [guess._asdict() for guess in self.guesses]}
