"""How different two pictures look: LPIPS where its weights are at hand, else the same formula in the features of a ViT
or a Swin of this package."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from triptych import weights
from triptych.errors import UserError
from triptych.evaluation.config import PerceptualConfig
from triptych.heads.segmenter import Segmenter
from triptych.models.swin import Swin
from triptych.models.vit import ViT
from triptych.network import Network

Images = Float[Tensor, "b 3 h w"]
Distance = Callable[[Images, Images], Float[Tensor, "b"]]


def make_distance(config: PerceptualConfig, device: torch.device) -> nn.Module | None:
    """The distance that the config names, frozen, on the device; none where its weight is 0.

    Raises:
        UserError: no such weights, or a network that has no features to compare.
    """
    if not config.weight:
        return None
    if config.vgg is not None:
        from triptych.weights.lpips import load_lpips

        return load_lpips(config.vgg, config.heads).to(device)
    return FeatureDistance(weights.load(config.model)).to(device)


class FeatureDistance(nn.Module):
    """LPIPS's formula (Zhang et al. 2018, Equation 1) without its heads: features of unit length at each place, squared
    differences summed over channels, averaged over places and maps.

    Compared are all maps of a Swin; of a ViT the blocks' at a quarter and at half of its depth, or after a
    convolutional stem the maps of its steps and the block's at a quarter. The rest is not computed.

    Args:
        net: a ViT, a Swin, or a segmenter on one; frozen. Pictures are resized and normalised as its card says.
    """

    def __init__(self, net: Network):
        super().__init__()
        how = net.card.preprocess
        backbone = net.backbone if isinstance(net, Segmenter) else net
        if not isinstance(backbone, ViT | Swin):
            raise UserError(
                f"{type(net).__name__} has no features to compare pictures by; name a ViT or a Swin, such as vit-emoji"
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
        self.size = how.size
        self.mean: Tensor
        self.std: Tensor
        for name, value in (("mean", how.mean), ("std", how.std)):
            self.register_buffer(name, torch.tensor(value)[:, None, None])

    def features(self, images: Images) -> list[Float[Tensor, "b c rows columns"]]:
        """The maps, of images in [-1, 1]."""
        x = (images + 1) / 2
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, size=self.size, mode="bicubic", antialias=True)
        x = (x - self.mean) / self.std
        maps: list[Tensor] = []
        hooks = [step.register_forward_hook(lambda *given: maps.append(given[-1])) for step in self.steps]
        net: Any = self.net
        try:
            last = net.features(x) if self.blocks is None else self._blocks(net, x)
        finally:
            for hook in hooks:
                hook.remove()
        return [*maps, *last]

    def _blocks(self, net: ViT, x: Images) -> list[Tensor]:
        _, kept, (h, w) = net.encode(x, self.blocks or ())
        return [net.norm(z)[:, net.config.prefix :].transpose(1, 2).unflatten(2, (h, w)) for z in kept]

    def forward(self, images: Images, others: Images) -> Float[Tensor, "b"]:
        """The distance of each pair of images in [-1, 1]; from 0 to 4."""
        pairs = zip(self.features(images), self.features(others), strict=True)
        # |x - y|^2 = 2 - 2 x y of unit vectors: half the passes over memory.
        each = [2 - 2 * F.cosine_similarity(x.float(), y.float(), dim=1).mean((1, 2)) for x, y in pairs]
        return torch.stack(each).mean(0)
