"""Find retired words: identifiers and phrases that a reader of PyTorch's documentation would not expect.

    python tools/check_words.py [PATH ...]

Prints one line a finding and exits with 1 if there is any. Without paths: src, tests, tools, examples, docs, README.md,
CONTRIBUTING.md and CHANGELOG.md.
"""

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
PATHS = ("src", "tests", "tools", "examples", "docs", "README.md", "CONTRIBUTING.md", "CHANGELOG.md")

# Names of variables, arguments, attributes, functions, classes and modules.
IDENTIFIERS = frozenset(
    "told tell tells said say says found made how asked asks there beside whole wholes kept keeping anew "  # noqa: SIM905
    "learn learns learnt learned given taken kind kinds one_of every each_of nobody somebody "
    "colour colours grey normalise normalised initialise initialised picture pictures painted painting "
    "chance opponent teller".split()
)
# Words of prose: docstrings, comments, messages, pages. Each with what to write instead.
PHRASES = {
    r"\b(?:is|was|are|were|be|been|being|gets?) told\b|\btold by\b|\bis told of\b": "report, pass, condition",
    r"\b(?:nobody|somebody|anew)\b": "no one / the caller; again",
    r"\bgo(?:es|ing)? on with\b|\bgone on (?:with|from)\b": "resume, continue",
    r"\bthe chance of (?:one|a) process\b|\bits chance\b|\bsame chance\b": "random draws, RNG",
    r"\bpictures?\b": "image",
    r"\b\w*colour\w*\b": "color",
    r"\bgrey\b": "gray",
    r"\b(?:normalis|initialis|optimis|quantis|tokenis|regularis|generalis|synchronis)(?:e|es|ed|ing|ation)\b": "-ize",
    r"\b(?:centre|centred|neighbour|neighbours|behaviour|labelled|licence)\b": "American spelling",
    r"\bpaint(?:s|ed|ing)?\b": "generate, sample",
    r"\blaid (?:out for the processor|beside)\b": "packed for oneDNN; concatenated",
    r"\bprocessor\b": "CPU, device",
    r"\bopponent\b": "discriminator",
    r"\bflat memory\b": "constant memory",
}
SLOGAN = re.compile(r"latent diffusion \*?paints\*?|latent\ndiffusion \*?paints\*?|see, parse, paint")
ALLOWED = re.compile(r"\bin_?paint\w*|paint-by-example|paintbrush|artist palette", re.IGNORECASE)


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of everything that the code gives a name to."""
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
            yield 0, node.asname


def prose_of(source: str) -> Iterator[tuple[int, str]]:
    """Comments and string literals of Python source, line by line."""
    import io
    import tokenize

    strings = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in strings:
            for offset, line in enumerate(token.string.splitlines()):
                yield token.start[0] + offset, line


def findings(path: Path) -> Iterator[str]:
    """What is retired in a file, a line each."""
    source = path.read_text(encoding="utf-8")
    python = path.suffix == ".py"
    if path.stem in IDENTIFIERS:
        yield f"{path}: file name"
    if python:
        for line, name in identifiers(ast.parse(source)):
            if name.strip("_").lower() in IDENTIFIERS:
                yield f"{path}:{line}: identifier {name!r}"
    lines = prose_of(source) if python else enumerate(source.splitlines(), 1)
    for line, text in lines:
        text = ALLOWED.sub("", SLOGAN.sub("", text))
        for pattern, instead in PHRASES.items():
            for match in re.finditer(pattern, text, re.IGNORECASE):
                yield f"{path}:{line}: {match[0]!r}, write: {instead}"


def files(paths: list[str]) -> Iterator[Path]:
    """Python and Markdown files below the paths."""
    for name in paths:
        path = ROOT / name if not Path(name).is_absolute() else Path(name)
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix in (".py", ".md", ".ipynb"))
        elif path.exists():
            yield path


def main(arguments: list[str]) -> int:
    count = 0
    for path in files(arguments or list(PATHS)):
        if path.name == Path(__file__).name:
            continue
        for finding in findings(path):
            print(finding)
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
