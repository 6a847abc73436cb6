"""torchmetrics, also next to a torchvision that does not fit torch, see `triptych.torchvision_placeholders`.

Metrics here import torchmetrics' names from this module.
"""

import importlib

from triptych.errors import ConfigError
from triptych.torchvision_placeholders import first_line, import_without_torchvision

try:
    importlib.import_module("torchmetrics")
except Exception as problem:  # RuntimeError, OSError, ImportError: what a build for another torch raises
    try:
        import_without_torchvision("torchmetrics")
    except Exception:
        raise ConfigError(
            f"torchmetrics cannot be imported: {first_line(problem)}; install versions that fit each other"
        ) from problem

from torchmetrics import Metric as Metric
from torchmetrics.functional.image import (
    structural_similarity_index_measure as structural_similarity_index_measure,
)
from torchmetrics.utilities.data import dim_zero_cat as dim_zero_cat
