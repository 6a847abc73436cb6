"""Build the conditions of a second stage: those of the training and the held-out images, and their encoder."""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from triptych import weights
from triptych.data.source import Source
from triptych.errors import CheckpointError, DataError
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
from triptych.training.second_stage.textual_inversion import add_word, word_captions

log = logging.getLogger(__name__)


class EncodedConditions(NamedTuple):
    """The conditions of a run, and the networks that encode them."""

    trained_encoder: Network | None
    """The encoder that is trained, or the part of it that is; None if there is none."""
    frozen_encoder: Network | None
    """The encoder, if it is frozen or has a frozen part; None otherwise."""
    train: Condition
    """Conditions of the training images."""
    held_out: Condition
    """Conditions of the held-out images."""

    @property
    def encoder(self) -> Network | None:
        """The encoder of the saved model; None for an unconditional model."""
        return self.frozen_encoder or self.trained_encoder


def build_conditions(
    config: SecondStageConfig, source: Source, held_out: Source, start: LatentDiffusion | None
) -> EncodedConditions:
    """Return the conditions of both sources.

    Args:
        source, held_out: training and held-out images.
        start: the model to start from; None for a new model.

    Raises:
        DataError: the data has no captions or labels, and the condition needs them.
        CheckpointError: the model to start from has another condition.
    """
    if config.condition == "none":
        return EncodedConditions(None, None, Unconditional(), Unconditional())
    if config.condition == "class":
        return _class_conditions(config, source, held_out, start)
    if config.condition == "image":
        return _image_conditions(config, source, held_out, start)
    return _text_conditions(config, source, held_out, start)


def _text_conditions(
    config: SecondStageConfig, source: Source, held_out: Source, start: LatentDiffusion | None
) -> EncodedConditions:
    text: Any = None if start is None else start.text_encoder
    if config.train == "words":
        text = add_word(text, config.word, config.init)
        return _trained_captions(text, *(word_captions(part, config.word) for part in (source, held_out)))
    captions, held_out_captions = (require_captions(part, config.data) for part in (source, held_out))
    encoder = load_text_encoder(config.text.encoder) if config.text.encoder is not None else text
    if isinstance(encoder, TextEncoder) and not is_trained(config, encoder):
        encoder = encoder.eval().requires_grad_(False)
        return EncodedConditions(
            None, encoder, FrozenCaptions(captions, encoder), FrozenCaptions(held_out_captions, encoder)
        )
    if text is None:
        text = _new_text_encoder(config, [text for texts in captions for text in texts])
    if not isinstance(text, TextEncoder):
        raise CheckpointError(f"init {config.init} has no text encoder; give another --condition")
    return _trained_captions(text, captions, held_out_captions)


def _trained_captions(
    text: TextEncoder, captions: Sequence[tuple[str, ...]], held_out_captions: Sequence[tuple[str, ...]]
) -> EncodedConditions:
    """Return captions for a text encoder that is trained."""
    tokens = (text.tokenizer, text.config.max_length, text.config.pad_token)
    return EncodedConditions(text, None, Captions(captions, *tokens), Captions(held_out_captions, *tokens))


def is_trained(config: SecondStageConfig, encoder: TextEncoder) -> bool:
    """Return whether an existing text encoder is trained with the denoiser."""
    if config.text.encoder is not None:
        return False
    return config.text.train == "on" or (config.text.train == "auto" and encoder.config.type == "ldm-bert")


def _class_conditions(
    config: SecondStageConfig, source: Source, held_out: Source, start: LatentDiffusion | None
) -> EncodedConditions:
    if not source.classes or source.labels is None:
        raise DataError(
            f"{config.data} has no labels, and --condition class needs them; sort the images into class folders, "
            "name --loading.label-column, or give --condition none"
        )
    count = len(source.classes)
    text: Any = None if start is None else start.text_encoder
    if text is None:
        text = ClassToken(ClassTokenConfig(num_classes=count, embed_dim=config.text.embed_dim))
    if not isinstance(text, ClassToken) or text.config.num_classes != count or text.null is None:
        raise CheckpointError(
            f"init {config.init} does not have {count} classes and an embedding for no class; start from another model"
        )
    labels, held_out_labels = (
        part.labels if part.labels is not None else np.full(len(part), count) for part in (source, held_out)
    )
    labels, held_out_labels = (np.where(part < 0, count, part) for part in (labels, held_out_labels))
    return EncodedConditions(text, None, Classes(labels, count), Classes(held_out_labels, count))


def _image_conditions(
    config: SecondStageConfig, source: Source, held_out: Source, start: LatentDiffusion | None
) -> EncodedConditions:
    encoder: Any = None if start is None else start.text_encoder
    if encoder is None:
        encoder = _new_image_encoder(config)
    if not isinstance(encoder, ImageTokens):
        raise CheckpointError(
            f"init {config.init} has no image encoder for its condition; give another --condition"
        )
    encoder.backbone.eval().requires_grad_(False)
    options = encoder.config
    preprocess = Preprocess(
        size=options.image_size, crop=1.0, mode="squash", mean=options.mean, std=options.std
    )
    train, held = (
        FrozenImages(part, encoder.backbone, preprocess, config.loading) for part in (source, held_out)
    )
    return EncodedConditions(encoder.projection, encoder, train, held)


def _new_image_encoder(config: SecondStageConfig) -> ImageTokens:
    """Return the pretrained ViT or Swin of a config, with a new projection of its features."""
    backbone: Any = weights.load(config.image_encoder).float()
    if not isinstance(backbone, ViT | Swin):
        raise CheckpointError(
            f"image_encoder {config.image_encoder} is a {type(backbone).__name__}; give a ViT or a Swin"
        )
    preprocess = backbone.card.preprocess
    backbone.replace_head(0)
    encoder = ImageTokens(
        ImageTokensConfig(
            backbone=backbone.config,
            embed_dim=config.text.embed_dim,
            image_size=preprocess.size,
            mean=preprocess.mean,
            std=preprocess.std,
        )
    )
    encoder.backbone = backbone
    return encoder


def require_captions(source: Source, data: str) -> Sequence[tuple[str, ...]]:
    """Return the alternative captions of each example.

    Args:
        data: name of the data, for messages.

    Raises:
        DataError: no example has a caption.
    """
    captions = source.captions
    if captions is None or not any(text.strip() for texts in captions for text in texts):
        raise DataError(
            f"{data} has no captions, and --condition text needs them: put NAME.txt beside NAME.png, write a "
            'metadata.jsonl with {"file_name": ..., "text": ...}, or name --loading.caption-column'
        )
    num_empty = sum(not any(text.strip() for text in texts) for texts in captions)
    if num_empty:
        log.info(
            "%s of %s images have no caption and are trained without condition",
            f"{num_empty:,}",
            f"{len(captions):,}",
        )
    return captions


def _new_text_encoder(config: SecondStageConfig, texts: Sequence[str]) -> TextEncoder:
    """Return the transformer of the paper with random weights, and a tokenizer trained on the captions."""
    options = config.text
    tokenizer = train_tokenizer(texts, options.vocabulary)
    return TextEncoder(
        TextConfig(
            type="ldm-bert",
            vocab_size=tokenizer.size,
            max_length=options.max_length or tokens_needed(texts, tokenizer),
            embed_dim=options.embed_dim,
            depth=options.depth,
            num_heads=options.embed_dim // options.head_dim,
            pad_token=tokenizer.pad,
        ),
        tokenizer,
    )


def load_text_encoder(source: str) -> TextEncoder:
    """Load a text encoder: a file of its own, or that of a latent diffusion model.

    Raises:
        CheckpointError: there is none in `source`.
    """
    loaded: Any = weights.load(source).float()
    loaded = getattr(loaded, "text_encoder", loaded)
    if not isinstance(loaded, TextEncoder):
        raise CheckpointError(
            f"text.encoder {source} has no text encoder; give one, or a Stable Diffusion model"
        )
    return loaded
