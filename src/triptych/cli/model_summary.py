"""A network's config in words, and its costs, without building it. Imports no torch."""

import functools
from typing import Any, NamedTuple

from triptych.heads.config import SegmenterConfig
from triptych.models.configs import autoencoder as autoencoder_config
from triptych.models.configs import convnet as convnet_config
from triptych.models.configs import dit as dit_config
from triptych.models.configs import swin as swin_config
from triptych.models.configs import text as text_config
from triptych.models.configs import unet as unet_config
from triptych.models.configs import vit as vit_config
from triptych.models.configs.autoencoder import AutoencoderConfig, TinyAutoencoderConfig
from triptych.models.configs.convnet import ConvNetConfig
from triptych.models.configs.dit import DiTConfig
from triptych.models.configs.image_tokens import ImageTokensConfig
from triptych.models.configs.latent_diffusion import LatentDiffusionConfig
from triptych.models.configs.swin import SwinConfig
from triptych.models.configs.text import ClassTokenConfig, TextConfig
from triptych.models.configs.unet import UNetConfig
from triptych.models.configs.vit import ViTConfig


class Described(NamedTuple):
    """What a table says of a network."""

    family: str
    size: str
    """What it takes: height and width in pixels, or tokens."""
    form: str
    """What it is made of."""
    parameters: int | None
    """None where only the built network knows."""
    macs: int | None
    """Multiply-accumulates: of a classifier for one image, of an autoencoder for there and back, of a diffusion model
    for one step; None where there is no closed form."""


@functools.singledispatch
def describe(config: Any) -> Described:
    """The words and figures of a config of any family; of an unknown one just its type."""
    size = getattr(config, "image_size", None)
    return Described(
        type(config).__name__.removesuffix("Config").lower(), _by(size) if size else "", "", None, None
    )


@describe.register
def _(c: ViTConfig) -> Described:
    stride = f"patches of {c.patch_size}" + (f" after a {c.stem} stem" if c.stem != "patch" else "")
    words = [f"{stride}, width {c.embed_dim}, {_blocks(c.depth)}, {_heads(c.num_heads)}"]
    words += [f"{c.num_registers} registers"] if c.num_registers else []
    words += ["distilled"] if c.distill_token else []
    words += [f"{c.position} positions"] if c.position != "learned" else []
    words += [f"{c.pool} pooling"] if c.pool != "token" else []
    words += [f"{c.mlp} MLP"] if c.mlp != "gelu" else []
    words += [f"{c.head} head"] if c.num_classes and c.head != "linear" else []
    words += ["no head"] if not c.num_classes else []
    return Described("vit", _by(c.image_size), ", ".join(words), vit_config.parameters(c), vit_config.macs(c))


@describe.register
def _(c: SwinConfig) -> Described:
    stem = f" after a stem of {_series(c.stem_widths)}" if c.stem_widths else ""
    words = [f"patches of {c.patch_size}{stem}, widths {_series(c.widths)}, {_series(c.depths)} blocks"]
    words += [f"{_series(c.num_heads)} heads", f"windows of {_windows(c.window_size)}"]
    words += (
        [f"positions scaled for {_windows(c.pretrained_window_size)}"] if c.pretrained_window_size else []
    )
    words += ["a norm for each map"] if c.map_norms else ["no head"] if not c.num_classes else []
    family = "swin" if c.version == 1 else "swinv2"
    return Described(
        family, _by(c.image_size), ", ".join(words), swin_config.parameters(c), swin_config.macs(c)
    )


@describe.register
def _(c: ConvNetConfig) -> Described:
    return Described(
        "convnet",
        _by(c.image_size),
        f"widths {_series(c.widths)}, maps alone",
        convnet_config.parameters(c),
        convnet_config.macs(c),
    )


@describe.register
def _(c: SegmenterConfig) -> Described:
    head = {"fpn": "FPN", "unet": "U-Net", "upernet": "UPerNet"}[c.head.type]
    backbone = describe(c.backbone)
    words = f"{head} of width {c.head.channels} on {backbone.family}: {backbone.form}"
    return Described("segmenter", _by(c.image_size), words, None, None)


@describe.register
def _(c: AutoencoderConfig) -> Described:
    book = f" of {c.codebook_size:,} entries" if c.regularization == "vq" else ""
    words = f"{c.regularization.upper()}{book}, {c.latent_channels} channels at 1/{c.downsample_factor}, "
    words += f"widths {_series(tuple(c.base_channels * m for m in c.channel_multipliers))}"
    words += "" if c.middle_attention else ", no attention"
    return _first_stage(c, words)


@describe.register
def _(c: TinyAutoencoderConfig) -> Described:
    return _first_stage(
        c, f"{c.latent_channels} channels at 1/{c.downsample_factor}, width {c.base_channels}"
    )


def _first_stage(c: AutoencoderConfig | TinyAutoencoderConfig, words: str) -> Described:
    words += f", latents times {c.scale:g}" if isinstance(c.scale, float) and c.scale != 1 else ""
    parameters, macs = autoencoder_config.parameters(c), autoencoder_config.macs(c)
    return Described("autoencoder", _by(c.image_size), words, parameters, macs)


@describe.register
def _(c: TextConfig) -> Described:
    used = f"{c.depth - c.skip_last_blocks} of {c.depth} blocks" if c.skip_last_blocks else _blocks(c.depth)
    words = f"{c.type}, width {c.embed_dim}, {used}, {_heads(c.num_heads)}, {c.vocab_size:,} words"
    return Described("text", f"{c.max_length} tokens", words, text_config.parameters(c), None)


@describe.register
def _(c: ClassTokenConfig) -> Described:
    words = f"a token of width {c.embed_dim} a class, {c.num_classes:,} classes"
    return Described("text", "1 token", words, text_config.parameters(c), 0)


@describe.register
def _(c: UNetConfig) -> Described:
    words = f"UNet of widths {_series(tuple(c.base_channels * m for m in c.channel_multipliers))}"
    return _denoiser(c, "unet", words, unet_config.parameters(c), unet_config.macs(c))


@describe.register
def _(c: DiTConfig) -> Described:
    words = (
        f"DiT with patches of {c.patch_size}, width {c.embed_dim}, {_blocks(c.depth)}, {_heads(c.num_heads)}"
    )
    return _denoiser(c, "dit", words, dit_config.parameters(c), dit_config.macs(c))


def _denoiser(c: UNetConfig | DiTConfig, family: str, words: str, parameters: int, macs: int) -> Described:
    on = f" on {c.in_channels} x {_by(c.latent_size)}"
    return Described(family, f"{_by(c.latent_size)} cells", words + on, parameters, macs)


@describe.register
def _(c: ImageTokensConfig) -> Described:
    seen = describe(c.backbone)
    return Described("image tokens", _by(c.image_size), seen.form, seen.parameters, seen.macs)


@describe.register
def _(c: LatentDiffusionConfig) -> Described:
    net = describe(c.network)
    parts = [
        net,
        describe(c.autoencoder),
        *([describe(c.text_encoder)] if c.text_encoder is not None else []),
    ]
    weights = sum(part.parameters or 0 for part in parts)
    words = net.form
    words += (
        f", {c.autoencoder.regularization.upper()}"
        if isinstance(c.autoencoder, AutoencoderConfig)
        else ", TAESD"
    )
    words += f" at 1/{c.autoencoder.downsample_factor}"
    if isinstance(c.text_encoder, TextConfig):
        words += f", {c.text_encoder.type} text"
    elif isinstance(c.text_encoder, ImageTokensConfig):
        words += ", an image"
    elif c.text_encoder is not None:
        words += f", {c.text_encoder.num_classes:,} classes"
    elif c.network.num_classes and isinstance(c.network, DiTConfig):
        words += f", {c.network.num_classes:,} classes"
    tokens = c.text_encoder.max_length if isinstance(c.text_encoder, TextConfig) else 1
    costs = unet_config.macs if isinstance(c.network, UNetConfig) else dit_config.macs
    return Described("latent diffusion", _by(c.image_size), words, weights, costs(c.network, tokens=tokens))  # type: ignore


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _series(values: tuple[int, ...]) -> str:
    """ "96-192-384": a number a stage."""
    return "-".join(map(str, values))


def _windows(windows: tuple[tuple[int, int], ...]) -> str:
    sides = [str(h) if h == w else f"{h}x{w}" for h, w in windows]
    return sides[0] if len(set(sides)) == 1 else "-".join(sides)


def _blocks(count: int) -> str:
    return f"{count} block{'s' if count != 1 else ''}"


def _heads(count: int) -> str:
    return f"{count} head{'s' if count != 1 else ''}"
