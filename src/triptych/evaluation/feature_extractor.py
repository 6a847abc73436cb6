"""From pictures to the features that generated ones are measured in: a network, and how pictures are prepared for it.

Two figures can be compared where both were the same, and not otherwise. So the preparation is data, written down whole
and fixed here, not taken from whatever a checkpoint's card says of cropping; and the network is known by a hash of its
numbers, not by its name.
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
from triptych.data.images import decode, resize_crop
from triptych.data.source import Source
from triptych.device import choose_device, choose_dtype, place_network
from triptych.errors import UserError
from triptych.metrics.generation import Extracted
from triptych.models.swin import Swin
from triptych.models.vit import ViT
from triptych.network import Network

INCEPTION = "inception"
INCEPTION_SIZE = (299, 299)
PIP = "pip install torch-fidelity torchvision"


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """All that is done to a picture before the network sees it. Some fields have one value only: it is written down so
    that a file of another version, which may do otherwise, is told from one of this."""

    picture: tuple[int, int] | None = None
    """Height and width that every picture, real or generated, is brought to first: its middle, as the generated ones
    are. None goes to `size` at once."""
    size: tuple[int, int] | None = None
    """Height and width that the network is fed, the picture stretched to it. None leaves that to the network."""
    interpolation: Literal["bicubic"] = "bicubic"
    resizer: Literal["pillow, antialiased, 8 bits"] = "pillow, antialiased, 8 bits"
    background: tuple[int, int, int] = (255, 255, 255)
    """Laid under transparent pixels, before anything is resized."""
    values: Literal["8 bits"] = "8 bits"
    """Generated pictures are rounded to whole numbers from 0 to 255, as files hold them, before they are measured."""
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def fitted(self, picture: Image, name: str | None = None) -> UInt8[np.ndarray, "h w 3"]:
        """A picture of any kind (grey, transparent, a file, an array) as the network is fed it, in whole numbers.

        Raises:
            UserError: it cannot be read.
        """
        pixels = decode(picture, name=name)
        if self.picture is not None:
            pixels = resize_crop(pixels, self.picture, 1.0, "crop", self.interpolation)
        if self.size is None:
            return pixels
        mode = "squash" if self.picture is not None else "crop"
        return resize_crop(pixels, self.size, 1.0, mode, self.interpolation)

    @property
    def digest(self) -> str:
        """Hexadecimal digits that another preparation has not."""
        return hashlib.sha256(json.dumps(to_json(self), sort_keys=True).encode()).hexdigest()[:16]


class Extractor:
    """Pictures in whole numbers to features: what `triptych.metrics.generation` is passed.

    Args:
        net: normalised images to `Extracted`; for Inception, which normalises by itself, images from 0 to 255.
        preparation: what is done to pictures before.
        name: for people.
        layer: where in the network features come from, in words.
        weights: a hash of the network's numbers.
        dtype: "fp32" or "bf16", that products are computed in.
    """

    def __init__(
        self,
        net: Callable[[Tensor], Extracted],
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
        """What two figures must have in common, as JSON."""
        return {
            "extractor": {
                "weights": self.weights,
                "layer": self.layer,
                "precision": str(self.dtype).removeprefix("torch."),
            },
            "preparation": to_json(self.preparation),
        }

    @torch.inference_mode()
    def __call__(self, pictures: UInt8[Tensor, "b 3 h w"]) -> Extracted:
        """Features, fp32, of pictures that are `fitted`."""
        pictures = pictures.to(self.device)
        enabled = self.dtype != torch.float32
        with torch.autocast(self.device.type, dtype=self.dtype, enabled=enabled):
            features, logits = self.net(pictures)
        return Extracted(features.float(), None if logits is None else logits.float())

    def fitted(self, pictures: Iterable[Image]) -> UInt8[Tensor, "b 3 h w"]:
        """A batch of pictures of any kind."""
        rows = [np.moveaxis(self.preparation.fitted(one), 2, 0) for one in pictures]
        return torch.from_numpy(np.stack(rows))


def eight_bits(images: Float[Tensor, "b 3 h w"]) -> UInt8[np.ndarray, "b h w 3"]:
    """Images in [-1, 1] as files would hold them."""
    levels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


class Prepared(Source):
    """A source whose pictures are as the network is fed them; workers of a loader do it."""

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
            image = self.preparation.fitted(example.image, example.id)
        except UserError:
            image = example.image  # the loader cannot read it either, and notes it under its name
        return replace(example, image=image, mask=None, boxes=None)


def open_extractor(
    named: str | Path | Network = "vit-emoji",
    *,
    picture: tuple[int, int] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "fp32",
) -> Extractor:
    """The network that features come from.

    Args:
        named: a ViT (DINOv2 among them) or a Swin: the network, or what `triptych.load` takes; or "inception",
            torch-fidelity's, whose features make the distance an FID.
        picture: height and width that all pictures are brought to first.
        device: None takes CUDA, then MPS, then the processor.
        dtype: "fp32" or "bf16"; features of one are not those of the other.

    Raises:
        UserError: no ViT or Swin, or torch-fidelity is not installed.
    """
    where = choose_device(device)
    precision = choose_dtype(dtype, where)
    if named == INCEPTION:
        return _inception(picture, where, precision)
    net = named if isinstance(named, Network) else weights.load(named)
    name = type(net).__name__ if isinstance(named, Network) else str(named)
    if isinstance(net, ViT) and (net.config.class_token or net.config.pool != "attention"):
        layer = "class token" if net.config.class_token else "mean of tokens"
    elif isinstance(net, ViT):
        layer = "pooled by attention"
    elif isinstance(net, Swin) and not net.config.map_norms:
        layer = "mean of the last map"
    else:
        raise UserError(
            f"{name} is a {type(net).__name__}, and features are taken from a ViT or a Swin that classifies, or from "
            f"{INCEPTION!r}; name one of these"
        )
    if net.config.in_channels != 3:
        raise UserError(
            f"{name} sees {net.config.in_channels} channels, and pictures have 3; name a network of color"
        )
    how = net.card.preprocess
    preparation = Preparation(picture=picture, size=how.size, mean=how.mean, std=how.std)
    ready: Any = place_network(net, where, torch.float32)
    return Extractor(
        lambda images: _seen(ready, preprocess_batch(images, how.mean, how.std)), preparation, name=name,
        layer=f"{layer} after the last norm", weights=weights_hash(net), device=where, dtype=precision,
    )  # fmt: skip


def _seen(net: Any, images: Float[Tensor, "b 3 h w"]) -> Extracted:
    """What the last norm gives, as one vector, and logits where there are classes. DINOv2's distance is of the class
    token alone (Stein et al. 2023, Section 3), whatever a head on it reads besides."""
    if isinstance(net, Swin):
        last = net.features(images)[-1].movedim(1, -1)  # b h w D
        features = pooled = net.norm(last).mean((1, 2))
    else:
        z, _, _ = net.encode(images)
        pooled = net.pooled(z)
        features = net.norm(z)[:, 0] if net.config.class_token else pooled
    return Extracted(features, net.head(pooled) if net.config.num_classes else None)


def _inception(picture: tuple[int, int] | None, device: torch.device, dtype: torch.dtype) -> Extractor:
    """torch-fidelity's Inception v3, the network of the original FID, which resizes as TensorFlow 1 did. Pictures
    without a common size are brought to 299 x 299 before, as clean-fid does."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3  # type: ignore
    except ImportError as problem:
        raise UserError(
            f"the extractor {INCEPTION!r} needs torch-fidelity, which is not installed; `{PIP}`, or take --extractor "
            "vit-emoji or another ViT or Swin"
        ) from problem
    try:
        net: Any = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"])
    except OSError as problem:  # urllib's errors are such
        raise UserError(
            f"torch-fidelity cannot fetch Inception's weights ({problem}); connect once, or put its file into "
            f"{Path(torch.hub.get_dir()) / 'checkpoints'}"
        ) from problem
    preparation = Preparation(
        picture=picture,
        size=None if picture is not None else INCEPTION_SIZE,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    net = net.to(device).eval()
    return Extractor(
        lambda images: Extracted(*net(images)), preparation, name=INCEPTION, layer="pool3, 2048 numbers",
        weights=weights_hash(net), device=device, dtype=dtype,
    )  # fmt: skip


def weights_hash(net: nn.Module) -> str:
    """Hexadecimal digits that another network has not: SHA-256 of all its parameters and buffers, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(net.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]
