"""What a run of the second stage is told: the condition of both sets of pictures, and what reads it."""

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from triptych import weights
from triptych.data.source import Source
from triptych.errors import UserError
from triptych.model_card import Preprocess
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.image_tokens import ImageTokens
from triptych.models.latent_diffusion import LatentDiffusion
from triptych.models.swin import Swin
from triptych.models.text import ClassToken, TextEncoder
from triptych.models.tokenization.tokenizer import train_tokenizer
from triptych.models.vit import ViT
from triptych.network import Network
from triptych.training.configs.second_stage import SecondStageConfig
from triptych.training.second_stage.conditions import (
    Captions,
    Classes,
    Condition,
    FrozenCaptions,
    FrozenImages,
    Unconditional,
    tokens_needed,
)
from triptych.training.second_stage.textual_inversion import naming, teach

log = logging.getLogger(__name__)


def build_conditions(
    config: SecondStageConfig, source: Source, held_out: Source, start: LatentDiffusion | None
) -> tuple[Network | None, Network | None, Condition, Condition]:
    """What reads the condition and learns, what reads it and does not, and what is said of both sets."""
    if config.condition == "none":
        return None, None, Unconditional(), Unconditional()
    if config.condition == "class":
        return _class_condition(config, source, held_out, start)
    if config.condition == "image":
        return _image_condition(config, source, held_out, start)
    text: Any = None if start is None else start.text_encoder
    if config.train == "words":
        text = teach(text, config.word, config.init)
        sayings = [naming(one, config.word) for one in (source, held_out)]
        of = (text.tokenizer, text.config.max_length, text.config.pad_token)
        return text, None, Captions(sayings[0], *of), Captions(sayings[1], *of)
    sayings = [captions(one, config.data) for one in (source, held_out)]
    encoder = text_encoder(config.text.encoder) if config.text.encoder is not None else text
    if isinstance(encoder, TextEncoder) and not learns(config, encoder):
        encoder = encoder.eval().requires_grad_(False)
        said, held = (FrozenCaptions(one, encoder) for one in sayings)
        return None, encoder, said, held
    if text is None:
        text = _own_text(config, [text for texts in sayings[0] for text in texts])
    if not isinstance(text, TextEncoder):
        raise UserError(f"init {config.init} reads no captions; give another --condition")
    of = (text.tokenizer, text.config.max_length, text.config.pad_token)
    return text, None, Captions(sayings[0], *of), Captions(sayings[1], *of)


def learns(config: SecondStageConfig, encoder: TextEncoder) -> bool:
    """Whether a text encoder that is there already learns with the rest."""
    if config.text.encoder is not None:
        return False
    return config.text.train == "on" or (config.text.train == "auto" and encoder.config.type == "ldm-bert")


def _class_condition(
    config: SecondStageConfig, source: Source, held_out: Source, start: LatentDiffusion | None
) -> tuple[Network, None, Condition, Condition]:
    if not source.classes or source.labels is None:
        raise UserError(
            f"{config.data} has no labels, and --condition class needs them; sort the pictures into class folders, "
            "name --loading.label-column, or give --condition none"
        )
    count = len(source.classes)
    text: Any = None if start is None else start.text_encoder
    if text is None:
        text = ClassToken(ClassTokenConfig(num_classes=count, embed_dim=config.text.embed_dim))
    if not isinstance(text, ClassToken) or text.config.num_classes != count or text.null is None:
        raise UserError(f"init {config.init} does not read {count} classes and no class; start from another")
    labels = [
        one.labels if one.labels is not None else np.full(len(one), count) for one in (source, held_out)
    ]
    labels = [np.where(each < 0, count, each) for each in labels]
    return text, None, Classes(labels[0], count), Classes(labels[1], count)


def _image_condition(
    config: SecondStageConfig, source: Source, held_out: Source, start: LatentDiffusion | None
) -> tuple[Network, Network, Condition, Condition]:
    seeing: Any = None if start is None else start.text_encoder
    if seeing is None:
        backbone: Any = weights.load(config.image_encoder).float()
        if not isinstance(backbone, ViT | Swin):
            raise UserError(
                f"image_encoder {config.image_encoder} is a {type(backbone).__name__}; give a ViT or a Swin"
            )
        how = backbone.card.preprocess
        backbone.replace_head(0)
        seeing = ImageTokens(
            ImageTokensConfig(
                backbone=backbone.config,
                embed_dim=config.text.embed_dim,
                image_size=how.size,
                mean=how.mean,
                std=how.std,
            )
        )
        seeing.backbone = backbone
    if not isinstance(seeing, ImageTokens):
        raise UserError(f"init {config.init} is not shown pictures; give another --condition")
    seeing.backbone.eval().requires_grad_(False)
    shown = seeing.config
    fed = Preprocess(size=shown.image_size, crop=1.0, mode="squash", mean=shown.mean, std=shown.std)
    said = [FrozenImages(one, seeing.backbone, fed, config.loading) for one in (source, held_out)]
    return seeing.projection, seeing, said[0], said[1]


def captions(source: Source, data: str) -> Sequence[tuple[str, ...]]:
    """All that each example may be called.

    Raises:
        UserError: not a single one has a caption.
    """
    found = source.captions
    if found is None or not any(text.strip() for texts in found for text in texts):
        raise UserError(
            f"{data} has no captions, and --condition text needs them: put NAME.txt beside NAME.png, write a "
            'metadata.jsonl with {"file_name": ..., "text": ...}, or name --loading.caption-column'
        )
    empty = sum(not any(text.strip() for text in texts) for texts in found)
    if empty:
        log.info(
            "%s of %s pictures have no caption and are learned without one", f"{empty:,}", f"{len(found):,}"
        )
    return found


def _own_text(config: SecondStageConfig, texts: Sequence[str]) -> TextEncoder:
    """The paper's transformer, on byte pairs learned from the captions."""
    settings = config.text
    tokenizer = train_tokenizer(texts, settings.vocabulary)
    return TextEncoder(
        TextConfig(
            type="ldm-bert",
            vocab_size=tokenizer.size,
            max_length=settings.max_length or tokens_needed(texts, tokenizer),
            embed_dim=settings.embed_dim,
            depth=settings.depth,
            num_heads=settings.embed_dim // settings.head_dim,
            pad_token=tokenizer.pad,
        ),
        tokenizer,
    )


def text_encoder(source: str) -> TextEncoder:
    """A text encoder by itself, or of a latent diffusion model."""
    loaded: Any = weights.load(source).float()
    loaded = getattr(loaded, "text_encoder", loaded)
    if not isinstance(loaded, TextEncoder):
        raise UserError(f"text.encoder {source} holds no text encoder; give one, or a Stable Diffusion")
    return loaded
