"""Perceptual distance of two images: LPIPS if its weights are given, else its formula on features of a ViT or Swin."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych import weights
from triptych.errors import CheckpointError
from triptych.evaluation.config import PerceptualConfig
from triptych.heads.segmenter import Segmenter
from triptych.models.swin import Swin
from triptych.models.vit import ViT
from triptych.network import Network

Images = Float[Tensor, "b 3 h w"]
Distance = Callable[[Images, Images], Float[Tensor, "b"]]


def make_distance(config: PerceptualConfig, device: torch.device) -> nn.Module | None:
    """Return the distance of a config, frozen and on the device; None if its weight is 0.

    Raises:
        CheckpointError: the weights cannot be loaded, or the network has no features to compare.
    """
    if not config.weight:
        return None
    if config.vgg is not None:
        from triptych.weights.lpips import load_lpips

        return load_lpips(config.vgg, config.heads).to(device)
    return FeatureDistance(weights.load(config.model)).to(device)


class FeatureDistance(nn.Module):
    """The formula of LPIPS (Zhang et al. 2018, Equation 1) without linear heads: features are scaled to unit length at
    each position, squared differences are summed over channels and averaged over positions and maps.

    The maps are all maps of a Swin; the outputs of the blocks at a quarter and at half of the depth of a ViT; or, with
    a convolutional stem, the maps of the stem and the output of the block at a quarter. Later blocks are not computed.

    Args:
        net: a ViT, a Swin, or a segmenter with one as backbone; it gets frozen. Images are resized and normalized as
            its card says.
    """

    def __init__(self, net: Network):
        super().__init__()
        preprocess = net.card.preprocess
        backbone = net.backbone if isinstance(net, Segmenter) else net
        if not isinstance(backbone, ViT | Swin):
            raise CheckpointError(
                f"{type(net).__name__} has no features to compare images by; name a ViT or a Swin, such as vit-emoji"
            )
        self.blocks: list[int] | None = None
        self.steps: list[nn.Module] = []
        if isinstance(backbone, ViT):
            depth = len(backbone.encoder)
            layers = getattr(backbone.stem, "layers", ())
            self.steps = [layer for layer in layers if isinstance(layer, nn.GELU)]
            shares = (4,) if self.steps else (4, 2)
            self.blocks = sorted({max(1, depth // share) - 1 for share in shares})
            backbone.encoder = backbone.encoder[: self.blocks[-1] + 1]
        self.net = backbone.float().eval().requires_grad_(False)
        self.size = preprocess.size
        self.mean: Tensor
        self.std: Tensor
        for name, value in (("mean", preprocess.mean), ("std", preprocess.std)):
            self.register_buffer(name, torch.tensor(value)[:, None, None])

    def features(self, images: Images) -> list[Float[Tensor, "b c rows columns"]]:
        """Return the compared maps of images in [-1, 1]."""
        x = (images + 1) / 2
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, size=self.size, mode="bicubic", antialias=True)
        x = (x - self.mean) / self.std
        maps: list[Tensor] = []
        hooks = [step.register_forward_hook(lambda *args: maps.append(args[-1])) for step in self.steps]
        net: Any = self.net
        try:
            last = net.features(x) if self.blocks is None else self._blocks(net, x)
        finally:
            for hook in hooks:
                hook.remove()
        return [*maps, *last]

    def _blocks(self, net: ViT, x: Images) -> list[Tensor]:
        _, outputs, (h, w) = net.encode(x, self.blocks or ())
        return [net.norm(z)[:, net.config.prefix :].transpose(1, 2).unflatten(2, (h, w)) for z in outputs]

    def forward(self, images: Images, others: Images) -> Float[Tensor, "b"]:
        """Return the distance of each pair of images in [-1, 1], from 0 to 4."""
        pairs = zip(self.features(images), self.features(others), strict=True)
        # |x - y|^2 = 2 - 2 x y for unit vectors, in half the passes over memory.
        distances = [2 - 2 * F.cosine_similarity(x.float(), y.float(), dim=1).mean((1, 2)) for x, y in pairs]
        return torch.stack(distances).mean(0)
