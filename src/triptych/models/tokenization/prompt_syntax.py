"""The syntax of prompts, as in AUTOMATIC1111's web UI.

    a (red:1.3) apple        the word has weight 1.3
    a ((red)) apple          weight 1.1 for each pair of brackets
    a [red] apple            weight 1 / 1.1
    a \\(red\\) apple          literal brackets
    a red apple BREAK a cat  the second part starts a new chunk
    <lora:name:0.8>          a LoRA, removed before the text is encoded
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from triptych.errors import UserError
from triptych.models.tokenization.tokenizer import Span

STRONGER, WEAKER = 1.1, 1 / 1.1
LARGEST = 1e4  # a larger weight is a typing error, and would soon overflow

_MARK = re.compile(
    r"""
      \\(?P<meant>[()\[\]\\]?)                                   # a backslash before other characters is dropped
    | (?P<open>[(\[])
    | :\s*+(?P<weight>[+-]?(?:[0-9]++\.?[0-9]*+|\.[0-9]++))\s*+\)
    | (?P<close>[)\]])
    | (?P<text>[^\\()\[\]:]++|:)
    """,
    re.VERBOSE,
)
_BREAK = re.compile(r"\bBREAK\b")
_LORA = re.compile(r"<lora:([^<>:]*)(?::([^<>]*))?>")


class Piece(NamedTuple):
    """Part of a prompt whose tokens have the same weight."""

    text: str
    weight: float


class Lora(NamedTuple):
    """A LoRA named in a prompt."""

    name: str
    weight: float


Chunk = list[tuple[int, float]]
"""Tokens that are encoded together, without start and end, each with its weight."""


def parse(prompt: str) -> list[list[Piece]]:
    """Return the pieces of a prompt in order, in sections separated by BREAK.

    An unclosed bracket extends to the end, an unopened one is text; square brackets take no number.
    Time and memory grow with the length of the prompt, also when brackets are nested thousands deep.

    Raises:
        UserError: a weight beyond 10,000.
    """
    marks = list(_MARK.finditer(prompt))
    gains = _gains(marks)
    products = {"(": [1.0], "[": [1.0]}  # of the brackets that are open, round and square
    sections: list[list[Piece]] = [[]]
    for place, mark in enumerate(marks):
        if mark["open"]:
            around = products[mark["open"]]
            around.append(around[-1] * gains[place])
            continue
        bracket = _closes(mark)
        if bracket and len(products[bracket]) > 1:
            products[bracket].pop()
            continue
        weight = products["("][-1] * products["["][-1]
        parts = _BREAK.split(mark["text"]) if mark["text"] else [mark[0] if mark["meant"] is None else mark["meant"]]
        for i, part in enumerate(parts):
            if i > 0:
                sections.append([])
            part = part.lstrip() if i > 0 else part
            sections[-1].append(Piece(part.rstrip() if i < len(parts) - 1 else part, weight))
    return [_merged(section) for section in sections]


def literal(text: str) -> str:
    """Return a prompt that is parsed as `text` literally, with its brackets and special words escaped."""
    return re.sub(r"[\\()\[\]]", r"\\\g<0>", text).replace("BREAK", "BREA\\K").replace("<lora:", "<lora\\:")


def extract_loras(prompt: str) -> tuple[str, list[Lora]]:
    """Return the prompt without its `<lora:name>` and `<lora:name:weight>`, and those LoRAs; the default weight is 1.

    Raises:
        UserError: a name is missing or a weight is not a number.
    """
    loras = []
    for match in _LORA.finditer(prompt):
        name, weight = match[1].strip(), match[2]
        try:
            loras.append(Lora(name, 1.0 if weight is None else float(weight)))
        except ValueError as problem:
            raise UserError(f"{match[0]} has the weight {weight!r}, which must be a number such as 0.8") from problem
        if not name or not abs(loras[-1].weight) <= LARGEST:
            raise UserError(f"{match[0]} must be a name and a number, such as <lora:watercolor:0.8>")
    return _LORA.sub("", prompt), loras


def pack(sections: list[list[Piece]], spans: Callable[[str], Sequence[Span]], room: int) -> list[Chunk]:
    """Return tokens in chunks of at most `room`; each section starts a new chunk. There is at least one.

    Args:
        sections: the result of `parse`.
        spans: a tokenizer's `spans`. The tokens of a span stay together.
        room: tokens of a chunk without its start and end: 75 for CLIP.
    """
    chunks: list[Chunk] = []
    for section in sections:
        chunk: Chunk = []
        for piece in section:
            for span in spans(piece.text):
                if len(chunk) + len(span) > room:
                    chunks.append(chunk)
                    chunk = []
                chunk += [(i, piece.weight) for i in span]
        if chunk or section is not sections[-1] or not chunks:
            chunks.append(chunk)
    return chunks


def _gains(marks: list[re.Match[str]]) -> dict[int, float]:
    """Return the factor of each opening bracket, by its index among the marks."""
    gains: dict[int, float] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for place, mark in enumerate(marks):
        if mark["open"]:
            gains[place] = STRONGER if mark["open"] == "(" else WEAKER
            opened[mark["open"]].append(place)
        elif (bracket := _closes(mark)) and opened[bracket]:
            place = opened[bracket].pop()
            gains[place] = float(mark["weight"]) if mark["weight"] else gains[place]
    return gains


def _closes(mark: re.Match[str]) -> str | None:
    """Return which bracket a mark closes, if one is open."""
    if mark["weight"]:
        return "("
    return {")": "(", "]": "["}[mark["close"]] if mark["close"] else None


def _merged(section: list[Piece]) -> list[Piece]:
    """Neighbors that count alike as one piece: a word is cut into tokens whole, with the literal brackets."""
    merged = []
    for weight, alike in itertools.groupby((piece for piece in section if piece.text), lambda piece: piece.weight):
        merged.append(Piece("".join(piece.text for piece in alike), weight))
        if not abs(weight) <= LARGEST:
            text = merged[-1].text.strip()[:40]
            raise UserError(f"the weight of {text!r} is {weight:.3g}, which must be at most {LARGEST:g}")
    return merged
