"""`triptych demo`"""

import time
from dataclasses import dataclass
from pathlib import Path

from triptych.cli.output import SHIPPED, print_json
from triptych.errors import UserError

# Two of most groups, by their names; drawn by a hand that no training picture is by.
SHOWN = (
    *("fox", "strawberry", "sailboat", "guitar", "basketball"),
    *("cactus", "grinning face", "hamburger", "rocket", "owl"),
)


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Put shipped drawings of a style never trained on through the shipped network, and draw what it sees in
    them.

    Writes a sheet with each picture, its five most probable names, and its attention rollout.
    """

    out: Path = Path("triptych.png")
    """PNG to write."""
    model: str = SHIPPED
    """Another classifier of the same drawings: a file, or a RUN folder."""
    json: bool = False
    """Print the names and probabilities as JSON."""

    def run(self) -> int:
        from triptych.data.emoji import emoji
        from triptych.pipelines.explain import explain
        from triptych.plots import style
        from triptych.plots.sheet import Seen, SeePanel, demo_sheet
        from triptych.weights import load

        net, source = load(self.model), emoji("test")
        if net.card.classes != source.classes:  # pyright: ignore[reportAttributeAccessIssue]
            raise UserError(f"{self.model} names other things than emoji; use {SHIPPED}, or a run on emoji")
        first = {source.classes[label]: i for i, label in reversed(list(enumerate(source.labels)))}
        started, cards = time.perf_counter(), []
        for name in SHOWN:
            found = explain(net, source[first[name]].image)
            guesses = [(guess.name, guess.probability) for guess in found.classification]
            cards.append(Seen(image=found.image, rollout=found.rollout, guesses=guesses, truth=name))
        seconds = time.perf_counter() - started
        below = (
            f"{len(cards)} drawings by a hand the network has never seen, named out of "
            f"{len(source.classes):,}. Blue is right. Drawings: Twemoji, CC BY 4.0"
        )
        style.save(demo_sheet([SeePanel(cards=cards)], below=below), self.out)
        if self.json:
            print_json([{"truth": card.truth, "top": list(card.guesses)} for card in cards])
        else:
            right = sum(card.guesses[0][0] == card.truth for card in cards)
            for card in cards:
                name, probability = card.guesses[0]
                mark = "right" if name == card.truth else "wrong"
                print(f"  {mark}  {card.truth}: {name} {probability:.0%}")
            print(f"{self.out}: {right} of {len(cards)} right, {seconds:.1f} s")
        return 0
