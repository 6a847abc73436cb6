"""Features of real and generated images for distances between them: a network, and the preparation of its images.

Two distances can be compared only if the network and the preparation are the same. So the preparation is fixed here
and stored as data, independent of the cropping that a model card asks for, and the network is identified by a hash of
its weights instead of its name.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from triptych import weights
from triptych.config import to_json
from triptych.data.augment.batch import preprocess_batch
from triptych.data.config import IMAGENET_MEAN, IMAGENET_STD
from triptych.data.example import Example, Image
from triptych.data.images import decode
from triptych.data.resizing import resize_crop
from triptych.data.source import Source
from triptych.device import choose_device, choose_dtype, place_network
from triptych.errors import CheckpointError, ConfigError, TriptychError
from triptych.metrics.generation import ExtractorOutput
from triptych.models.swin import Swin
from triptych.models.vit import ViT
from triptych.network import Network

INCEPTION = "inception"
INCEPTION_SIZE = (299, 299)
INSTALL_COMMAND = "pip install torch-fidelity torchvision"


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that is done to an image before the network gets it.

    Some fields have a single possible value. They are stored so that a file of another version, which may prepare
    images differently, can be recognized.
    """

    image_size: tuple[int, int] | None = None
    """Height and width that every image, real or generated, is first resized and center-cropped to: the size of the
    generated images. None resizes to `size` directly."""
    size: tuple[int, int] | None = None
    """Height and width of the network's input, to which the image is stretched. None leaves resizing to the network."""
    interpolation: Literal["bicubic"] = "bicubic"
    resizer: Literal["pillow, antialiased, 8 bits"] = "pillow, antialiased, 8 bits"
    background: tuple[int, int, int] = (255, 255, 255)
    """Color that transparent images are composited onto before they are resized."""
    values: Literal["8 bits"] = "8 bits"
    """Generated images are rounded to integers from 0 to 255, as in image files, before features are extracted."""
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def apply(self, image: Image, name: str | None = None) -> UInt8[np.ndarray, "h w 3"]:
        """Return an image (a file or an array; grayscale and transparent images too) as the network's input, in uint8.

        Raises:
            DataError: the image cannot be read.
        """
        pixels = decode(image, name=name)
        if self.image_size is not None:
            pixels = resize_crop(pixels, self.image_size, 1.0, "crop", self.interpolation)
        if self.size is None:
            return pixels
        mode = "squash" if self.image_size is not None else "crop"
        return resize_crop(pixels, self.size, 1.0, mode, self.interpolation)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values. Files have `image_size` under the key "picture"."""  # words: quoted
        values = to_json(self)
        return {"picture": values.pop("image_size"), **values}  # words: quoted

    @property
    def digest(self) -> str:
        """Hash of the fields: 16 hexadecimal digits."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]


class Extractor:
    """Maps uint8 images to features; the `extract` of `triptych.metrics.generation.GenerationMetrics`.

    Args:
        net: maps normalized images to `ExtractorOutput`; Inception, which normalizes by itself, maps images from 0 to
            255.
        preparation: what is done to images before.
        name: name of the network, for messages.
        layer: the layer whose output is taken as features, in words.
        weights: hash of the network's weights.
        dtype: data type of matrix products, float32 or bfloat16.
    """

    def __init__(
        self,
        net: Callable[[Tensor], ExtractorOutput],
        preparation: Preparation,
        *,
        name: str,
        layer: str,
        weights: str,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.net, self.preparation, self.device, self.dtype = net, preparation, device, dtype
        self.name, self.layer, self.weights = name, layer, weights

    @property
    def identity(self) -> dict[str, Any]:
        """What two distances must have in common to be compared, as JSON values."""
        return {
            "extractor": {
                "weights": self.weights,
                "layer": self.layer,
                "precision": str(self.dtype).removeprefix("torch."),
            },
            "preparation": self.preparation.to_json(),
        }

    @torch.inference_mode()
    def __call__(self, images: UInt8[Tensor, "b 3 h w"]) -> ExtractorOutput:
        """Return the features, in fp32, of images from `prepare`."""
        images = images.to(self.device)
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            features, logits = self.net(images)
        return ExtractorOutput(features.float(), None if logits is None else logits.float())

    def prepare(self, images: Iterable[Image]) -> UInt8[Tensor, "b 3 h w"]:
        """Return images (files or arrays) as a batch of inputs."""
        rows = [np.moveaxis(self.preparation.apply(image), 2, 0) for image in images]
        return torch.from_numpy(np.stack(rows))


def to_uint8(images: Float[Tensor, "b 3 h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Round images in [-1, 1] to integers from 0 to 255, as image files have them."""
    levels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


class PreparedSource(Source):
    """A source whose images are prepared for an extractor, in the loader's worker processes."""

    def __init__(self, source: Any, preparation: Preparation) -> None:
        self.source, self.preparation = source, preparation

    @property
    def fingerprint(self) -> str:
        return self.source.fingerprint

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        example = self.source[index]
        try:
            image = self.preparation.apply(example.image, example.id)
        except TriptychError:
            image = example.image  # the loader cannot read it either, and reports it by name
        return replace(example, image=image, mask=None, boxes=None)


def open_extractor(
    model: str | Path | Network = "vit-emoji",
    *,
    image_size: tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "fp32",
) -> Extractor:
    """Load a feature extractor.

    Args:
        model: a ViT (including DINOv2) or a Swin: the network, or what `triptych.load` takes. Or "inception", the
            network of torch-fidelity, whose features make the Fréchet distance an FID.
        image_size: height and width that all images are first brought to.
        device: None chooses CUDA, then MPS, then the CPU.
        dtype: "fp32" or "bf16"; features of the two cannot be compared.

    Raises:
        CheckpointError: the model is not a ViT or Swin of color images.
        ConfigError: torch-fidelity is not installed.
    """
    chosen_device = choose_device(device)
    precision = choose_dtype(dtype, chosen_device)
    if model == INCEPTION:
        return _inception(image_size, chosen_device, precision)
    net = model if isinstance(model, Network) else weights.load(model)
    name = type(net).__name__ if isinstance(model, Network) else str(model)
    layer = _feature_layer(net, name)
    if net.config.in_channels != 3:
        raise CheckpointError(
            f"{name} takes images of {net.config.in_channels} channels, and 3 are needed; name a network of color "
            "images"
        )
    preprocess = net.card.preprocess
    preparation = Preparation(
        image_size=image_size, size=preprocess.size, mean=preprocess.mean, std=preprocess.std
    )
    placed: Any = place_network(net, chosen_device, torch.float32)
    return Extractor(
        lambda images: _extract(placed, preprocess_batch(images, preprocess.mean, preprocess.std)),
        preparation,
        name=name,
        layer=f"{layer} after the last norm",
        weights=weights_hash(net),
        device=chosen_device,
        dtype=precision,
    )


def _feature_layer(net: Network, name: str) -> str:
    """Return the layer that features are taken from, in words.

    Raises:
        CheckpointError: the network has no such layer.
    """
    if isinstance(net, ViT) and (net.config.class_token or net.config.pool != "attention"):
        return "class token" if net.config.class_token else "mean of tokens"
    if isinstance(net, ViT):
        return "pooled by attention"
    if isinstance(net, Swin) and not net.config.map_norms:
        return "mean of the last map"
    raise CheckpointError(
        f"{name} is a {type(net).__name__}, and features are extracted by a ViT or Swin classifier, or by "
        f"{INCEPTION!r}; name one of these"
    )


def _extract(net: Any, images: Float[Tensor, "b 3 h w"]) -> ExtractorOutput:
    """Return the output of the last norm as one vector, and logits if the network has classes.

    With a class token, features are that token alone, whatever the head reads (Stein et al. 2023, Section 3).
    """
    if isinstance(net, Swin):
        last = net.features(images)[-1].movedim(1, -1)  # b h w D
        features = pooled = net.norm(last).mean((1, 2))
    else:
        z, _, _ = net.encode(images)
        pooled = net.pooled(z)
        features = net.norm(z)[:, 0] if net.config.class_token else pooled
    return ExtractorOutput(features, net.head(pooled) if net.config.num_classes else None)


def _inception(image_size: tuple[int, int] | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    """Load torch-fidelity's Inception v3, the network of the original FID, which resizes images as TensorFlow 1 did.

    Without `image_size`, images are first resized to 299 x 299, as clean-fid does.
    """
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # type: ignore
    except ImportError as error:
        raise ConfigError(
            f"the extractor {INCEPTION!r} needs torch-fidelity, which is not installed; `{INSTALL_COMMAND}`, or use "
            "--extractor vit-emoji or another ViT or Swin"
        ) from error
    try:
        net: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except OSError as error:  # the base class of urllib's errors
        raise CheckpointError(
            f"torch-fidelity cannot download the weights of Inception ({error}); connect to the internet once, or put "
            f"the file into {Path(torch.hub.get_dir()) / 'checkpoints'}"
        ) from error
    preparation = Preparation(
        image_size=image_size,
        size=None if image_size is not None else INCEPTION_SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    net = net.to(device).eval()
    return Extractor(
        lambda images: ExtractorOutput(*net(images)),
        preparation,
        name=INCEPTION,
        layer="pool3, 2048 numbers",
        weights=weights_hash(net),
        device=device,
        dtype=dtype,
    )


def weights_hash(net: nn.Module) -> str:
    """Return a hash of all parameters and buffers with their names: the first 16 hexadecimal digits of SHA-256."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
