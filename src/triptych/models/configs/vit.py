"""Config of the Vision Transformer, its published sizes, and their costs in closed form. Imports no torch, so that
`triptych list` and `--help` are fast."""

from dataclasses import dataclass
from typing import Literal

from triptych.config import check
from triptych.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ViTConfig:
    """Config of a ViT (Dosovitskiy et al. 2021), checked on construction."""

    image_size: tuple[int, int] = (224, 224)
    """Height and width for which the position table is made; forward takes any size."""
    patch_size: int
    """P: side of a patch in pixels (after a stem: in the stem's output cells)."""
    in_channels: int = 3
    embed_dim: int
    """D: width of a token."""
    depth: int
    """L: number of encoder blocks."""
    num_heads: int
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, relative to `embed_dim`."""
    num_classes: int = 1000
    """Number of classes; with 0 there is no classifier, and the output is the pooled token or the MLP head's hidden
    layer."""
    stem: Literal["patch", "conv", "resnet"] = "patch"
    """Stem before the projection: none, 3x3 convolutions of stride 2, or the hybrid's ResNet."""
    stem_widths: tuple[int, ...] = ()
    """conv: output channels of each convolution. resnet: (width of the root,)."""
    stem_depths: tuple[int, ...] = ()
    """resnet: number of units in each stage."""
    class_token: bool = True
    distill_token: bool = False
    """Whether there is DeiT's distillation token with its own head; at inference the two heads' logits are averaged."""
    num_registers: int = 0
    """Number of extra tokens without a position, which the head does not read (Darcet et al. 2024)."""
    position: Literal["learned", "sincos", "rotary", "none"] = "learned"
    prefix_positions: bool = True
    """Whether the trained position table has entries for the class and distillation tokens."""
    position_resampling: Literal["antialiased", "bicubic", "aligned", "dino"] = "antialiased"
    """How a trained table is resampled to another grid, as the authors of the weights do; all are bicubic. antialiased:
    timm and DINOv2 with registers; bicubic: not antialiased, as DeiT, MAE and transformers; aligned: corners on
    corners, as torchvision; dino: by a scale of (new + 0.1) / old, as DINO and DINOv2."""
    rotary_base: float = 100.0
    pool: Literal["token", "mean", "attention", "token+mean"] = "token"
    """Input of the head: class token, mean of patches, attention pooling, or class token and mean concatenated."""
    norm_after_pool: bool = False
    """Whether the final LayerNorm is applied to the pooled token, instead of to all tokens before pooling."""
    pre_norm: bool = False
    """Whether there is a LayerNorm before the first block, as in CLIP."""
    head: Literal["linear", "mlp", "cosine"] = "linear"
    """linear: the zero-initialized layer of fine-tuning. mlp: the pre-training head with a hidden tanh layer. cosine:
    scaled cosines."""
    head_dim: int = 0
    """Width of the hidden tanh layer; 0 means D."""
    mlp: Literal["gelu", "gelu_tanh", "quick_gelu", "swiglu"] = "gelu"
    """Form of the MLP; quick_gelu is x sigmoid(1.702 x), of OpenAI's CLIP."""
    qkv_bias: Literal["qkv", "qv", "none"] = "qkv"
    qk_norm: bool = False
    layer_scale: float | None = None
    """Initial gain of each branch's channels; None means no gains."""
    norm_eps: float = 1e-6
    drop_path_rate: float = 0.0
    """Rate of stochastic depth in the last block; rates rise linearly from 0 in the first."""
    dropout: float = 0.0

    def __post_init__(self):
        check(self)
        for name in ("patch_size", "in_channels", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, which must be at least 1")
        if self.mlp_ratio <= 0:
            raise ConfigError(f"mlp_ratio is {self.mlp_ratio}, which must be positive")
        if self.head_dim < 0:
            raise ConfigError(f"head_dim is {self.head_dim}, which must be 0 (as wide as a token) or more")
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim {self.embed_dim} is no multiple of num_heads {self.num_heads}; change one of the two"
            )
        if min(self.image_size) < 1 or self.num_classes < 0 or self.num_registers < 0:
            raise ConfigError(
                f"image_size {self.image_size} must be positive; num_classes {self.num_classes} and "
                f"num_registers {self.num_registers} cannot be negative"
            )
        if self.position == "sincos" and self.embed_dim % 4:
            raise ConfigError(
                f"sincos positions need an embed_dim that is a multiple of 4, got {self.embed_dim}"
            )
        if self.position == "rotary" and (self.embed_dim // self.num_heads) % 4:
            raise ConfigError(
                f"rotary positions need heads of a multiple of 4 channels, got {self.embed_dim // self.num_heads}"
            )
        if "token" in self.pool and not self.class_token:
            raise ConfigError(f"pool={self.pool!r} needs class_token=True; or pool with 'mean' or 'attention'")
        if self.pool == "token+mean" and self.norm_after_pool:
            raise ConfigError("pool='token+mean' is twice as wide as the final norm; use norm_after_pool=False")
        if self.distill_token and not (self.class_token and self.pool == "token" and self.head == "linear"):
            raise ConfigError("distill_token needs class_token=True, pool='token' and head='linear'")
        if not 0 <= self.drop_path_rate < 1 or not 0 <= self.dropout < 1:
            raise ConfigError(
                f"drop_path_rate {self.drop_path_rate} and dropout {self.dropout} must be at least 0 and below 1"
            )
        if self.stem == "conv" and not self.stem_widths:
            raise ConfigError("stem='conv' needs stem_widths, for example (32, 64, 128)")
        if self.stem == "resnet" and (len(self.stem_widths) != 1 or self.stem_widths[0] % 32):
            needed = "stem_widths=(width of the root,), a multiple of 32 such as (64,)"
            raise ConfigError(f"stem='resnet' needs {needed}, got {self.stem_widths}")

    @property
    def mlp_dim(self) -> int:
        """Hidden width of a block's MLP."""
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def stride(self) -> int:
        """Pixels between adjacent tokens."""
        stem = {
            "patch": 1,
            "conv": 2 ** len(self.stem_widths),
            "resnet": 4 * 2 ** max(len(self.stem_depths) - 1, 0),
        }
        return self.patch_size * stem[self.stem]

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `image_size`; sides are padded up to a multiple of the stride."""
        return grid_at(self, self.image_size)

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: class, distillation, registers."""
        return int(self.class_token) + int(self.distill_token) + self.num_registers


def grid_at(config: ViTConfig, image_size: tuple[int, int]) -> tuple[int, int]:
    """Return rows and columns of patches for an image of `image_size` (height, width)."""
    return -(-image_size[0] // config.stride), -(-image_size[1] // config.stride)


def _size(patch: int, dim: int, depth: int, heads: int, **more) -> ViTConfig:
    return ViTConfig(
        **{
            "patch_size": patch,
            "embed_dim": dim,
            "depth": depth,
            "num_heads": heads,
            **more,
        }
    )


#                D  L  heads
WIDTHS = {
    "ti": (192, 12, 3),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "h": (1280, 32, 16),
}
PATCHES = (8, 14, 16, 32)
DEIT3 = {"layer_scale": 1e-6, "prefix_positions": False}
_DINOV2 = {"image_size": (518, 518), "num_classes": 0, "layer_scale": 1e-5}
_DINOV3 = {
    "num_classes": 0,
    "layer_scale": 1e-5,
    "num_registers": 4,
    "position": "rotary",
    "qkv_bias": "qv",
    "norm_eps": 1e-5,
}

SIZES: dict[str, ViTConfig] = {
    f"vit-{name}{patch}": _size(patch, *width) for name, width in WIDTHS.items() for patch in PATCHES
}
SIZES |= {
    # Hybrids: the tokens come from a ResNet's map.
    "vit-r-ti16": _size(8, 192, 12, 3, stem="resnet", stem_widths=(64,)),
    "vit-r26-s32": _size(1, 384, 12, 6, stem="resnet", stem_widths=(64,), stem_depths=(2, 2, 2, 2)),
    "vit-r26-b32": _size(1, 768, 12, 12, stem="resnet", stem_widths=(64,), stem_depths=(2, 2, 2, 2)),
    "vit-r50-b16": _size(1, 768, 12, 12, stem="resnet", stem_widths=(64,), stem_depths=(3, 4, 9)),
    "vit-r50-l32": _size(1, 1024, 24, 16, stem="resnet", stem_widths=(64,), stem_depths=(3, 4, 6, 3)),
    # DeiT (Touvron et al. 2021) has the ViT's architecture; distilled, a second token and head.
    "deit-ti16-distilled": _size(16, 192, 12, 3, distill_token=True),
    "deit-s16-distilled": _size(16, 384, 12, 6, distill_token=True),
    "deit-b16-distilled": _size(16, 768, 12, 12, distill_token=True),
    "deit3-s16": _size(16, 384, 12, 6, **DEIT3),
    "deit3-m16": _size(16, 512, 12, 8, **DEIT3),
    "deit3-b16": _size(16, 768, 12, 12, **DEIT3),
    "deit3-l16": _size(16, 1024, 24, 16, **DEIT3),
    "deit3-h14": _size(14, 1280, 32, 16, **DEIT3),
    "dinov2-s14": _size(14, 384, 12, 6, **_DINOV2),
    "dinov2-b14": _size(14, 768, 12, 12, **_DINOV2),
    "dinov2-l14": _size(14, 1024, 24, 16, **_DINOV2),
    "dinov2-g14": _size(14, 1536, 40, 24, mlp="swiglu", mlp_ratio=4096 / 1536, **_DINOV2),
    "dinov3-s16": _size(16, 384, 12, 6, **_DINOV3),
    "dinov3-b16": _size(16, 768, 12, 12, **_DINOV3),
    "dinov3-l16": _size(16, 1024, 24, 16, **_DINOV3),
    # The shipped classifier: small, 64 px, with a convolutional stem for a small data set.
    "vit-emoji": _size(
        1,
        192,
        6,
        3,
        image_size=(64, 64),
        stem="conv",
        stem_widths=(32, 64, 128),
        class_token=False,
        pool="mean",
        head="cosine",
        num_classes=1032,
        layer_scale=0.1,
        drop_path_rate=0.05,
    ),
}


def parameters(config: ViTConfig) -> int:
    """Return the number of parameters in closed form, which a test compares with the built network's."""
    d, hidden = config.embed_dim, config.mlp_dim
    qkv = 3 * d * d + {"qkv": 3 * d, "qv": 2 * d, "none": 0}[config.qkv_bias]
    mlp = {"swiglu": 3 * d * hidden + 2 * hidden + d}.get(config.mlp, 2 * d * hidden + hidden + d)
    block = 4 * d + qkv + d * d + d + mlp
    block += 2 * d if config.layer_scale is not None else 0
    block += 4 * (d // config.num_heads) if config.qk_norm else 0
    total = config.depth * block + 2 * d + (2 * d if config.pre_norm else 0)
    stem, channels = _stem_parameters(config)
    total += stem + channels * config.patch_size**2 * d + d
    total += config.prefix * d
    if config.position == "learned":
        entries = int(config.class_token) + int(config.distill_token) if config.prefix_positions else 0
        total += (config.grid[0] * config.grid[1] + entries) * d
    if config.pool == "attention":
        total += d + 4 * (d * d + d) + 2 * d + mlp
    return total + _head_parameters(config)


def _head_parameters(config: ViTConfig) -> int:
    width = config.embed_dim * (2 if config.pool == "token+mean" else 1)
    classes = config.num_classes
    if config.head == "mlp":
        hidden = config.head_dim or config.embed_dim
        return width * hidden + hidden + (hidden + 1) * classes
    if classes == 0:
        return 0
    if config.head == "cosine":
        return width * classes + 1
    return (width * classes + classes) * (2 if config.distill_token else 1)


def _stem_parameters(config: ViTConfig) -> tuple[int, int]:
    """Return the parameters of the stem and its output channels."""
    channels, total = config.in_channels, 0
    if config.stem == "conv":
        for width in config.stem_widths:
            total, channels = total + 9 * channels * width + 2 * width, width
    if config.stem == "resnet":
        root = config.stem_widths[0]
        total, channels = 49 * channels * root + 2 * root, root
        for i, depth in enumerate(config.stem_depths):
            width = root * 2**i
            for j in range(depth):
                total += channels * width + 9 * width**2 + 4 * width**2 + 2 * (2 * width) + 2 * (4 * width)
                if channels != 4 * width or (i > 0 and j == 0):
                    total += channels * 4 * width + 2 * (4 * width)
                channels = 4 * width
    return total, channels


def macs(config: ViTConfig, image_size: tuple[int, int] | None = None) -> int:
    """Return the multiply-accumulates of products and convolutions for one image, in closed form.

    3 P^2 D n + L (4 N D^2 + 2 N D M + 2 N^2 D) + D C, with n patches and N = n + prefix tokens.
    """
    rows, columns = grid_at(config, image_size or config.image_size)
    d, n = config.embed_dim, rows * columns
    tokens = n + config.prefix
    stem, channels = _stem_macs(config, rows, columns)
    mlp = (3 if config.mlp == "swiglu" else 2) * d * config.mlp_dim
    total = stem + channels * config.patch_size**2 * d * n
    total += config.depth * (4 * tokens * d * d + tokens * mlp + 2 * tokens**2 * d)
    if config.pool == "attention":
        total += 2 * d * d + 2 * tokens * d * d + 2 * tokens * d + mlp
    width = d * (2 if config.pool == "token+mean" else 1)
    if config.head == "mlp":
        hidden = config.head_dim or d
        total += width * hidden + hidden * config.num_classes
    elif config.num_classes:
        total += width * config.num_classes * (2 if config.distill_token else 1)
    return total


def _stem_macs(config: ViTConfig, rows: int, columns: int) -> tuple[int, int]:
    """Return the multiply-accumulates of the stem for a grid of tokens, from its output back to the image."""
    channels, total = config.in_channels, 0
    cells = rows * columns * config.patch_size**2  # cells of the stem's output
    if config.stem == "conv":
        steps = len(config.stem_widths)
        for i, width in enumerate(config.stem_widths):
            total, channels = total + 9 * channels * width * cells * 4 ** (steps - 1 - i), width
    if config.stem == "resnet":
        stages = len(config.stem_depths)
        root = config.stem_widths[0]
        first = cells * 4 ** max(stages - 1, 0)  # cells after the root and its pooling
        total, channels = 49 * channels * root * first * 4, root
        for i, depth in enumerate(config.stem_depths):
            width, here = root * 2**i, first // 4**i
            for j in range(depth):
                before = here * (4 if i > 0 and j == 0 else 1)
                total += channels * width * before + 9 * width**2 * here + 4 * width**2 * here
                if channels != 4 * width or (i > 0 and j == 0):
                    total += channels * 4 * width * here
                channels = 4 * width
    return total, channels
