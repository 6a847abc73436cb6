"""A word for a text encoder to learn: what it is at first, and what pictures of it are called (textual inversion)."""

from typing import Any

from triptych.data.source import Source
from triptych.errors import UserError
from triptych.models.text import TextEncoder, add_embedding
from triptych.training.configs.second_stage import WordConfig

# What a picture without a caption of its own is called; one is drawn at each step (Gal et al. 2023, Section 4).
TEMPLATES = (
    "a photo of a {}",
    "a rendering of a {}",
    "a close-up photo of a {}",
    "a good photo of a {}",
    "a cropped photo of the {}",
    "a bright photo of the {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of one {}",
    "a depiction of a {}",
)


def teach(text: Any, word: WordConfig, init: str | None) -> TextEncoder:
    """The text encoder with the word to be learned, which is like the word to start from at first.

    Raises:
        UserError: it reads no text, a name is missing, or the word is known already.
    """
    if not isinstance(text, TextEncoder):
        raise UserError(
            f"train=words is of what reads captions, and init {init} reads none; start from another"
        )
    name, like = word.name.strip(), word.like.strip()
    if not name or not like:
        missing = "--word.name '<toy>'" if not name else "--word.like toy"
        raise UserError(f"train=words learns a new word from one that is known; add {missing}, for example")
    if len(text.tokenizer.ids(name)) == 1 and name not in text.tokenizer.added:
        raise UserError(
            f"the word {name!r} is in the vocabulary already; choose another name, such as <my-{name}>"
        )
    known = text.tokenizer.ids(like)
    if not known:
        raise UserError(f"word.like is {like!r}, which the text encoder does not read; give another word")
    rows = [known[i % len(known)] for i in range(word.vectors)]
    add_embedding(text, name, text.tokens.weight[rows].detach())
    return text


def naming(source: Source, word: WordConfig) -> list[tuple[str, ...]]:
    """All that each example may be called: its captions that name the word, else the templates."""
    name = word.name.strip()
    usual = tuple(one.replace("{}", name) for one in word.templates or TEMPLATES)
    found = source.captions or [()] * len(source)
    return [tuple(text for text in texts if name.lower() in text.lower()) or usual for texts in found]
