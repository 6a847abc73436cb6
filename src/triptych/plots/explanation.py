"""Every image of one explanation, by name."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from triptych.plots.attention import attention_distance, attention_heads, rollout_overlay
from triptych.plots.embedding import patch_filters, position_similarity
from triptych.plots.swin_attention import gathered, point_attention
from triptych.plots.swin_pyramid import feature_pyramid


def explanation_figures(
    arrays: Mapping[str, np.ndarray], below: str = "", readout: str = ""
) -> dict[str, Figure]:
    """The figures of an explanation's arrays. Of a ViT: rollout, heads, distances, filters, and positions if there are
    any. Of a Swin: point, rollout, pyramid, filters.

    Args:
        arrays: `Explanation.arrays()` or `SwinExplanation.arrays()`, or what `numpy.load` reads from
            `explanation.npz`.
        below: a line under the rollout's title, for example the guesses.
        readout: what the rollout leads to; of a ViT, the tokens whose attention the heads show.
    """
    return (_of_a_swin if "windows" in arrays else _of_a_vit)(arrays, below, readout)


def _of_a_vit(arrays: Mapping[str, np.ndarray], below: str, readout: str) -> dict[str, Figure]:
    image = arrays["image"]
    blocks = len(arrays["distances"])
    # Attention pooling has one more.
    names = [*map(str, range(1, blocks + 1)), "probe"][: len(arrays["heads"])]
    figures = {
        "rollout": rollout_overlay(image, arrays["rollout"], below=below),
        "heads": attention_heads(image, arrays["heads"], readout, names),
        "distances": attention_distance(arrays["distances"], image.shape[:2], arrays["rollout"].shape),
        "filters": patch_filters(arrays["filters"], arrays["filter_share"]),
    }
    if "positions" in arrays:
        figures["positions"] = position_similarity(arrays["positions"])
    return figures


def _of_a_swin(arrays: Mapping[str, np.ndarray], below: str, readout: str) -> dict[str, Figure]:
    image, point, strides = arrays["image"], arrays["point"], arrays["strides"]

    def stages(name: str) -> list[np.ndarray]:
        return [arrays[f"{name}_{s}"] for s in range(1, len(strides) + 1)]

    return {
        "point": point_attention(
            image, stages("attention"), arrays["windows"], arrays["shifts"], strides, point
        ),
        "rollout": gathered(image, arrays["rollout"], arrays["point_rollout"], point, readout, below=below),
        "pyramid": feature_pyramid(image, stages("colors"), stages("norms"), arrays["share"], strides),
        "filters": patch_filters(arrays["filters"], arrays["filter_share"]),
    }
