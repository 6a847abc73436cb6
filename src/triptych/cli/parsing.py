"""Command line flags from dataclasses, by tyro; what it rejects becomes an error of one line with near names."""

import contextlib
import io
import logging
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from triptych.errors import ConfigError

T = TypeVar("T")

_CONFIG = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes)


def flag(metavar: str, default: str = "", name: str | None = None) -> Any:
    """Return how help shows a flag whose default is determined later.

    Args:
        metavar: stands for the value, such as "FILE".
        default: in words; "" shows none.
        name: of the flag, if it is not the field's.
    """
    hint = f"(default: {default})" if default else ""
    return tyro.conf.arg(name=name, metavar=metavar, help_behavior_hint=hint)


class _Page(io.StringIO):
    """Text in memory for which tyro draws one kind of frame whatever the terminal: lines, no colors."""

    encoding = "utf-8"


class WrappedHelp:
    """Standard output that wraps the prose of a help page at the terminal's width; tyro wraps only its frames."""

    def __init__(self) -> None:
        self.stdout = sys.stdout

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stdout, name)

    def flush(self) -> None:
        self.stdout.flush()

    def write(self, text: str) -> int:
        return self.stdout.write("\n\n".join(map(_filled, re.split(r"\n{2,}", text))))


def _filled(paragraph: str) -> str:
    """Return a paragraph wrapped at the terminal's width; frames and indented commands stay as they are."""
    plain = re.sub(r"\x1b\[[\d;]*m", "", paragraph)  # without a terminal's colors
    if not plain.strip() or any(line[:1] in (" ", "│", "╭", "╰") for line in plain.split("\n")):
        return paragraph
    indent = " " * len("usage: ") if plain.startswith("usage: ") else ""
    return in_columns("", plain, indent)


def in_columns(start: str, text: str, indent: str) -> str:
    """Return `start` and `text`, wrapped at the terminal's width; further lines begin with `indent`."""
    width = max(40, shutil.get_terminal_size().columns)
    return textwrap.fill(
        text,
        width,
        initial_indent=start,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )


def parse(cls: type[T], args: Sequence[str], prog: str, default: Any = None, description: str = "") -> T:
    """The dataclass `cls` filled from `args`. `--help` prints and exits.

    Args:
        prog: how the command begins, for its help: "triptych classify".
        default: an instance to start from, whose values are the flags' defaults.
        description: printed instead of the docstring of `cls`.

    Raises:
        ConfigError: what the arguments lack or have wrong, in one line.
        SystemExit: help was asked for.
    """
    page, helped = _Page(), bool({"-h", "--help"} & set(args))
    more = {"default": default} if default is not None else {}
    try:
        with (
            contextlib.redirect_stderr(page),
            contextlib.redirect_stdout(WrappedHelp() if helped else _Page()),
        ):
            return tyro.cli(
                cls, args=list(args), prog=prog, description=description or None, config=_CONFIG, **more
            )
    except SystemExit as stop:
        if stop.code in (None, 0):
            raise
        raise ConfigError(one_line(page.getvalue(), prog)) from None


def height_width(words: str, what: str = "size") -> tuple[int, int]:
    """Height and width from "320x224", as a person writes a width and a height; `what` is the flag's name.

    Raises:
        ConfigError: not two numbers of pixels up to 8192.
    """
    match = re.fullmatch(r"(\d+)x(\d+)", words)
    if not match or not 1 <= min(int(match[1]), int(match[2])) <= max(int(match[1]), int(match[2])) <= 8192:
        raise ConfigError(f"{what} is {words!r}, which must be WIDTHxHEIGHT in pixels, for example 224x224")
    return int(match[2]), int(match[1])


def one_line(box: str, prog: str) -> str:
    """tyro's message without its frame: the problem, the options it thinks were meant, where help is.

    Inside the frame tyro prints the problem, a rule, and further paragraphs; names of options are indented by
    four, their descriptions by eight. Unknown text passes through as it is.
    """
    lines = [line[2:].rstrip(" │") for line in box.splitlines() if line[:1] == "│"]
    lines = [re.sub(r"\[/?bold\]", "", line) for line in lines if line]
    first = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    problem = " ".join(line for line in lines[:first] if not line.startswith("    "))
    problem = problem or " ".join(box.split())
    problem = re.split(r" *(?:Got errors:|Expected format:)", problem)[0].rstrip(". ")
    problem = problem[:1].lower() + problem[1:]
    if problem.startswith("missing from"):
        problem = f"{prog} needs {', '.join(_names(lines[:first]))}"
    near = [name for name in _names(lines[first:]) if name.startswith("--")]
    hint = f"did you mean {' or '.join(near[:3])}? " if "unrecognized" in problem and near else ""
    return f"{problem}; {hint}see {prog} --help"


def _names(lines: list[str]) -> list[str]:
    return list(dict.fromkeys(line.split()[0] for line in lines if re.match(r" {4}\S", line)))


@contextlib.contextmanager
def logged_to_stderr() -> Iterator[None]:
    """What the package logs, as plain lines on stderr, while a verb runs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    ours = logging.getLogger("triptych")
    before = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO)
    try:
        yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before)
