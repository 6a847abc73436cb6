"""Textual inversion: the new word of a text encoder, and captions of the images that it is trained on."""

from typing import Any

from triptych.data.source import Source
from triptych.errors import CheckpointError, ConfigError
from triptych.models.text import TextEncoder, add_embedding
from triptych.training.configs.second_stage import WordConfig

# Captions of an image without a caption of its own; one is drawn at each step (Gal et al. 2023, Section 4).
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


def add_word(text: Any, word: WordConfig, init: str | None) -> TextEncoder:
    """Add a new word to a text encoder, in place, initialized from an existing word; return the text encoder.

    Args:
        text: the text encoder of the model to start from; None if it has none.
        word: the new word, and the one to initialize it from.
        init: name of that model, for messages.

    Raises:
        CheckpointError: the model has no text encoder.
        ConfigError: a word is missing, the new one is in the vocabulary already, or the other one has no tokens.
    """
    if not isinstance(text, TextEncoder):
        raise CheckpointError(
            f"train=words needs a model with a text encoder, and init {init} has none; start from another"
        )
    name, like = word.name.strip(), word.like.strip()
    if not name or not like:
        missing = "--word.name '<toy>'" if not name else "--word.like toy"
        raise ConfigError(
            f"train=words needs a new word and an existing one to initialize it from; add {missing}, for example"
        )
    if len(text.tokenizer.ids(name)) == 1 and name not in text.tokenizer.added:
        raise ConfigError(
            f"the word {name!r} is in the vocabulary already; choose another name, such as <my-{name}>"
        )
    tokens = text.tokenizer.ids(like)
    if not tokens:
        raise ConfigError(f"word.like is {like!r}, which has no tokens; give another word")
    rows = [tokens[i % len(tokens)] for i in range(word.vectors)]
    add_embedding(text, name, text.tokens.weight[rows].detach())
    return text


def word_captions(source: Source, word: WordConfig) -> list[tuple[str, ...]]:
    """Return the alternative captions of each example: its own that contain the word, else the templates."""
    name = word.name.strip()
    templates = tuple(template.replace("{}", name) for template in word.templates or TEMPLATES)
    captions = source.captions or [()] * len(source)
    return [tuple(text for text in texts if name.lower() in text.lower()) or templates for texts in captions]
