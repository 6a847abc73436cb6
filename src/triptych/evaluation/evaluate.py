"""Evaluate a classifier, a segmenter or an autoencoder on data."""

from triptych.data.config import DataConfig
from triptych.data.loading.test_time_views import ViewOptions
from triptych.data.source import Source
from triptych.errors import ConfigError
from triptych.evaluation.classification import evaluate_classifier
from triptych.evaluation.config import PerceptualConfig
from triptych.evaluation.reconstruction import evaluate_autoencoder
from triptych.evaluation.results import ClassificationResult, ReconstructionResult, SegmentationResult
from triptych.evaluation.runtime import Runtime
from triptych.evaluation.segmentation import evaluate_segmenter
from triptych.heads.segmenter import Segmenter
from triptych.models.autoencoder import FirstStage
from triptych.network import Network


def evaluate_network(
    net: Network,
    source: Source,
    loading: DataConfig | None = None,
    runtime: Runtime | None = None,
    *,
    passes: ViewOptions | None = None,
    perceptual: PerceptualConfig | None = None,
    extractor: str | Network | None = None,
    enlarge: bool = False,
    name: str = "the data",
) -> ClassificationResult | SegmentationResult | ReconstructionResult:
    """Evaluate a network on all images of a source.

    Args:
        net: a classifier, a segmenter or an autoencoder.
        source: labeled images, images with masks, or any images.
        loading: batch size, worker processes, what to do about damaged images.
        runtime: device and precision; None chooses the fastest.
        passes: for a segmenter, as in `evaluate_segmenter`.
        perceptual, extractor, enlarge: for an autoencoder, as in `evaluate_autoencoder`.
        name: name of the data, for messages.

    Raises:
        ConfigError: an option does not apply to this type of network.
        DataError: the data does not fit the network, or none of its images can be read.
    """
    check_options(net, passes, extractor)
    loading, runtime = loading or DataConfig(), runtime or Runtime.choose()
    if isinstance(net, FirstStage):
        return evaluate_autoencoder(
            net,
            source,
            loading,
            runtime,
            perceptual=perceptual,
            extractor=extractor or "vit-emoji",
            enlarge=enlarge,
        )
    if isinstance(net, Segmenter):
        return evaluate_segmenter(net, source, loading, runtime, passes, name)
    return evaluate_classifier(net, source, loading, runtime, name)


def check_options(net: Network, passes: ViewOptions | None, extractor: str | Network | None) -> None:
    """Raise an error for options that do not apply to the type of the network.

    Raises:
        ConfigError: `passes` without a segmenter, or `extractor` without an autoencoder.
    """
    if passes is not None and not isinstance(net, Segmenter):
        raise ConfigError(
            f"{type(net).__name__} is not a segmenter, and only segmenters take a size, window, scales or flip; leave "
            "them out"
        )
    if extractor is not None and not isinstance(net, FirstStage):
        raise ConfigError(
            f"{type(net).__name__} generates no images to compare in the features of an extractor; leave it out"
        )
