"""Prompts that change from step to step, and prompts composed of several, as in AUTOMATIC1111's web UI.

    a [red:green:0.5] apple     red for half of the steps, then green
    a [red:green:10] apple      red up to step 10 (a number without a point), then green
    a [green:10] apple          nothing, then green
    a [green::10] apple         green, then nothing
    a [red|green] apple         red and green in turn
    a dog :1.2 AND a cat        both, each with a weight (Liu et al. 2022)

Parts may be nested. Brackets that are none of these, emphasis among them, stay as they are, for `prompt_syntax` to
read.
"""

import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from triptych.errors import ConfigError
from triptych.models.tokenization.prompt_syntax import LARGEST_WEIGHT

log = logging.getLogger(__name__)

PromptSchedule = list[tuple[int, str]]
"""Texts with the last step of each, rising."""

_TOKEN = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]++|\\")
_NUMBER = re.compile(r"\s*([+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*")
_AND = re.compile(r"\bAND\b")
_WEIGHT = re.compile(r"\s*([+-]?(?:[0-9]+\.?|[0-9]*\.[0-9]+))\s*")


class WeightedPrompt(NamedTuple):
    """One of the prompts that are composed by AND."""

    text: str
    weight: float


def split_prompts(prompt: str) -> list[WeightedPrompt]:
    """Return the prompts between ANDs with their weights, such as `a dog :1.2`; the default is 1.

    As in the web UI a prompt without AND has a weight too, which is logged, for it may be meant as text. A backslash
    before the colon makes it text.

    Raises:
        ConfigError: a weight beyond 10,000.
    """
    parts = _AND.split(prompt)
    prompts = []
    for part in parts:
        text, colon, end = part.rpartition(":")
        number = _WEIGHT.fullmatch(end)
        if not colon or number is None or re.search(r"(?<!\\)(\\\\)*\\$", text):
            prompts.append(WeightedPrompt(part.rstrip() if len(parts) > 1 else part, 1.0))
            continue
        weight = float(number[1])
        if not abs(weight) <= LARGEST_WEIGHT:
            raise ConfigError(
                f"the weight of {text.strip()[:40]!r} is {weight:g}, which must be at most {LARGEST_WEIGHT:g}"
            )
        if len(parts) == 1:
            log.warning("the prompt's end %r is read as its weight; write \\: if it is text", f":{end}")
        prompts.append(WeightedPrompt(text.rstrip(), weight))
    return prompts


def schedule(prompt: str, num_steps: int, first_pass_steps: int = 0) -> PromptSchedule:
    """Return the texts of a prompt without AND, each with the last step at which it is used.

    Args:
        num_steps: steps of the sampler. Numbers with a point are shares of it.
        first_pass_steps: for a second pass the steps of the first, which numbers without a point count too; shares of
            the second pass are from 1 to 2.
    """
    span = _Span(num_steps, first_pass_steps)
    parts = _parse(prompt)
    if parts is None:
        return [(num_steps, prompt)]
    ends = {num_steps}
    for part in _walk(parts):
        ends.update(part.ends(span))
    return [(end, _text(parts, end, span)) for end in sorted(ends)]


def at_step(texts: PromptSchedule, step: int) -> str:
    """Return the text of a step, from 0.

    The web UI counts steps from 0 here and from 1 in schedules, so that the first text has a step more.
    """
    return next((text for end, text in texts if step <= end), texts[0][1])


# ----------------------------------------------------------------------------------------------- parts


class _Span(NamedTuple):
    """The steps of a pass."""

    num_steps: int
    first_pass_steps: int


@dataclass(frozen=True)
class _Bracketed:
    """Text in brackets that are of no other kind, such as emphasis."""

    parts: list["PromptPart"]


@dataclass(frozen=True)
class _Switch:
    """`[before:after:when]`."""

    before: list["PromptPart"]
    after: list["PromptPart"]
    when: str

    def last_step(self, span: _Span) -> int:
        value = float(self.when)
        if "." in self.when:
            value = (value - bool(span.first_pass_steps)) * span.num_steps
        else:
            value -= span.first_pass_steps
        return int(max(min(value, span.num_steps), 0))

    def ends(self, span: _Span) -> Iterable[int]:
        last = self.last_step(span)
        return [last] if last >= 1 else []

    def at(self, step: int, span: _Span) -> list["PromptPart"]:
        return self.before if step <= self.last_step(span) else self.after


@dataclass(frozen=True)
class _Alternation:
    """`[a|b]`."""

    choices: list[list["PromptPart"]]

    def ends(self, span: _Span) -> Iterable[int]:
        return range(1, span.num_steps + 1)

    def at(self, step: int, span: _Span) -> list["PromptPart"]:
        return self.choices[(step - 1) % len(self.choices)]


PromptPart = str | _Switch | _Alternation | _Bracketed


@dataclass
class _Open:
    """A bracket that is not closed yet."""

    mark: str
    segments: list[list[PromptPart]] = field(default_factory=lambda: [[]])
    separators: list[str] = field(default_factory=list)

    def closed(self, mark: str) -> PromptPart | None:
        """Return what the bracket is once it is closed; None if that is not of the grammar."""
        if self.mark == "(" and mark == ")" and self.separators in ([], [":"]):
            return _Bracketed([*self.literal(), ")"])
        if self.mark != "[" or mark != "]":
            return None
        if not self.separators:
            return _Bracketed([*self.literal(), "]"])
        if set(self.separators) == {"|"}:
            return _Alternation(self.segments)
        number = "".join(part if isinstance(part, str) else "[" for part in self.segments[-1])
        if self.separators in ([":"], [":", ":"]) and (match := _NUMBER.fullmatch(number)):
            before = self.segments[0] if len(self.segments) == 3 else []
            return _Switch(before, self.segments[-2], match[1])
        return None

    def literal(self) -> list[PromptPart]:
        """Return the text so far, with the bracket."""
        parts: list[PromptPart] = [self.mark, *self.segments[0]]
        for separator, segment in zip(self.separators, self.segments[1:], strict=True):
            parts += [separator, *segment]
        return parts


def _parse(prompt: str) -> list[PromptPart] | None:
    """Return the parts of a prompt; None if it is outside of the web UI's grammar and thus text.

    What is no part by itself makes the brackets around it text too: only the outermost level may hold any text.
    """
    outer: list[PromptPart] = []
    stack: list[_Open] = []
    for match in _TOKEN.finditer(prompt):
        token = match[0]
        inner = stack[-1].segments[-1] if stack else outer
        if token in ("(", "["):
            stack.append(_Open(token))
        elif token in (")", "]"):
            if stack and (part := stack[-1].closed(token)) is not None:
                stack.pop()
                (stack[-1].segments[-1] if stack else outer).append(part)
            elif not _give_up(stack, outer):
                return None
            else:
                outer.append(token)
        elif token in (":", "|") and stack:
            stack[-1].separators.append(token)
            stack[-1].segments.append([])
        elif token in ("|", "\\"):
            return None
        else:
            inner.append(token)
    return outer if _give_up(stack, outer) else None


def _give_up(stack: list[_Open], outer: list[PromptPart]) -> bool:
    """Move open brackets to the outer level as text; return whether that is possible, which a bar prevents."""
    for bracket in stack:
        outer += bracket.literal()
    possible = not any("|" in bracket.separators for bracket in stack)
    stack.clear()
    return possible


def _walk(parts: list[PromptPart]) -> Iterator[_Switch | _Alternation]:
    """Yield all switches and alternations, nested ones included. Not recursive: brackets may be thousands deep."""
    waiting = list(parts)
    while waiting:
        part = waiting.pop()
        if isinstance(part, _Bracketed):
            waiting += part.parts
        elif isinstance(part, _Switch):
            yield part
            waiting += [*part.before, *part.after]
        elif isinstance(part, _Alternation):
            yield part
            waiting += [inner for choice in part.choices for inner in choice]


def _text(parts: list[PromptPart], step: int, span: _Span) -> str:
    """Return the text of a step, from 1."""
    texts: list[str] = []
    waiting = parts[::-1]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            texts.append(part)
        else:
            waiting += reversed(part.parts if isinstance(part, _Bracketed) else part.at(step, span))
    return "".join(texts)
