"""Find retired words: identifiers and phrases that a reader of PyTorch's documentation would not expect.

    python tools/check_words.py [PATH ...]

Prints one line per finding and exits with 1 if there is any. Without paths: the package, tests, tools, examples, docs
and the Markdown and configuration files at the root. A line that must keep a word, because it quotes a file format, a
name or data, ends in the comment `words: quoted`.
"""

import ast
import io
import json
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = (
    *("src", "tests", "tools", "examples", "docs"),
    *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "CITATION.cff"),
    *("pyproject.toml", "mkdocs.yml", "Makefile"),
)
SUFFIXES = (".py", ".md", ".ipynb")
QUOTED = "words: quoted"

# Names of variables, arguments, attributes, functions, classes and modules that are retired when they stand alone.
IDENTIFIERS = frozenset(
    re.findall(
        r"\w+",
        """
            told tell tells said say says found made how asked asks there beside whole wholes kept keeping anew learn
            learns learnt learned given taken kind kinds one_of every each_of nobody somebody chance opponent teller
        """,
    )
)
# Retired as a part of a name as well: `picture_grid`, `ColourMatrix`, `test_nobody_waits`.
PARTS = frozenset(
    re.findall(
        r"\w+",
        """
            told nobody somebody anew teller opponent learnt colour colours coloured grey normalise normalised
            initialise initialised quantise quantised optimise optimised picture pictures painted painting painter
            paints neighbour neighbours centre centred behaviour labelled
        """,
    )
)
STEMS = "normal|initial|optim|quant|token|regular|general|synchron|recogn|vector|parallel|serial|organ|summar|visual"
BRITISH = (
    "centre|centres|centred|neighbour|neighbours|neighbouring|behaviour|behaviours|labelled|labelling|licence|licences|"
    "favour|favours|catalogue|artefact|artefacts|judgement|modelling|cancelled"
)
# Phrases of prose (docstrings, comments, messages, pages), each with what to write instead.
PHRASES = {
    r"\b(?:is|was|are|were|be|been|being|gets?) told\b|\btold by\b": "report, pass, condition",
    r"\b(?:nobody|somebody|anew)\b": "no one / the caller; again",
    r"\bgo(?:es|ing)? on with\b|\bgone on (?:with|from)\b": "resume, continue",
    r"\bthe chance of (?:one|a) process\b|\b(?:its|same) chance\b": "random draws, RNG",
    r"\b\w*pictures?\b": "image",
    r"\b\w*colour\w*\b": "color",
    r"\b\w*grey\b": "gray",
    rf"\b\w*(?:{STEMS})is(?:e|es|ed|er|ers|ing|ation|ations)\b": "-ize",
    rf"\b(?:{BRITISH})\b": "American spelling",
    r"\bpaint(?:s|ed|ing|ings|er|ers)?\b": "generate, sample",
    r"\blaid (?:out for the processor|beside)\b": "packed for oneDNN; concatenated",
    r"\bprocessors?\b": "CPU, device",
    r"\bopponent\b": "discriminator",
    r"\bflat memory\b": "constant memory",
    r"\blearnt\b": "trained, learned",
}  # fmt: skip
RETIRED = re.compile("|".join(f"({pattern})" for pattern in PHRASES), re.IGNORECASE)
INSTEAD = list(PHRASES.values())
# The slogan, the names of others, and words that mean something else.
ALLOWED = re.compile(
    r"latent diffusion\s+[*_]*paints[*_]*|see, parse(?:,| and) paint|"
    r"\bin_?-?paint\w*|\bout_?-?paint\w*|paint-by-example|paintbrush|artist palette|framed picture|"
    r"(?:image|pre|video|feature)[ _-]?processors?|\w*ImageProcessor\w*|\w+\(R\)[^|\n]*Processor|EPYC[^|\n]*Processor|"
    r"[\w.-]*processor(?:_\w+|\.json)",
    re.IGNORECASE,
)


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of everything that the code names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def is_retired(name: str) -> bool:
    """Return whether a name is retired, as a whole or by one of its parts (snake or camel case)."""
    if name.strip("_").lower() in IDENTIFIERS:
        return True
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+", name)
    return any(part.lower() in PARTS for part in parts)


def python_prose(source: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of comments and string literals."""
    kinds_of_text = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds_of_text:
            yield from enumerate(token.string.splitlines(), token.start[0])


def check_python(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and message of each finding in Python source."""
    # What a notebook gives to IPython is no Python.
    for line, name in identifiers(ast.parse(source)):
        if is_retired(name):
            yield line, f"identifier {name!r}"
    yield from check_prose(python_prose(source))


def check_prose(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Yield line and message of each finding in numbered lines of text."""
    for line, text in lines:
        if RETIRED.search(text) is None:
            continue
        for match in RETIRED.finditer(ALLOWED.sub("", text)):
            yield line, f"{match[0]!r}, write: {INSTEAD[match.lastindex - 1 if match.lastindex else 0]}"


def check_file(path: Path) -> Iterator[str]:
    """Yield the findings of one file, a line each."""
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else path
    source = path.read_text(encoding="utf-8")
    if is_retired(path.stem):
        yield f"{shown}: file name"
    if path.suffix == ".ipynb":
        for number, cell in enumerate(json.loads(source)["cells"], 1):
            text = "".join(cell["source"])
            check = (
                check_python(text)
                if cell["cell_type"] == "code"
                else check_prose(iter(enumerate(text.splitlines(), 1)))
            )
            yield from (f"{shown}: cell {number}, line {line}: {message}" for line, message in check)
        return
    lines = source.splitlines()
    check = check_python(source) if path.suffix == ".py" else check_prose(iter(enumerate(lines, 1)))
    for line, message in check:
        if QUOTED not in lines[line - 1]:
            yield f"{shown}:{line}: {message}"


def files(paths: list[str]) -> Iterator[Path]:
    """Yield the Python files, pages and notebooks below the paths."""
    for name in paths:
        path = ROOT / name if not Path(name).is_absolute() else Path(name)
        if path.is_dir():
            yield from sorted(
                p for p in path.rglob("*") if p.suffix in SUFFIXES and ".ipynb_checkpoints" not in p.parts
            )
        elif path.exists():
            yield path


def main(arguments: list[str]) -> int:
    """Check the paths; return the exit code."""
    count = 0
    for path in files(arguments or list(PATHS)):
        if path.name not in ("check_words.py", "test_words.py", "test_names.py"):
            for finding in check_file(path):
                print(finding)
                count += 1
    return int(count > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
