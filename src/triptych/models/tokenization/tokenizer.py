"""Tokenizers: CLIP's byte pairs, BERT's word pieces, or any vocabulary of the `tokenizers` library."""

import functools
import gzip
import importlib.resources
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from triptych.errors import CheckpointError, ConfigError, TriptychError

CLIP_START, CLIP_END = "<|startoftext|>", "<|endoftext|>"
BERT_START, BERT_END, PAD = "[CLS]", "[SEP]", "[PAD]"

Span = tuple[int, ...]
"""One token of a text, or all vectors of one added token: prompts are never cut inside it."""


class Tokenizer:
    """A vocabulary, the tokens around a text, and added tokens. Immutable: `add` returns a new one.

    Args:
        backend: a tokenizer of the `tokenizers` library.
        start, end: names of the tokens before and after a text.
        pad: name of the padding token; the end token if None.
        added: rows of the embedding table for each added token, which is matched in upper and lower case.

    Raises:
        CheckpointError: the vocabulary lacks one of these tokens.
    """

    def __init__(
        self,
        backend: Backend,
        start: str,
        end: str,
        pad: str | None = None,
        added: Mapping[str, Sequence[int]] | None = None,
    ):
        self.backend = backend
        self.frame = (start, end, end if pad is None else pad)
        self.start, self.end, self.pad = (self._named(name) for name in self.frame)
        self.added: dict[str, Span] = {name: tuple(rows) for name, rows in (added or {}).items()}
        names = sorted(self.added, key=len, reverse=True)
        self._spans = [self.added[name] for name in names]
        self._pattern = re.compile("|".join(f"({_alone(name)})" for name in names), re.IGNORECASE)

    @property
    def size(self) -> int:
        """Number of entries of the vocabulary, without added tokens."""
        return self.backend.get_vocab_size()

    def spans(self, text: str) -> list[Span]:
        """Return the spans of a text, without start and end: one number for each token, several for an added token."""
        if not self.added:
            return [(i,) for i in self._encode(text)]
        spans, at = [], 0
        for match in self._pattern.finditer(text):
            spans += [(i,) for i in self._encode(text[at : match.start()])]
            spans.append(self._spans[(match.lastindex or 1) - 1])
            at = match.end()
        return spans + [(i,) for i in self._encode(text[at:])]

    def ids(self, text: str) -> list[int]:
        """Return the text's tokens, without start and end."""
        return [i for span in self.spans(text) for i in span]

    def framed(self, ids: Sequence[int], length: int, pad: int) -> list[int]:
        """Return start, text, end and padding up to `length`; a longer text is cut."""
        ids = [self.start, *ids[: length - 2], self.end]
        return ids + [pad] * (length - len(ids))

    def text(self, ids: Sequence[int]) -> str:
        """Return the string of tokens, without start, end and padding."""
        names = {row: name if k == 0 else "" for name, rows in self.added.items() for k, row in enumerate(rows)}
        words, run = [], []
        for i in [i for i in ids if i not in (self.start, self.end)]:
            if i in names:
                words, run = [*words, self.backend.decode(run), names[i]], []
            else:
                run.append(i)
        words.append(self.backend.decode(run))
        return " ".join(" ".join(words).replace("</w>", " ").split())

    def add(self, token: str, rows: Sequence[int]) -> "Tokenizer":
        """Return a tokenizer with the added token `token`, for those rows of the embedding table.

        Raises:
            ConfigError: the token is empty, or exists already.
        """
        token = token.strip()
        if not token or token.lower() in map(str.lower, self.added) or self.backend.token_to_id(token) is not None:
            problem = "is in the vocabulary already" if token else "is empty"
            raise ConfigError(f"the token {token!r} {problem}; choose another name, such as <my-{token or 'word'}>")
        return Tokenizer(self.backend, *self.frame, added={**self.added, token: rows})

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for `from_json`. The shipped vocabulary is named, not copied."""
        shipped = self.backend is clip_tokenizer().backend
        return {
            "vocabulary": "clip" if shipped else self.backend.to_str(),
            "frame": list(self.frame),
            "added": {name: list(rows) for name, rows in self.added.items()},
        }

    @staticmethod
    def from_json(data: Any) -> "Tokenizer":
        """Invert `to_json`.

        Raises:
            CheckpointError: not a result of `to_json`.
        """
        try:
            shipped = data["vocabulary"] == "clip"
            backend = clip_tokenizer().backend if shipped else Backend.from_str(data["vocabulary"])
            added = {str(name): [int(i) for i in rows] for name, rows in data["added"].items()}
            start, end, pad = map(str, data["frame"])
            return Tokenizer(backend, start, end, pad, added)
        except TriptychError:
            raise
        except Exception as problem:  # the Rust library raises nothing narrower
            reason = _one_line(problem)
            raise CheckpointError(f"a stored tokenizer is damaged ({reason}); save the model again") from problem

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tokenizer":
        return self

    def _encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def _named(self, name: str) -> int:
        number = self.backend.token_to_id(name)
        if number is None:
            raise CheckpointError(f"the vocabulary of {self.size} has no {name!r} for a text's start, end or padding")
        return number


@functools.cache
def clip_tokenizer() -> Tokenizer:
    """Return CLIP's tokenizer from the shipped vocabulary: 49,406 byte pairs in lower case, start and end."""
    return Tokenizer(clip_backend(*clip_vocabulary()), CLIP_START, CLIP_END)


@functools.cache
def clip_vocabulary() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return CLIP's tokens with their numbers, and its merges in the order in which they apply."""
    packed = (importlib.resources.files("triptych.assets") / "clip_vocabulary.txt.gz").read_bytes()
    merges = [(a, b) for a, b in (line.split(" ") for line in gzip.decompress(packed).decode().splitlines())]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # a printable character for each of the 256 bytes
    tokens = [*letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges), CLIP_START, CLIP_END]
    return {token: i for i, token in enumerate(tokens)}, merges


def clip_backend(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Backend:
    """Return a tokenizer that splits as CLIP's `simple_tokenizer`: words, single digits and runs of signs in lower
    case, as UTF-8 bytes merged in the order of `merges`, the last of a word marked with </w>.

    As in transformers, two of its steps are left out: repair of wrongly encoded text, and HTML entities.
    """
    form = {"end_of_word_suffix": "</w>", "continuing_subword_prefix": "", "unk_token": CLIP_END}
    backend = Backend(models.BPE(vocabulary, merges, **form))
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    frame = rf"{re.escape(CLIP_START)}|{re.escape(CLIP_END)}"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(f"{frame}|{words}"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([name for name in (CLIP_START, CLIP_END) if name in vocabulary])
    return backend


def bert_tokenizer(vocabulary: Sequence[str], lowercase: bool = True) -> Tokenizer:
    """Return a tokenizer for BERT's word pieces (Devlin et al. 2019) from the lines of its vocab.txt."""
    numbers = {token: i for i, token in enumerate(vocabulary)}
    backend = Backend(models.WordPiece(numbers, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    special = ("[UNK]", BERT_END, PAD, BERT_START, "[MASK]")
    backend.add_special_tokens([name for name in special if name in numbers])
    return Tokenizer(backend, BERT_START, BERT_END, PAD)


def train_tokenizer(texts: Iterable[str], size: int = 8192) -> Tokenizer:
    """Train byte pairs on texts (Sennrich et al. 2016), in lower case. The same texts give the same vocabulary.

    Args:
        texts: any strings, also empty ones or in other scripts, since every byte has a token.
        size: largest number of entries of the vocabulary, at least 259: the bytes, start, end and padding.
    """
    least = 3 + 256
    if size < least:
        raise CheckpointError(f"a vocabulary of {size} is too small; it needs at least {least} entries")
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Lowercase()]
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[PAD, BERT_START, BERT_END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    frame = [(name, backend.token_to_id(name)) for name in (BERT_START, BERT_END)]
    backend.post_processor = processors.TemplateProcessing(f"{BERT_START} $A {BERT_END}", special_tokens=frame)
    return Tokenizer(backend, BERT_START, BERT_END, PAD)


def _alone(name: str) -> str:
    """Return a pattern for an added token that is not part of a longer word."""
    before = r"(?<!\w)" if re.match(r"\w", name) else ""
    after = r"(?!\w)" if re.search(r"\w$", name) else ""
    return before + re.escape(name) + after


def _one_line(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
