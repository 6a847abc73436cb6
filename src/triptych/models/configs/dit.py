"""The Diffusion Transformer as data: its config, its sizes, and their closed-form costs. Imports no torch."""

from dataclasses import dataclass
from typing import Literal

from triptych.config import check
from triptych.errors import UserError


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes and forms of a DiT: a ViT that denoises (Peebles and Xie 2023, Section 3.2). Checked when made.

    With `num_classes` a class is part of what modulates the blocks; with `context_dim` each block looks at a prompt
    (Chen et al. 2023, "PixArt-alpha", Section 2.3); with neither it generates unconditionally.
    """

    latent_size: tuple[int, int] = (32, 32)
    """Height and width of the latents that it was trained on; forward takes any size."""
    in_channels: int = 4
    """Channels of the noisy latents, and of what is concatenated to them (a mask, a masked image, depth)."""
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
    """Channels of a token of the prompt; 0: the network takes no prompt."""
    num_classes: int = 0
    """Classes with an embedding that is added to the time's; 0: none."""
    null_class: bool = True
    """One more row, after the classes, that stands for no class: what guidance is measured against."""
    modulation: Literal["each", "single"] = "each"
    """adaLN-zero, where each block makes its shifts, scales and gates of the time and the class by a product of its own
    (DiT, Section 3.2); or adaLN-single, one product for all, and a table a block (PixArt-alpha, Section 2.3), which
    spares a third of a small network's parameters."""
    learn_sigma: bool = False
    """The last layer also predicts a variance, as the published networks do; `forward` leaves it out."""
    mlp: Literal["gelu", "gelu_tanh"] = "gelu_tanh"
    bias: bool = True
    """Biases of queries, keys, values and of the MLP. Shifts of the modulation stand before these products, and do the
    same; without them a step of training is shorter."""
    qk_norm: bool = False
    """LayerNorm over each head's queries and keys."""
    position: Literal["stretched", "counted"] = "stretched"
    """At another size than `latent_size` the trained grid is stretched over the latents, so that an image is composed
    as a whole; or patches are counted from the corner, so that a place has one position at every aspect ratio."""
    time_frequencies: Literal["open", "closed"] = "open"
    """The time's frequencies stop one short of 1 / 10000 (the paper's code, and every UNet) or at it (diffusers)."""
    norm_eps: float = 1e-6
    dropout: float = 0.0

    def __post_init__(self):
        check(self)
        for name in ("in_channels", "out_channels", "patch_size", "embed_dim", "depth", "num_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, which must be at least 1")
        for name in ("context_dim", "num_classes"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, which must be 0 or more")
        if self.mlp_ratio <= 0:
            raise UserError(f"mlp_ratio is {self.mlp_ratio}, which must be positive")
        if min(self.latent_size) < 1:
            raise UserError(f"latent_size is {self.latent_size}, which must be positive")
        if self.embed_dim % self.num_heads:
            raise UserError(
                f"embed_dim {self.embed_dim} is not a multiple of num_heads {self.num_heads}; change one"
            )
        if self.embed_dim % 4:
            raise UserError(
                f"embed_dim is {self.embed_dim}, which must be a multiple of 4: a position is four parts"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}, which must be at least 0 and below 1")

    @property
    def mlp_dim(self) -> int:
        """Hidden width of a block's MLP."""
        return round(self.embed_dim * self.mlp_ratio)

    @property
    def downsample_factor(self) -> int:
        """Rows and columns of the latents for one token."""
        return self.patch_size

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches at `latent_size`; a broken patch at the end counts."""
        return grid_of(self.latent_size, self.patch_size)

    @property
    def predicted(self) -> int:
        """Channels of the last layer: the prediction's, and the variance's."""
        return self.out_channels * (2 if self.learn_sigma else 1)


def grid_of(latent_size: tuple[int, int], patch: int) -> tuple[int, int]:
    """Rows and columns of patches that cover latents of a size."""
    return -(-latent_size[0] // patch), -(-latent_size[1] // patch)


def _dit(width: int, depth: int, heads: int, patch: int) -> DiTConfig:
    """A network of the paper (Table 1), for the 1000 classes of ImageNet at 256 x 256 pixels."""
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
    # For 64 pixels at f8 and a text encoder of its own: 5.9 M, so that halves of it are a file below 12 MB.
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
    """Number of parameters in closed form; a test holds it equal to the built network's."""
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
    """Multiply-accumulates of the products of one step for one image, in closed form.

    Args:
        latent_size: rows and columns; those of the config unless given.
        tokens: of the prompt, where the network takes one.
    """
    rows, columns = grid_of(latent_size or config.latent_size, config.patch_size)
    n, d, patch = rows * columns, config.embed_dim, config.patch_size**2
    block = n * 4 * d * d + 2 * n * n * d + n * 2 * d * config.mlp_dim
    if config.context_dim:
        block += n * 2 * d * d + tokens * 2 * config.context_dim * d + 2 * n * tokens * d
    modulation = d * (6 * d * config.depth + 2 * d) if config.modulation == "each" else d * 6 * d
    ends = n * patch * (config.in_channels + config.predicted) * d
    return ends + 256 * d + d * d + modulation + config.depth * block
