"""The Swin Transformer (Liu et al. 2021), Figure 3 from left to right, and SwinV2 (Liu et al. 2022): patch partition,
linear embedding, then stages of W-MSA and SW-MSA blocks with patch merging between them."""

import math
from collections.abc import Sequence
from dataclasses import replace

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from triptych.errors import ConfigError
from triptych.layers.initialization import initialize_weights
from triptych.layers.mlp import Mlp
from triptych.layers.padding import pad_to_multiple
from triptych.layers.patch import ConvStem, PatchEmbed, PatchMask
from triptych.layers.residual import DropPath
from triptych.layers.window import Window, WindowAttention, attend
from triptych.model_card import ModelCard, Preprocess
from triptych.models.configs.swin import SwinConfig
from triptych.network import Network


class PatchMerging(nn.Module):
    """Merge every 2 x 2 cells into one with twice the channels: concatenate, normalize, project (Section 3.1); SwinV2
    normalizes after the projection. A map with odd sides is padded at the right and bottom."""

    def __init__(self, dim: int, norm_first: bool, eps: float):
        super().__init__()
        self.norm_first = norm_first
        self.norm = nn.LayerNorm(4 * dim if norm_first else 2 * dim, eps=eps)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Float[Tensor, "b h w d"]) -> Float[Tensor, "b rows columns e"]:
        x = pad_to_multiple(x, (2, 2), (1, 2))
        x = rearrange(x, "b (h p) (w q) d -> b h w (q p d)", p=2, q=2)                   # b h/2 w/2 4D
        return self.reduction(self.norm(x)) if self.norm_first else self.norm(self.reduction(x))


class Block(nn.Module):
    """A Swin block, Equation 3: z' = (S)W-MSA(LN(z)) + z, then MLP(LN(z')) + z'. In SwinV2 the norm follows
    each branch, z' = LN((S)W-MSA(z)) + z ("res-post-norm", Section 3.2 there)."""

    def __init__(
        self,
        config: SwinConfig,
        dim: int,
        heads: int,
        window: Window,
        pretrained: Window,
        shifted: bool,
        drop_path_rate: float,
    ):
        super().__init__()
        self.shifted, self.norm_first = shifted, config.version == 1
        self.shift_single = config.shift_single_windows
        self.norm1 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.attn = WindowAttention(dim, heads, window, config.version == 2, pretrained, config.qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=config.norm_eps)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dropout=config.dropout)
        self.drop_path = DropPath(drop_path_rate)

    def forward(self, z: Float[Tensor, "b h w d"]) -> Float[Tensor, "b h w d"]:
        if self.norm_first:
            z = z + self.drop_path(attend(self.norm1(z), self.attn, self.shifted, self.shift_single))
            return z + self.drop_path(self.mlp(self.norm2(z)))
        z = z + self.drop_path(self.norm1(attend(z, self.attn, self.shifted, self.shift_single)))
        return z + self.drop_path(self.norm2(self.mlp(z)))


class Stage(nn.Module):
    """Patch merging, except in the first stage, and blocks that alternate between W-MSA and SW-MSA."""

    def __init__(self, config: SwinConfig, index: int, rates: Sequence[float]):
        super().__init__()
        self.merge = None
        if index:
            self.merge = PatchMerging(config.widths[index - 1], config.version == 1, config.norm_eps)
        before = config.pretrained_window_size[index] if config.pretrained_window_size else (0, 0)
        self.blocks = nn.ModuleList(
            Block(
                config, config.widths[index], config.num_heads[index], config.window_size[index],
                before, i % 2 == 1, rate,
            )
            for i, rate in enumerate(rates)
        )

    def forward(self, z: Float[Tensor, "b h w d"]) -> Float[Tensor, "b rows columns e"]:
        if self.merge is not None:
            z = self.merge(z)
        for block in self.blocks:
            z = block(z)
        return z


class Swin(Network):
    """The network of Figure 3. It maps normalized images of any height and width of at least one patch to logits. No
    call changes the state of the network.

    `config` describes the network, `card` its training. With `num_classes=0` the output is the pooled map.
    """

    config: SwinConfig

    def __init__(self, config: SwinConfig):
        super().__init__()
        self.config = config
        self.card = ModelCard(preprocess=Preprocess(size=config.image_size))
        self.stem, channels = nn.Identity(), config.in_channels
        if config.stem_widths:
            self.stem = ConvStem(channels, config.stem_widths)
            channels = self.stem.channels
        self.patch = PatchEmbed(channels, config.embed_dim, config.patch_size)
        self.patch_norm = nn.LayerNorm(config.embed_dim, eps=config.norm_eps)
        depth = sum(config.depths)
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        first = [sum(config.depths[:i]) for i in range(len(config.depths))]
        self.stages = nn.ModuleList(
            Stage(config, i, rates[at : at + config.depths[i]]) for i, at in enumerate(first)
        )
        if config.map_norms:
            self.norms = nn.ModuleList(nn.LayerNorm(width, eps=config.norm_eps) for width in config.widths)
        else:
            self.norm = nn.LayerNorm(config.widths[-1], eps=config.norm_eps)
            self.head = make_head(config)
        self.channels, self.strides = list(config.widths), list(config.strides)
        self.initialize()

    def initialize(self) -> None:
        """Initialize every parameter, with NaN first, so that a forgotten one is noticed. The head starts at zero, and
        so do SwinV2's norms after the branches: every block begins as the identity (Section 4 there)."""
        for parameter in self.parameters():
            nn.init.constant_(parameter, math.nan)
        initialize_weights(self)
        if self.config.version == 2:
            for block in self.blocks():
                nn.init.zeros_(block.norm1.weight)  # type: ignore[arg-type]
                nn.init.zeros_(block.norm2.weight)  # type: ignore[arg-type]
        if isinstance(getattr(self, "head", None), nn.Linear):
            nn.init.zeros_(self.head.weight)  # type: ignore[arg-type]

    def replace_head(self, num_classes: int, head: str = "linear") -> None:
        """Replace the head by a new linear one that starts at zero, in place; 0 classes remove the head."""
        if head != "linear":
            raise ConfigError(f"a Swin has a linear head, not {head!r}; leave head out")
        if self.config.map_norms:
            raise ConfigError("this Swin ends in norms of its maps, not in a classifier; call prepare_classes first")
        self.config = replace(self.config, num_classes=num_classes)
        self.head = make_head(self.config).to(next(self.parameters()))
        if num_classes:
            nn.init.zeros_(self.head.weight)  # type: ignore[arg-type]
            nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        self.card = replace(self.card, classes=None, colors=None, groupings={}, figures={})

    def prepare_maps(self) -> None:
        """Turn a classifier into a backbone for dense heads, in place: add norms on all maps, remove the last norm and
        the head (as in Swin-Det)."""
        if self.config.map_norms:
            return
        self.config = replace(self.config, num_classes=0, map_norms=True)
        self.norms = nn.ModuleList(nn.LayerNorm(w, eps=self.config.norm_eps) for w in self.config.widths)
        self.norms.to(next(self.parameters()))
        del self.norm, self.head
        self.card = replace(self.card, classes=None, colors=None, groupings={}, figures={})

    def prepare_classes(self) -> None:
        """Undo `prepare_maps` in place: the norm of the last map becomes the last norm, the others are removed."""
        if not self.config.map_norms:
            return
        self.config = replace(self.config, map_norms=False)
        self.norm, self.head = self.norms[-1], make_head(self.config)
        del self.norms

    def blocks(self) -> list[nn.Module]:
        """Return all blocks in order, for checkpointing, compilation and sharding."""
        return [block for stage in self.stages for block in stage.blocks]  # type: ignore[union-attr]

    def embed(
        self, images: Float[Tensor, "b c h w"], masked: PatchMask | None = None
    ) -> Float[Tensor, "b rows columns d"]:
        """Return the embedded patches: patch partition, linear embedding and norm."""
        if images.shape[1] != self.config.in_channels:
            raise ConfigError(f"images have {images.shape[1]} channels, the network takes {self.config.in_channels}")
        if images.shape[2] < self.config.stride or images.shape[3] < self.config.stride:
            raise ConfigError(
                f"images are {images.shape[2]} x {images.shape[3]} pixels, smaller than a patch of "
                f"{self.config.stride}; give larger ones"
            )
        return self.patch_norm(rearrange(self.patch(self.stem(images), masked), "b d h w -> b h w d"))

    def features(
        self, images: Float[Tensor, "b c h w"], masked: PatchMask | None = None
    ) -> list[Float[Tensor, "b d rows columns"]]:
        """Return each stage's map before patch merging, at strides 4, 8, 16 and 32; normalized with `map_norms`."""
        z, maps = self.embed(images, masked), []
        for i, stage in enumerate(self.stages):
            z = stage(z)                                                                 # b h w D
            normed = self.norms[i](z) if self.config.map_norms else z
            maps.append(rearrange(normed, "b h w d -> b d h w"))
        return maps

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b classes"]:
        if self.config.map_norms:
            raise ConfigError("this Swin has maps for a dense head and no classes; call features, or load a classifier")
        z = self.embed(images)
        for stage in self.stages:
            z = stage(z)
        return self.head(self.norm(z).mean(dim=(1, 2)))


def make_head(config: SwinConfig) -> nn.Module:
    """Return the classifier; the identity for 0 classes."""
    return nn.Linear(config.widths[-1], config.num_classes) if config.num_classes else nn.Identity()
