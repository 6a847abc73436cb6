"""Config of the Swin Transformer, its published sizes, and their costs in closed form. Imports no torch."""

from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal

from triptych.config import check
from triptych.errors import ConfigError

Window = tuple[int, int]


@dataclass(frozen=True, kw_only=True)
class SwinConfig:
    """Config of a Swin (Liu et al. 2021) or SwinV2 (Liu et al. 2022), checked on construction."""

    version: Literal[1, 2] = 1
    """2 is SwinV2: cosine attention, log-spaced continuous bias, norms after the branches."""
    image_size: tuple[int, int] = (224, 224)
    """Height and width of the training images; forward takes any size of at least one patch."""
    patch_size: int = 4
    """Side of a patch in pixels (after a stem: in the stem's output cells)."""
    in_channels: int = 3
    stem_widths: tuple[int, ...] = ()
    """Output channels of 3x3 convolutions of stride 2 before the patch partition, for small data sets (Xiao et al.
    2021); () as in the paper."""
    embed_dim: int
    """C: width of stage 1; each stage doubles it."""
    depths: tuple[int, ...]
    """Number of blocks in each stage."""
    num_heads: tuple[int, ...]
    """Number of heads in each stage."""
    window_size: tuple[Window, ...]
    """M: height and width of a window in cells of the map, for each stage. `windows_of` returns it for one number."""
    pretrained_window_size: tuple[Window, ...] = ()
    """Version 2: windows of pre-training, which set the scale of positions; () and a side of 0 mean `window_size`."""
    mlp_ratio: float = 4.0
    """Hidden width of a block's MLP, relative to its width."""
    qkv_bias: Literal["qkv", "qv", "none"] = "qkv"
    num_classes: int = 1000
    """Number of classes; with 0 there is no classifier, and the output is the pooled map."""
    map_norms: bool = False
    """Whether each stage's map gets a LayerNorm, instead of the last norm and the classifier, for dense heads
    (Swin-Det)."""
    shift_single_windows: bool = False
    """Whether SW-MSA shifts a map that one window covers, too, as the authors' backbones for detection and segmentation
    do. Their classifier and torchvision's do not."""
    norm_eps: float = 1e-5
    drop_path_rate: float = 0.0
    """Rate of stochastic depth in the last block; rates rise linearly from 0 in the first."""
    dropout: float = 0.0

    def __post_init__(self):
        check(self)
        for name in (
            "patch_size",
            "in_channels",
            "stem_widths",
            "embed_dim",
            "depths",
            "num_heads",
            "window_size",
        ):
            value = getattr(self, name)
            if (value == () and name != "stem_widths") or _smallest(value) < 1:
                raise ConfigError(f"{name} is {value}, which must be at least 1")
        stages = len(self.depths)
        for name in ("num_heads", "window_size"):
            if len(getattr(self, name)) != stages:
                raise ConfigError(
                    f"{name} has {len(getattr(self, name))} entries for {stages} stages of depths {self.depths}; "
                    "give one a stage"
                )
        if self.pretrained_window_size and (
            len(self.pretrained_window_size) != stages or _smallest(self.pretrained_window_size) < 0
        ):
            raise ConfigError(
                f"pretrained_window_size is {self.pretrained_window_size}; give (height, width) for "
                f"each of {stages} stages, "
                "or leave it out"
            )
        if min(self.image_size) < self.stride or self.num_classes < 0:
            raise ConfigError(
                f"image_size {self.image_size} must be at least one patch of {self.stride} pixels, "
                f"and num_classes {self.num_classes} cannot be negative"
            )
        for width, heads in zip(self.widths, self.num_heads, strict=True):
            if width % heads:
                raise ConfigError(
                    f"a stage of width {width} is no multiple of its {heads} heads; change one of the two"
                )
        if self.map_norms and self.num_classes:
            raise ConfigError("map_norms takes the classifier's place; give num_classes=0 with it")
        if (
            not 0 <= self.drop_path_rate < 1
            or not 0 <= self.dropout < 1
            or self.embed_dim * self.mlp_ratio < 1
        ):
            raise ConfigError(
                f"drop_path_rate {self.drop_path_rate} and dropout {self.dropout} must be at least 0 and below 1, "
                f"mlp_ratio {self.mlp_ratio} large enough for an MLP of width 1"
            )

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each stage's map: C, 2C, 4C, ..."""
        return tuple(self.embed_dim * 2**i for i in range(len(self.depths)))

    @property
    def stride(self) -> int:
        """Pixels from one cell of the first map to the next."""
        return self.patch_size * 2 ** len(self.stem_widths)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels from one cell to the next in each stage's map."""
        return tuple(self.stride * 2**i for i in range(len(self.depths)))


def _smallest(value: Any) -> int:
    """Return the smallest number in a nested field."""
    return value if isinstance(value, int) else min(map(_smallest, value), default=1)


def windows_of(window: Any, stages: int) -> Any:
    """Return a window for each stage from 7, (7, 9), or one of these for each stage.

    Raises:
        ConfigError: any other value.
    """
    if isinstance(window, Integral) and not isinstance(window, bool):
        return ((int(window), int(window)),) * stages
    entries = window if isinstance(window, tuple | list) else ()
    if len(entries) == 2 and stages != 2 and all(isinstance(side, Integral) for side in entries):
        entries = (entries,) * stages
    pairs = tuple((side, side) if isinstance(side, Integral) else side for side in entries)
    if len(pairs) != stages or not all(isinstance(pair, tuple | list) and len(pair) == 2 for pair in pairs):
        raise ConfigError(
            f"window_size is {window!r}; give a number, (height, width), or one of these for each of {stages} stages"
        )
    return tuple(map(tuple, pairs))


def fitting(config: SwinConfig, window: Any) -> tuple[Window, ...]:
    """Return a window for each stage. One window for all stages is reduced to a stage's map at the config's image size,
    as in all published networks; windows given stage by stage are not changed."""
    windows = windows_of(window, len(config.depths))
    if not isinstance(window, Integral) and len(window) == len(config.depths):
        return windows
    maps = maps_at(config, config.image_size)
    return tuple(
        (min(h, rows), min(w, columns)) for (h, w), (rows, columns) in zip(windows, maps, strict=True)
    )


def maps_at(config: SwinConfig, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """Return rows and columns of each stage's map; odd maps are padded by a row or column before they are merged."""
    size = tuple(-(-side // config.stride) for side in image_size)
    maps = []
    for _ in config.depths:
        maps.append((size[0], size[1]))
        size = tuple(-(-side // 2) for side in size)
    return maps


def _size(dim: int, depths: tuple[int, ...], heads: tuple[int, ...], window: int = 7, **more) -> SwinConfig:
    return SwinConfig(
        embed_dim=dim, depths=depths, num_heads=heads, window_size=windows_of(window, len(depths)), **more
    )


#              C    blocks          heads
LETTERS = {
    "t": (96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "s": (96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "b": (128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "l": (192, (2, 2, 18, 2), (6, 12, 24, 48)),
}
V2 = {"version": 2, "image_size": (256, 256), "qkv_bias": "qv", "window": 8}

SIZES: dict[str, SwinConfig] = {f"swin-{name}": _size(*letter) for name, letter in LETTERS.items()}
SIZES |= {f"swinv2-{name}": _size(*letter, **V2) for name, letter in LETTERS.items()}
# Backbone of the shipped segmenter: small, for scenes of 128 px.
SIZES["swin-emoji"] = _size(
    40,
    (2, 2, 4, 2),
    (2, 4, 8, 16),
    4,
    image_size=(128, 128),
    patch_size=1,
    stem_widths=(32, 64),
    num_classes=1032,
    drop_path_rate=0.1,
)


def parameters(config: SwinConfig) -> int:
    """Return the number of parameters in closed form, which a test compares with the built network's."""
    c, channels, total = config.embed_dim, config.in_channels, 0
    for width in config.stem_widths:
        total, channels = total + 9 * channels * width + 2 * width, width
    total += channels * config.patch_size**2 * c + c + 2 * c
    for i, (d, depth, heads, (h, w)) in enumerate(
        zip(config.widths, config.depths, config.num_heads, config.window_size, strict=True)
    ):
        if i:
            merged = 2 * d if config.version == 1 else d  # channels of the norm in patch merging
            total += 2 * d * d + 2 * merged
        hidden = int(d * config.mlp_ratio)
        bias = 512 * (3 + heads) + heads if config.version == 2 else (2 * h - 1) * (2 * w - 1) * heads
        qkv = 3 * d * d + {"qkv": 3 * d, "qv": 2 * d, "none": 0}[config.qkv_bias]
        total += depth * (4 * d + qkv + d * d + d + bias + 2 * d * hidden + hidden + d)
    if config.map_norms:
        return total + sum(2 * d for d in config.widths)
    d = config.widths[-1]
    return total + 2 * d + (d * config.num_classes + config.num_classes if config.num_classes else 0)


def macs(config: SwinConfig, image_size: tuple[int, int] | None = None) -> int:
    """Return the multiply-accumulates of products and convolutions for one image, in closed form.

    A stage of `depth` blocks on h x w cells of width D, with n windows of m cells and hidden width H:
    depth [n (4 m D^2 + 2 m^2 D) + 2 h w D H] + merging 2 h w D^2 (Swin, Equation 2, with padding), then D classes.
    """
    size = image_size or config.image_size
    maps = maps_at(config, size)
    channels, (rows, columns), total = config.in_channels, size, 0
    for width in config.stem_widths:
        rows, columns = -(-rows // 2), -(-columns // 2)
        total, channels = total + 9 * channels * width * rows * columns, width
    total += channels * config.patch_size**2 * config.embed_dim * maps[0][0] * maps[0][1]
    for i, (d, depth, heads, (wh, ww), (h, w)) in enumerate(
        zip(config.widths, config.depths, config.num_heads, config.window_size, maps, strict=True)
    ):
        n, m = -(-h // wh) * -(-w // ww), wh * ww
        total += depth * (n * (4 * m * d * d + 2 * m * m * d) + 2 * h * w * d * int(d * config.mlp_ratio))
        if config.version == 2:
            total += depth * (2 * wh - 1) * (2 * ww - 1) * 512 * (2 + heads)
        if i:
            total += h * w * 2 * d * d
    return total + config.widths[-1] * config.num_classes


def with_window(config: SwinConfig, window: Any) -> SwinConfig:
    """Return the config with other windows; SwinV2 keeps the scale of its training windows."""
    windows = windows_of(window, len(config.depths))
    if config.version == 1:
        return replace(config, window_size=windows, pretrained_window_size=())
    own = ((0, 0),) * len(windows)  # replace 0 by the stage's own window
    scales = tuple(
        (before[0] or now[0], before[1] or now[1])
        for before, now in zip(config.pretrained_window_size or own, config.window_size, strict=True)
    )
    return replace(config, window_size=windows, pretrained_window_size=scales if scales != windows else ())
