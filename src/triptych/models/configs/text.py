"""Text encoders as data: their config, the published sizes, their closed-form parameter counts. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from triptych.config import check
from triptych.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TextConfig:
    """Sizes and forms of a transformer that reads text. Checked when made.

    `clip` (Radford et al. 2021, Section 2.4) and `openclip` look back only and have the shipped vocabulary; `ldm-bert`
    (Rombach et al. 2022, Appendix E.2.1) looks both ways, at the word pieces of BERT or any other vocabulary.
    """

    kind: Literal["clip", "openclip", "ldm-bert"]
    vocab_size: int
    """Entries of the vocabulary."""
    added: int = 0
    """Rows of the table behind the vocabulary's: the vectors of added tokens (textual inversion)."""
    length: int = 77
    """Tokens of a text with its start, end and padding."""
    width: int
    """D: width of a token."""
    depth: int
    """Number of blocks, used or not."""
    heads: int
    head_dim: int = 0
    """Width of a head; 0 stands for D / heads. The LDM paper's heads are 64 wide whatever D is."""
    mlp_dim: int
    """Hidden width of a block's MLP."""
    activation: Literal["quick_gelu", "gelu"] = "gelu"
    """quick_gelu is x sigmoid(1.702 x), which CLIP was trained with."""
    skip: int = 0
    """Last blocks that are left out before the final norm. 1 gives the penultimate layer that SD 2 reads."""
    boxes: bool = False
    """It reads a layout's boxes as tokens, see `models.spatial_conditions.box_tokens`, and no text."""
    pad: int = 0
    """Token behind a text's end: the end again for CLIP, 0 for the others."""
    logits: bool = False
    """A classifier over the vocabulary that nothing reads, as the LDM paper's transformers carry it in their files."""
    norm_eps: float = 1e-5

    def __post_init__(self):
        check(self)
        for name in ("vocab_size", "width", "depth", "heads", "mlp_dim"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, which must be at least 1")
        if self.length < 3:
            raise UserError(f"length is {self.length}, which must be at least 3: a start, a token, an end")
        if self.added < 0 or self.head_dim < 0:
            raise UserError(f"added is {self.added} and head_dim {self.head_dim}, which must be 0 or more")
        if not self.head_dim and self.width % self.heads:
            raise UserError(f"width {self.width} is no multiple of {self.heads} heads; change one, or give head_dim")
        if not 0 <= self.skip < self.depth:
            raise UserError(f"skip is {self.skip}, which must be from 0 to {self.depth - 1}: one block is left")
        if not 0 <= self.pad < self.vocab_size:
            raise UserError(f"pad is {self.pad}, which must be a token from 0 to {self.vocab_size - 1}")

    @property
    def causal(self) -> bool:
        """Whether a token sees only those before it."""
        return self.kind != "ldm-bert"

    @property
    def inner(self) -> int:
        """Width of all heads together."""
        return self.heads * (self.head_dim or self.width // self.heads)


@dataclass(frozen=True, kw_only=True)
class ClassTokenConfig:
    """A class as a prompt of one token (Rombach et al. 2022, Appendix E.2.1). Checked when made."""

    num_classes: int
    width: int = 512
    null_class: bool = True
    """One more row, after the classes, that stands for no class: what guidance is measured against."""

    def __post_init__(self):
        check(self)
        if self.num_classes < 1 or self.width < 1:
            raise UserError(f"num_classes is {self.num_classes} and width {self.width}, which must be at least 1")


def _clip(width: int, depth: int, heads: int, **more) -> TextConfig:
    form = {"kind": "clip", "vocab_size": 49408, "mlp_dim": 4 * width}
    return TextConfig(**{**form, "width": width, "depth": depth, "heads": heads, **more})


def _bert(width: int, depth: int, **more) -> TextConfig:
    form = {"kind": "ldm-bert", "vocab_size": 30522, "heads": 8, "head_dim": 64, "mlp_dim": 4 * width, "logits": True}
    return TextConfig(**{**form, "width": width, "depth": depth, **more})


SIZES: dict[str, TextConfig] = {
    "clip-l": _clip(768, 12, 12, activation="quick_gelu", pad=49407),                    # SD 1
    "openclip-h": _clip(1024, 23, 16, kind="openclip"),                                  # SD 2 as diffusers keeps it
    "openclip-h-whole": _clip(1024, 24, 16, kind="openclip", skip=1),                    # SD 2 in single files
    "ldm-bert": _bert(1280, 32),                                                         # txt2img-1p4B
    "ldm-bert-640": _bert(640, 32),                                                      # text2img256
    "ldm-layout-text": _bert(512, 16, vocab_size=8192, length=92, boxes=True),                # layout2img-openimages256
}

CLASS_SIZES: dict[str, ClassTokenConfig] = {
    "cin256": ClassTokenConfig(num_classes=1000, null_class=False),
    "cin256-v2": ClassTokenConfig(num_classes=1000),
}


def parameters(config: TextConfig | ClassTokenConfig) -> int:
    """Number of parameters in closed form; a test holds it equal to the built network's."""
    if isinstance(config, ClassTokenConfig):
        return (config.num_classes + int(config.null_class)) * config.width
    d, inner, hidden = config.width, config.inner, config.mlp_dim
    qkv = 3 * d * inner + (3 * inner if config.causal else 0)
    block = 4 * d + qkv + inner * d + d + 2 * d * hidden + hidden + d
    table = (config.vocab_size + config.added + config.length) * d
    return table + config.depth * block + 2 * d + ((d + 1) * config.vocab_size if config.logits else 0)
