"""Configs of text encoders, published sizes, and parameter counts in closed form. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from triptych.config import check
from triptych.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Config of a text transformer, checked on construction.

    `clip` (Radford et al. 2021, Section 2.4) and `openclip` have causal attention and the shipped vocabulary;
    `ldm-bert` (Rombach et al. 2022, Appendix E.2.1) has bidirectional attention, and BERT's or any other vocabulary.
    """

    type: Literal["clip", "openclip", "ldm-bert"]
    vocab_size: int
    """Entries of the vocabulary."""
    num_added_tokens: int = 0
    """Rows of the embedding table after the vocabulary's: vectors of added tokens (textual inversion)."""
    max_length: int = 77
    """Tokens of a text, with start, end and padding."""
    embed_dim: int
    """D: width of a token."""
    depth: int
    """Number of blocks, including skipped ones."""
    num_heads: int
    head_dim: int = 0
    """Width of a head; 0 means D / heads. The LDM paper's heads have width 64 for any D."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, relative to `embed_dim`."""
    activation: Literal["quick_gelu", "gelu"] = "gelu"
    """quick_gelu is CLIP's x sigmoid(1.702 x)."""
    skip_last_blocks: int = 0
    """Number of last blocks to skip before the final norm; 1 is SD 2's penultimate layer."""
    boxes: bool = False
    """Whether it reads a layout's boxes as tokens instead of text; see `models.spatial_conditions.box_tokens`."""
    pad_token: int = 0
    """Padding token after a text's end: the end token for CLIP, 0 for the others."""
    logits: bool = False
    """Whether there is an unused classifier over the vocabulary, as in the files of the LDM paper's transformers."""
    norm_eps: float = 1e-5

    def __post_init__(self):
        check(self)
        for name in ("vocab_size", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, which must be at least 1")
        if self.mlp_ratio <= 0:
            raise ConfigError(f"mlp_ratio is {self.mlp_ratio}, which must be positive")
        if self.max_length < 3:
            raise ConfigError(
                f"max_length is {self.max_length}, which must be at least 3: a start, a token, an end"
            )
        if self.num_added_tokens < 0 or self.head_dim < 0:
            raise ConfigError(
                f"num_added_tokens is {self.num_added_tokens} and head_dim {self.head_dim}, which must be 0 or more"
            )
        if not self.head_dim and self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}; change "
                "one, or give head_dim"
            )
        if not 0 <= self.skip_last_blocks < self.depth:
            raise ConfigError(
                f"skip_last_blocks is {self.skip_last_blocks}, which must be from 0 to "
                f"{self.depth - 1}: one block is left"
            )
        if not 0 <= self.pad_token < self.vocab_size:
            raise ConfigError(
                f"pad_token is {self.pad_token}, which must be a token from 0 to {self.vocab_size - 1}"
            )

    @property
    def mlp_dim(self) -> int:
        """Hidden width of a block's MLP."""
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def causal(self) -> bool:
        """Whether a token attends only to itself and earlier tokens."""
        return self.type != "ldm-bert"

    @property
    def inner(self) -> int:
        """Total width of all heads."""
        return self.num_heads * (self.head_dim or self.embed_dim // self.num_heads)


@dataclass(frozen=True, kw_only=True)
class ClassTokenConfig:
    """Config of a class as a prompt of one token (Rombach et al. 2022, Appendix E.2.1), checked on construction."""

    num_classes: int
    embed_dim: int = 512
    null_class: bool = True
    """Whether there is a null class after the others, which guidance needs."""

    def __post_init__(self):
        check(self)
        if self.num_classes < 1 or self.embed_dim < 1:
            raise ConfigError(
                f"num_classes is {self.num_classes} and embed_dim {self.embed_dim}, which must be at least 1"
            )


def _clip(width: int, depth: int, heads: int, **more) -> TextConfig:
    form = {"type": "clip", "vocab_size": 49408}
    return TextConfig(**{**form, "embed_dim": width, "depth": depth, "num_heads": heads, **more})


def _bert(width: int, depth: int, **more) -> TextConfig:
    form = {"type": "ldm-bert", "vocab_size": 30522, "num_heads": 8, "head_dim": 64, "logits": True}
    return TextConfig(**{**form, "embed_dim": width, "depth": depth, **more})


SIZES: dict[str, TextConfig] = {
    "clip-l": _clip(768, 12, 12, activation="quick_gelu", pad_token=49407),  # SD 1
    "openclip-h": _clip(1024, 23, 16, type="openclip"),  # SD 2 as stored by diffusers
    "openclip-h-whole": _clip(1024, 24, 16, type="openclip", skip_last_blocks=1),  # SD 2 in single files
    "ldm-bert": _bert(1280, 32),  # txt2img-1p4B
    "ldm-bert-640": _bert(640, 32),  # text2img256
    "ldm-layout-text": _bert(512, 16, vocab_size=8192, max_length=92, boxes=True),  # layout2img-openimages256
}

CLASS_SIZES: dict[str, ClassTokenConfig] = {
    "cin256": ClassTokenConfig(num_classes=1000, null_class=False),
    "cin256-v2": ClassTokenConfig(num_classes=1000),
}


def parameters(config: TextConfig | ClassTokenConfig) -> int:
    """Return the number of parameters in closed form, which a test compares with the built network's."""
    if isinstance(config, ClassTokenConfig):
        return (config.num_classes + int(config.null_class)) * config.embed_dim
    d, inner, hidden = config.embed_dim, config.inner, config.mlp_dim
    qkv = 3 * d * inner + (3 * inner if config.causal else 0)
    block = 4 * d + qkv + inner * d + d + 2 * d * hidden + hidden + d
    table = (config.vocab_size + config.num_added_tokens + config.max_length) * d
    return table + config.depth * block + 2 * d + ((d + 1) * config.vocab_size if config.logits else 0)
