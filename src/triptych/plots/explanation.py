"""Every picture of one explanation, by name."""

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from triptych.plots.attention import attention_distance, attention_heads, rollout_overlay
from triptych.plots.embedding import patch_filters, position_similarity


def explanation_figures(
    arrays: Mapping[str, np.ndarray], below: str = "", readout: str = ""
) -> dict[str, Figure]:
    """The figures of an explanation's arrays: rollout, heads, distances, filters, and positions if there are
    any.

    Args:
        arrays: `Explanation.arrays()`, or what `numpy.load` reads from its `explanation.npz`.
        below: a line under the rollout's title, for example the guesses.
        readout: the tokens whose attention the heads show.
    """
    image = arrays["image"]
    blocks = len(arrays["distances"])
    names = [*map(str, range(1, blocks + 1)), "probe"][
        : len(arrays["heads"])
    ]  # attention pooling has one more
    figures = {
        "rollout": rollout_overlay(image, arrays["rollout"], below=below),
        "heads": attention_heads(image, arrays["heads"], readout, names),
        "distances": attention_distance(arrays["distances"], image.shape[:2], arrays["rollout"].shape),
        "filters": patch_filters(arrays["filters"], arrays["filter_share"]),
    }
    if "positions" in arrays:
        figures["positions"] = position_similarity(arrays["positions"])
    return figures
