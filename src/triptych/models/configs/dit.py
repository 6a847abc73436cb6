"""Config of the Diffusion Transformer, its published sizes, and their costs in closed form. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from triptych.config import check
from triptych.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Config of a DiT, a ViT that denoises (Peebles and Xie 2023, Section 3.2), checked on construction.

    With `num_classes` the class modulates the blocks, as the time does; with `context_dim` each block attends to a
    prompt (Chen et al. 2023, "PixArt-alpha", Section 2.3); with neither the network is unconditional.
    """

    latent_size: tuple[int, int] = (32, 32)
    """Height and width of the training latents; forward takes any size."""
    in_channels: int = 4
    """Channels of the noisy latents and of the concatenated conditions (a mask, a masked image, depth)."""
    out_channels: int = 4
    patch_size: int
    """P: side of a patch in cells of the latents."""
    embed_dim: int
    """D: width of a token."""
    depth: int
    """L: number of blocks."""
    num_heads: int
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP over `embed_dim`."""
    context_dim: int = 0
    """Channels of the prompt's tokens; 0 means that the network takes no prompt."""
    num_classes: int = 0
    """Number of classes, whose embedding is added to the time's; 0 means none."""
    null_class: bool = True
    """Whether there is a null class after the others, which guidance needs."""
    modulation: Literal["each", "single"] = "each"
    """adaLN-zero, where each block has its own projection of time and class to shifts, scales and gates (DiT,
    Section 3.2); or adaLN-single, with one projection for all blocks and a table per block (PixArt-alpha,
    Section 2.3), which saves a third of a small network's parameters."""
    learn_sigma: bool = False
    """Whether the last layer also predicts a variance, as in the published networks; `forward` leaves it out."""
    mlp: Literal["gelu", "gelu_tanh"] = "gelu_tanh"
    bias: bool = True
    """Whether queries, keys, values and the MLP have biases. The shifts of the modulation have the same effect;
    without biases a training step is faster."""
    qk_norm: bool = False
    """Whether each head's queries and keys get a LayerNorm."""
    position: Literal["stretched", "counted"] = "stretched"
    """Positions at another size than `latent_size`: the trained grid stretched over the latents, which keeps the
    composition; or counted from the corner, so that a patch has the same position at every aspect ratio."""
    time_frequencies: Literal["open", "closed"] = "open"
    """Whether the time's frequencies end one step before 1 / 10000 (the paper's code and every UNet) or at it
    (diffusers)."""
    norm_eps: float = 1e-6
    dropout: float = 0.0

    def __post_init__(self):
        check(self)
        for name in ("in_channels", "out_channels", "patch_size", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, which must be at least 1")
        for name in ("context_dim", "num_classes"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}, which must be 0 or more")
        if self.mlp_ratio <= 0:
            raise ConfigError(f"mlp_ratio is {self.mlp_ratio}, which must be positive")
        if min(self.latent_size) < 1:
            raise ConfigError(f"latent_size is {self.latent_size}, which must be positive")
        if self.embed_dim % self.num_heads:
            raise ConfigError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}; change one"
            )
        if self.embed_dim % 4:
            raise ConfigError(
                f"embed_dim is {self.embed_dim}, which must be a multiple of 4: a position has four parts"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout}, which must be at least 0 and below 1")

    @property
    def mlp_dim(self) -> int:
        """Hidden width of a block's MLP."""
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def downsample_factor(self) -> int:
        """Rows and columns of latents per token."""
        return self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `latent_size`, with padded patches at the ends."""
        return grid_of(self.latent_size, self.patch_size)

    @property
    def predicted(self) -> int:
        """Channels of the last layer: the prediction's and the variance's."""
        return self.out_channels * (2 if self.learn_sigma else 1)


def grid_of(latent_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Return rows and columns of patches that cover latents of a size."""
    return -(-latent_size[0] // patch), -(-latent_size[1] // patch)


def _dit(width: int, depth: int, heads: int, patch: int) -> DiTConfig:
    """Return a network of the paper (Table 1), for the 1000 classes of ImageNet at 256 x 256 pixels."""
    return DiTConfig(
        patch_size=patch,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=1000,
        learn_sigma=True,
    )


SIZES: dict[str, DiTConfig] = {
    **{f"dit-s{patch}": _dit(384, 12, 6, patch) for patch in (2, 4, 8)},
    **{f"dit-b{patch}": _dit(768, 12, 12, patch) for patch in (2, 4, 8)},
    **{f"dit-l{patch}": _dit(1024, 24, 16, patch) for patch in (2, 4, 8)},
    **{f"dit-xl{patch}": _dit(1152, 28, 16, patch) for patch in (2, 4, 8)},
    # For 64 x 64 pixels at f8, with its own text encoder: 5.9 M parameters, below 12 MB in half precision.
    "dit-emoji": DiTConfig(
        latent_size=(8, 8),
        patch_size=1,
        embed_dim=256,
        depth=6,
        num_heads=4,
        mlp_ratio=3.0,
        context_dim=192,
        modulation="single",
        mlp="gelu",
        bias=False,
    ),
}


def parameters(config: DiTConfig) -> int:
    """Return the number of parameters in closed form, which a test compares with the built network's."""
    d, hidden, patch = config.embed_dim, config.mlp_dim, config.patch_size**2
    block = 3 * d * d + (d + 1) * d + 2 * d * hidden + (3 * d + hidden + d if config.bias else 0)
    block += 4 * (d // config.num_heads) if config.qk_norm else 0
    block += d * d + 2 * config.context_dim * d + (d + 1) * d if config.context_dim else 0
    each, last = 6 * d, 2 * d
    if config.modulation == "each":
        modulation = (d + 1) * (config.depth * each + last)
    else:
        modulation = (d + 1) * each + config.depth * each + last
    classes = (config.num_classes + int(config.null_class)) * d if config.num_classes else 0
    time = (256 + 1) * d + (d + 1) * d
    ends = (config.in_channels * patch + 1) * d + (d + 1) * patch * config.predicted
    return ends + time + classes + config.depth * block + modulation


def macs(config: DiTConfig, latent_size: tuple[int, int] | None = None, tokens: int = 77) -> int:
    """Return the multiply-accumulates of the products of one step for one image, in closed form.

    Args:
        latent_size: rows and columns of the latents; by default the config's.
        tokens: tokens of the prompt, if the network takes one.
    """
    rows, columns = grid_of(latent_size or config.latent_size, config.patch_size)
    n, d, patch = rows * columns, config.embed_dim, config.patch_size**2
    block = n * 4 * d * d + 2 * n * n * d + n * 2 * d * config.mlp_dim
    if config.context_dim:
        block += n * 2 * d * d + tokens * 2 * config.context_dim * d + 2 * n * tokens * d
    modulation = d * (6 * d * config.depth + 2 * d) if config.modulation == "each" else d * 6 * d
    ends = n * patch * (config.in_channels + config.predicted) * d
    return ends + 256 * d + d * d + modulation + config.depth * block
