"""The syntax of prompts, as in AUTOMATIC1111's web UI.

    a (red:1.3) apple        the word has weight 1.3
    a ((red)) apple          weight 1.1 for each pair of brackets
    a [red] apple            weight 1 / 1.1
    a \\(red\\) apple          literal brackets
    a red apple BREAK a cat  the second part starts a new chunk
    <lora:name:0.8>          a LoRA, removed before the text is encoded
    <lora:name:0.8:0.5>      the same, with a weight for the text encoder and one for the UNet (also te=0.8, unet=0.5)

What changes from step to step is the matter of `prompt_schedule`. Syntax of extensions is refused by name.
"""

import itertools
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

from triptych.errors import ConfigError
from triptych.models.tokenization.tokenizer import Span

STRONGER, WEAKER = 1.1, 1 / 1.1
LARGEST_WEIGHT = 1e4  # a larger weight is a typing error and would overflow

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
_LORA = re.compile(r"(?<!\\)<(?:lora|lyco):([^<>]*)>")  # the web UI reads LyCORIS' tag as its own
# Brackets, tags, variants, wildcards, and a number at the end, which would be the prompt's weight.
_SPECIAL = re.compile(
    r"[\\()\[\]]|<(?=[A-Za-z]\w*:)|\{(?=[^{}|]*\|)|__(?=[^\W_])|:(?=\s*[+-]?(?:[0-9]+\.?|[0-9]*\.[0-9]+)\s*\Z)"
)
# Syntax of other programs and extensions, unless a backslash stands before it.
_FOREIGN = (
    (re.compile(r"(?<!\\)<hypernet:[^<>]*>"), "hypernetworks cannot be loaded"),
    (re.compile(r"(?<!\\)<[A-Za-z]\w*:[^<>]*>"), "such a tag is unknown"),
    (re.compile(r"(?<!\\)\{[^{}|]*\|[^{}]*\}"), "variants are not chosen at random; write one of them"),
    (re.compile(r"(?<![\w\\])__[^\W_][\w*/.-]*?__(?!\w)"), "wildcards are not replaced; write the words"),
)


class WeightedText(NamedTuple):
    """Part of a prompt whose tokens have the same weight."""

    text: str
    weight: float


class Lora(NamedTuple):
    """A LoRA named in a prompt."""

    name: str
    weight: float | tuple[float, float]
    """A pair is the weight of the text encoder's changes, and of the UNet's."""


Chunk = list[tuple[int, float]]
"""Tokens that are encoded together, without start and end, each with its weight."""


def parse_prompt(prompt: str) -> list[list[WeightedText]]:
    """Return the pieces of a prompt in order, in sections separated by BREAK.

    An unclosed bracket extends to the end, an unopened one is text; square brackets take no number.
    Time and memory grow with the length of the prompt, also when brackets are nested thousands deep.

    Raises:
        ConfigError: a weight beyond 10,000.
    """
    marks = list(_MARK.finditer(prompt))
    gains = _gains(marks)
    products = {"(": [1.0], "[": [1.0]}  # of the open brackets, round and square
    sections: list[list[WeightedText]] = [[]]
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
            sections[-1].append(WeightedText(part.rstrip() if i < len(parts) - 1 else part, weight))
    return [_merged(section) for section in sections]


def literal(text: str) -> str:
    """Return a prompt that is parsed as `text` literally, with its brackets and special words escaped."""
    escaped = _SPECIAL.sub(lambda match: "\\" + match[0], text)
    return escaped.replace("BREAK", "BREA\\K").replace("AND", "AN\\D")


def refuse_foreign_syntax(prompt: str) -> None:
    """Refuse what other programs and extensions replace in a prompt, which a text encoder would read as words.

    Raises:
        ConfigError: names the first of it.
    """
    for pattern, problem in _FOREIGN:
        if match := pattern.search(prompt):
            shown = " ".join(match[0].split())[:60]
            raise ConfigError(f"the prompt has {shown!r}: {problem}; or write a backslash before it if it is text")


def extract_loras(prompt: str) -> tuple[str, list[Lora]]:
    """Return the prompt without its `<lora:name>` and `<lora:name:weight>`, and those LoRAs; the default weight is 1.

    Raises:
        ConfigError: a name is missing or a weight is not a number.
    """
    loras = [_lora(match) for match in _LORA.finditer(prompt)]
    return _LORA.sub("", prompt), loras


def _lora(match: re.Match[str]) -> Lora:
    """Read a tag's parts as the web UI does: te, by default 1, and unet, by default te, by place or by name."""
    name, *parts = match[1].split(":")
    by_name = dict(part.split("=", 1) for part in parts if "=" in part)
    by_place = [part for part in parts if "=" not in part]
    if len(by_place) > 2 or set(by_name) - {"te", "unet"}:
        raise ConfigError(f"{match[0]} must be a name and one or two weights, such as <lora:watercolor:0.8>")
    te = by_name.get("te", by_place[0] if by_place else "1")
    unet = by_name.get("unet", by_place[1] if len(by_place) > 1 else te)
    try:
        weights = float(te), float(unet)
    except ValueError as problem:
        raise ConfigError(
            f"{match[0]} has the weight {':'.join(parts)!r}, which must be a number such as 0.8"
        ) from problem
    if not name.strip() or not all(abs(weight) <= LARGEST_WEIGHT for weight in weights):
        raise ConfigError(f"{match[0]} must be a name and a number, such as <lora:watercolor:0.8>")
    return Lora(name.strip(), weights[0] if weights[0] == weights[1] else weights)


def pack(sections: list[list[WeightedText]], spans: Callable[[str], Sequence[Span]], room: int) -> list[Chunk]:
    """Return tokens in chunks of at most `room`; each section starts a new chunk. There is at least one.

    Args:
        sections: the result of `parse_prompt`.
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


def _merged(section: list[WeightedText]) -> list[WeightedText]:
    """Merge adjacent pieces of equal weight, so that a word with literal brackets is tokenized as one string."""
    merged = []
    for weight, alike in itertools.groupby((piece for piece in section if piece.text), lambda piece: piece.weight):
        merged.append(WeightedText("".join(piece.text for piece in alike), weight))
        if not abs(weight) <= LARGEST_WEIGHT:
            text = merged[-1].text.strip()[:40]
            raise ConfigError(f"the weight of {text!r} is {weight:.3g}, which must be at most {LARGEST_WEIGHT:g}")
    return merged
