"""The result of classifying an image."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, overload


@dataclass(frozen=True)
class Guess:
    """A class and its probability."""

    name: str
    index: int
    probability: float


@dataclass(frozen=True, repr=False)
class Classification(Sequence[Guess]):
    """The most probable classes of one image, best first: a sequence of `Guess`, and the best one's attributes."""

    guesses: tuple[Guess, ...]
    source: str = ""
    """The image's file, else its type."""

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
        text = ", ".join(f"{guess.name} {guess.probability:.3f}" for guess in self.guesses)
        return f"<{self.source}: {text}>" if self.source else f"<{text}>"

    def to_json(self) -> dict[str, Any]:
        return {"image": self.source, "top": [asdict(guess) for guess in self.guesses]}
