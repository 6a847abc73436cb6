"""The grammar of prompts, as AUTOMATIC1111's web UI reads them.

    a (red:1.3) apple        the word counts 1.3 times
    a ((red)) apple          1.1 times for each pair of brackets
    a [red] apple            1 / 1.1 times
    a \\(red\\) apple          brackets that are meant
    a red apple BREAK a cat  the second part starts a chunk of its own
    <lora:name:0.8>          a LoRA, taken out before the text is encoded
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from triptych.errors import UserError
from triptych.models.tokenization.tokenizer import Span

STRONGER, WEAKER = 1.1, 1 / 1.1
LARGEST = 1e4  # a weight beyond it is a slip of the keyboard, and soon no number at all

_MARK = re.compile(
    r"""
      \\(?P<meant>[()\[\]\\]?)                                   # a backslash before anything else is nothing
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
    """A stretch of a prompt whose tokens count alike."""

    text: str
    weight: float


class Lora(NamedTuple):
    """A LoRA that a prompt asks for."""

    name: str
    weight: float


Chunk = list[tuple[int, float]]
"""Tokens that the encoder reads together, without start and end, each with its weight."""


def parse(prompt: str) -> list[list[Piece]]:
    """The pieces of a prompt in order, in sections that BREAK divides.

    Brackets left open reach to the end, brackets that close nothing are text; square ones take no number.
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
        kind = _closes(mark)
        if kind and len(products[kind]) > 1:
            products[kind].pop()
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
    """The prompt that is read as `text` and nothing else, whatever brackets or words of the grammar are in it."""
    return re.sub(r"[\\()\[\]]", r"\\\g<0>", text).replace("BREAK", "BREA\\K").replace("<lora:", "<lora\\:")


def extract_loras(prompt: str) -> tuple[str, list[Lora]]:
    """The prompt without its `<lora:name>` and `<lora:name:weight>`, and these; a weight left out is 1.

    Raises:
        UserError: a name is missing or a weight is no number.
    """
    loras = []
    for found in _LORA.finditer(prompt):
        name, weight = found[1].strip(), found[2]
        try:
            loras.append(Lora(name, 1.0 if weight is None else float(weight)))
        except ValueError as problem:
            raise UserError(f"{found[0]} has the weight {weight!r}, which must be a number such as 0.8") from problem
        if not name or not abs(loras[-1].weight) <= LARGEST:
            raise UserError(f"{found[0]} must be a name and a number, such as <lora:watercolour:0.8>")
    return _LORA.sub("", prompt), loras


def pack(sections: list[list[Piece]], spans: Callable[[str], Sequence[Span]], room: int) -> list[Chunk]:
    """Tokens in chunks of at most `room`; each section starts one. There is at least one chunk.

    Args:
        sections: what `parse` gave.
        spans: a tokenizer's `spans`. The numbers of one span stay together.
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
    """By what each opening bracket multiplies, by its place among the marks."""
    gains: dict[int, float] = {}
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for place, mark in enumerate(marks):
        if mark["open"]:
            gains[place] = STRONGER if mark["open"] == "(" else WEAKER
            opened[mark["open"]].append(place)
        elif (kind := _closes(mark)) and opened[kind]:
            place = opened[kind].pop()
            gains[place] = float(mark["weight"]) if mark["weight"] else gains[place]
    return gains


def _closes(mark: re.Match[str]) -> str | None:
    """Which kind of bracket a mark closes, if one of that kind is open."""
    if mark["weight"]:
        return "("
    return {")": "(", "]": "["}[mark["close"]] if mark["close"] else None


def _merged(section: list[Piece]) -> list[Piece]:
    """Neighbours that count alike as one piece: a word is cut into tokens whole, with the brackets that are meant."""
    merged = []
    for weight, alike in itertools.groupby((piece for piece in section if piece.text), lambda piece: piece.weight):
        merged.append(Piece("".join(piece.text for piece in alike), weight))
        if not abs(weight) <= LARGEST:
            said = merged[-1].text.strip()[:40]
            raise UserError(f"the weight of {said!r} is {weight:.3g}, which must be at most {LARGEST:g}")
    return merged
