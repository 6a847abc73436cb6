"""A torchvision that does not fit torch, next to which the commands must work: a package of that name that raises at
import, first on the path of a process of its own."""

import os
import subprocess
import sys

import pytest

UNFIT = {
    "an operator is missing": "raise RuntimeError('operator torchvision::nms does not exist')",
    "a library cannot be loaded": "raise OSError('libcudart.so.12: cannot open shared object file')",
    "a name is missing": "from torch import a_name_of_another_version",
}


@pytest.fixture(params=UNFIT, ids=list(UNFIT))
def run(request, tmp_path):
    return runner(UNFIT[request.param], tmp_path)


def runner(code, tmp_path):
    """Return a function that runs Python with an unfit torchvision, which pip lists as installed."""
    place = tmp_path / "site"
    (place / "torchvision").mkdir(parents=True)
    (place / "torchvision" / "__init__.py").write_text(code)
    (place / "torchvision-0.28.0.dist-info").mkdir()
    (place / "torchvision-0.28.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torchvision\nVersion: 0.28.0\n"
    )

    def call(*arguments):
        path = os.pathsep.join([str(place), *filter(None, [os.environ.get("PYTHONPATH")])])
        return subprocess.run(
            [sys.executable, *arguments],
            env=os.environ | {"PYTHONPATH": path},
            capture_output=True,
            text=True,
        )

    return call


CODE = """
import sys, warnings
try:
    import torchvision
except Exception:
    pass
else:
    raise SystemExit("the package is not first on the path")
import triptych.metrics.classification, triptych.metrics.reconstruction, triptych.metrics.generation
from torchmetrics import Metric
assert issubclass(triptych.metrics.classification.ClassificationMetrics, Metric)
assert not [name for name in sys.modules if name.partition(".")[0] == "torchvision"]
"""


def test_metrics_import_next_to_an_unfit_torchvision(run):
    result = run("-c", CODE)
    assert result.returncode == 0, result.stderr


def test_train_and_evaluate_run_next_to_an_unfit_torchvision(tmp_path, color_images):
    run = runner(UNFIT["an operator is missing"], tmp_path)
    out = tmp_path / "run"
    data = str(color_images)
    small = [
        "--model-args",
        "patch_size=8",
        "embed_dim=16",
        "depth=1",
        "num_heads=1",
        "--image-size",
        "16",
        "16",
    ]
    line = ["train", "vit", "--data", data, "--out", str(out), "--loop.epochs", "1", *small]
    trained = run("-m", "triptych", *line)
    assert trained.returncode == 0, trained.stderr
    evaluated = run("-m", "triptych", "evaluate", str(out), "--json")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "top1" in evaluated.stdout
