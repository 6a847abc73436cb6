"""The commands and examples of docs/guides/export.md, and examples/generate_from_graphs.py."""

import importlib.util
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import triptych as tp

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "guides" / "export.md").read_text(encoding="utf-8")


def export(run, model, out):
    run("-m", "triptych", "export", model, out)


@pytest.mark.slow
def test_the_examples_of_the_guide(run_without_checks, tmp_path, monkeypatch):
    """Its three runtimes agree with the pipeline about an image."""
    for name in ("vit.onnx", "vit.xml", "vit.pt2"):
        assert f"MODEL OUT.{name[4:]}" in GUIDE
        export(run_without_checks, "vit-emoji", tmp_path / name)
    shutil.copy(ROOT / "docs" / "images" / "strawberry.png", tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for example in re.findall(r"^```python\n(.*?)^```", GUIDE, flags=re.DOTALL | re.MULTILINE):
        exec(example, names)
    result = tp.ClassificationPipeline("vit-emoji", dtype="fp32", device="cpu")("strawberry.png", top=1)
    for logits in (names["logits"], names["openvino_logits"], names["pt2_logits"].numpy()):
        np.testing.assert_allclose(logits, names["logits"], atol=1e-3)
        assert names["classes"][logits[0].argmax()] == result[0].name
        probability = np.exp(logits[0] - logits[0].max())
        assert (probability / probability.sum()).max() == pytest.approx(result[0].probability, abs=0.02)


@pytest.mark.slow
def test_the_image_of_the_graphs_is_that_of_the_pipeline(run_without_checks, tmp_path):
    export(run_without_checks, "ldm-emoji", tmp_path / "exported")
    spec = importlib.util.spec_from_file_location("runner", ROOT / "examples" / "generate_from_graphs.py")
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    noise = torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(3))
    image = runner.generate(tmp_path / "exported", "a red apple", "blue", num_steps=8, noise=noise.numpy())
    pipeline = tp.DiffusionPipeline("ldm-emoji", dtype="fp32", device="cpu")
    options = {
        "negative_prompt": "blue",
        "num_steps": 8,
        "seed": 3,
        "sampler": "euler",
        "schedule": "trailing",
    }
    expected = np.asarray(pipeline.text_to_image("a red apple", progress=False, **options)[0])
    assert (
        np.abs(image.astype(int) - expected.astype(int)).max() <= 1
    )  # rounding of fp32 sums in another order
    assert (image != expected).mean() < 0.01


def test_the_runner_inverts_predictions():
    """x0 from what each kind of network predicts of x = alpha x0 + sigma eps."""
    spec = importlib.util.spec_from_file_location("runner", ROOT / "examples" / "generate_from_graphs.py")
    assert spec is not None
    assert spec.loader is not None
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    x0, eps = np.random.default_rng(0).standard_normal((2, 5))
    for prediction, (alpha, sigma) in {
        "eps": (0.8, 0.6),
        "v": (0.6, 0.8),
        "x0": (0.8, 0.6),
        "flow": (0.3, 0.7),
    }.items():
        output = {"eps": eps, "v": alpha * eps - sigma * x0, "x0": x0, "flow": eps - x0}[prediction]
        np.testing.assert_allclose(
            runner.to_x0(prediction, alpha * x0 + sigma * eps, output, alpha, sigma), x0
        )
