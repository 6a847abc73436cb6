"""Measure an autoencoder: the error of its reconstructions, their distance as a set, and the use of its codebook."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from triptych.data.augment.batch import preprocess_batch
from triptych.data.config import DataConfig
from triptych.data.example import Batch
from triptych.data.loading.loader import make_loader
from triptych.data.source import Source
from triptych.distributed import SINGLE_PROCESS, ProcessGroup
from triptych.errors import DataError
from triptych.evaluation.config import PerceptualConfig
from triptych.evaluation.feature_extractor import Extractor, open_extractor, to_uint8
from triptych.evaluation.latent_statistics import LatentMoments, LatentNormalization
from triptych.evaluation.perceptual_distance import make_distance
from triptych.evaluation.results import ReconstructionResult
from triptych.evaluation.runtime import Runtime
from triptych.metrics.frechet_distance import Moments, frechet_distance
from triptych.metrics.generation import GenerationMetrics, Statistics
from triptych.metrics.kernel_distance import kernel_distance
from triptych.metrics.reconstruction import ReconstructionMetrics
from triptych.models.autoencoder import Autoencoder, FirstStage
from triptych.network import Network

Images = Float[Tensor, "b 3 h w"]

NUM_EXAMPLES = 8  # images that are returned with their reconstructions


@dataclass(frozen=True, eq=False, kw_only=True)
class Reconstructions:
    """What `measure_reconstruction` returns."""

    metrics: dict[str, float]
    """Metrics of `ReconstructionMetrics`; with an extractor, those of `ReconstructionDistance`; for a VQ autoencoder,
    "perplexity" and "codes_used", the fraction of the codebook's entries that are used."""
    examples: tuple[Images, Images] | None
    """The first images in [-1, 1] and their reconstructions, on the CPU; None in a process that got no image."""
    normalization: LatentNormalization
    """Scale and shift that give the latents mean 0 and variance 1."""


@torch.no_grad()
def measure_reconstruction(
    net: FirstStage,
    batches: Iterable[Batch],
    *,
    distance: nn.Module | None = None,
    extractor: Extractor | None = None,
    per_channel: bool = False,
    group: ProcessGroup = SINGLE_PROCESS,
) -> Reconstructions:
    """Measure reconstructions from the posterior's mean.

    Args:
        net: on its device; its card says how images are normalized.
        batches: as `make_loader(..., train=False)` yields them.
        distance: distance of image and reconstruction, for the metric "perceptual" (`make_distance`).
        extractor: compares images and reconstructions as two sets of features (`ReconstructionDistance`).
        per_channel: measure the normalization of latents for each channel, instead of one number for all.
        group: processes that each pass a part of the batches; what is measured is gathered over all of them.

    Raises:
        DataError: no image could be read.
    """
    accumulator, moments = ReconstructionMetrics(distance), LatentMoments(net)
    accumulator.dist_sync_fn = group.gather_tensors
    set_distance = None if extractor is None else ReconstructionDistance(extractor, group)
    device = next(net.parameters()).device
    preprocess, examples = net.card.preprocess, None
    vq = net if isinstance(net, Autoencoder) and net.config.regularization == "vq" else None
    used = torch.zeros(0 if vq is None else vq.config.codebook_size, device=device)
    for batch in batches:
        images = preprocess_batch(
            batch["image"].to(device), preprocess.mean, preprocess.std, preprocess.background
        )
        net._check_images(images)
        embedded = net.embed(images)
        moments.update(embedded)
        latents = net.scaled(net.draw(embedded)).float()
        reconstructions = net.decode(latents).float()
        accumulator.update(images, reconstructions)
        if set_distance is not None:
            set_distance.update(images, reconstructions)
        if vq is not None:
            used += torch.bincount(vq.quantize(latents)[1].flatten(), minlength=len(used))
        if examples is None:
            examples = images[:NUM_EXAMPLES].cpu(), reconstructions[:NUM_EXAMPLES].cpu()
    if not any(group.all_gather(examples is not None)):
        raise DataError(
            "no held-out image could be measured, since all are damaged or smaller than the crop; use other images, or "
            "a smaller crop"
        )
    moments.pool(group)
    metrics = accumulator.compute() | ({} if set_distance is None else set_distance.compute())
    if vq is not None:
        used = torch.stack(group.all_gather(used.cpu())).sum(0)
        metrics["perplexity"] = float(perplexity(used))
        metrics["codes_used"] = float((used > 0).float().mean())
    return Reconstructions(metrics=metrics, examples=examples, normalization=moments.compute(per_channel))


def evaluate_autoencoder(
    net: FirstStage,
    source: Source,
    loading: DataConfig,
    runtime: Runtime,
    *,
    perceptual: PerceptualConfig | None = None,
    extractor: str | Network = "vit-emoji",
    enlarge: bool = False,
) -> ReconstructionResult:
    """Evaluate the reconstructions of an autoencoder.

    Args:
        perceptual: the perceptual distance; None is `PerceptualConfig()`.
        extractor: network in whose features images and reconstructions are compared as sets; see `open_extractor`.
        enlarge: enlarge images that are smaller than the network's size, instead of leaving them out as damaged.

    Raises:
        CheckpointError: the extractor cannot be opened.
        DataError: no image can be read.
    """
    preprocess = net.card.preprocess
    loader = make_loader(
        source, loading, preprocess, train=False, min_size=None if enlarge else preprocess.size
    )
    features = open_extractor(extractor, image_size=preprocess.size, device=runtime.device)
    distance = make_distance(perceptual or PerceptualConfig(), runtime.device)
    net = replace(runtime, compile=False).place(net)
    with runtime.autocast():
        result = measure_reconstruction(
            net, runtime.batches(loader, len(source)), distance=distance, extractor=features
        )
    return ReconstructionResult(
        **result.metrics,  # type: ignore[arg-type]
        extractor=features.name,
        identity=features.identity,
        bad=dict(loader.bad),
    )


class ReconstructionDistance:
    """Distance between reconstructions and images as two sets of features: rFID, in the features of any extractor. It
    measures textures, which PSNR does not.

    Args:
        extractor: from `open_extractor`.
        group: processes that each update with a part of the images.
    """

    def __init__(self, extractor: Extractor, group: ProcessGroup = SINGLE_PROCESS) -> None:
        self.extractor, self.metrics, self.group = extractor, GenerationMetrics(extractor), group

    def update(self, images: Images, reconstructions: Images) -> None:
        """Add images in [-1, 1] and their reconstructions. Both are rounded to 8 bits."""
        for batch, real in ((images, True), (reconstructions, False)):
            self.metrics.update(self.extractor.prepare(to_uint8(batch)), real=real)

    def compute(self) -> dict[str, float]:
        """Return "frechet" and "kernel", the Fréchet and the exact kernel distance; an empty dict for a single pair.

        The Fréchet distance has no floor here, since the sets are paired: for perfect reconstructions it is 0 at any
        count, and the kernel distance is below 0.
        """
        reconstructions, images = (self._statistics(real) for real in (False, True))
        if images.moments.count < 2:
            return {}
        return {
            "frechet": frechet_distance(images.moments, reconstructions.moments),
            "kernel": kernel_distance(images.features, reconstructions.features),
        }

    def _statistics(self, real: bool) -> Statistics:
        """Return the statistics of images or reconstructions over all processes, some of which may have no image."""
        if self.group.size == 1:
            return self.metrics.sides[real].compute()
        own = self.metrics.sides.get(real)
        gathered = self.group.all_gather([] if own is None else [part.cpu() for part in own.feature_batches])
        features = torch.cat([part for parts in gathered for part in parts])
        return Statistics(Moments.of(features), features)


def perplexity(used: Float[Tensor, "k"]) -> Float[Tensor, ""]:
    """The perplexity of a codebook: the exponential of the entropy of how often each entry is used.

    A codebook of which n entries are used equally often has perplexity n.
    """
    share = used / used.sum().clamp(min=1)
    return torch.exp(-torch.special.xlogy(share, share).sum())
