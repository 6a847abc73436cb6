"""An evaluation of a run leaves out the images that it was trained on, wherever they are now."""

import logging
import shutil

import numpy as np
import pytest
from PIL import Image

import triptych as tp
from triptych.data.manifest import are_trained_on
from triptych.data.open import open_source, train_and_eval
from triptych.training import run


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    """A run on images of three colors, and its data, which is moved after the run."""
    from triptych.data.config import DataConfig
    from triptych.training.configs.base import ClassifyConfig, LoopConfig

    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(image_folder, folder / "photos")
    config = ClassifyConfig(
        data=str(folder / "photos"), model="vit-ti16", model_args=("depth=1", "embed_dim=24", "patch_size=8"),
        image_size=(16, 16), loading=DataConfig(batch_size=8, workers=0, eval_fraction=0.25),
        loop=LoopConfig(epochs=1, precision="fp32", device="cpu"),
    )  # fmt: skip
    run(config, folder / "run")
    held_out = tp.evaluate(folder / "run")
    _, evaluation = train_and_eval(config.data, 0.25, config.loop.seed)
    names = [evaluation[i].id for i in range(len(evaluation))]
    (folder / "photos").rename(folder / "moved")
    return folder, held_out, names


def test_a_moved_folder_is_evaluated_on_the_images_that_were_held_out(trained, caplog):
    folder, held_out, _ = trained
    with caplog.at_level(logging.WARNING):
        result = tp.evaluate(folder / "run", folder / "moved")
    assert result.to_json()["count"] == held_out.to_json()["count"]
    assert np.array_equal(result.confusion, held_out.confusion)
    assert "images, which are left out (include_trained keeps" in caplog.text


def test_images_are_recognized_under_other_names_and_in_tables(trained, tmp_path):
    folder, _, names = trained
    for i, path in enumerate(sorted((folder / "moved").rglob("*.png"))):
        target = tmp_path / "renamed" / path.parent.name
        target.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target / f"{i:03}.png")
    known = are_trained_on(folder / "run" / "examples.json.gz", open_source(str(tmp_path / "renamed")))
    assert known is not None
    assert (~known).sum() == len(names)
    datasets = pytest.importorskip("datasets")
    table = datasets.load_dataset(str(tmp_path / "renamed"), split="train", cache_dir=str(tmp_path / "cache"))
    table.to_parquet(str(tmp_path / "images.parquet"))
    stored = are_trained_on(
        folder / "run" / "examples.json.gz", open_source(str(tmp_path / "images.parquet"))
    )
    assert stored is not None
    assert (~stored).sum() == len(names)


def test_other_images_are_all_evaluated(trained, tmp_path, caplog):
    folder, _, _ = trained
    rng = np.random.default_rng(5)
    for name in ("blue", "green", "red"):
        (tmp_path / "new" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(
                tmp_path / "new" / name / f"{i}.png"
            )
    with caplog.at_level(logging.WARNING):
        assert tp.evaluate(folder / "run", tmp_path / "new").to_json()["count"] == 6
    assert "trained" not in caplog.text


def test_training_images_are_evaluated_if_asked_for_and_if_there_are_no_others(trained, tmp_path, caplog):
    folder, _, names = trained
    total = len(list((folder / "moved").rglob("*.png")))
    assert tp.evaluate(folder / "run", folder / "moved", include_trained=True).to_json()["count"] == total
    for path in (folder / "moved").rglob("*.png"):
        if f"{path.parent.name}/{path.name}" not in {"/".join(name.split("/")[-2:]) for name in names}:
            (tmp_path / "seen" / path.parent.name).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / "seen" / path.parent.name)
    with caplog.at_level(logging.WARNING):
        assert tp.evaluate(folder / "run", tmp_path / "seen").to_json()["count"] == total - len(names)
    assert "was trained on all" in caplog.text


def test_a_run_without_digests_is_evaluated_on_all(trained, tmp_path):
    folder, _, _ = trained
    shutil.copytree(folder / "run", tmp_path / "old")
    (tmp_path / "old" / "examples.json.gz").write_bytes(b"not a manifest")
    total = len(list((folder / "moved").rglob("*.png")))
    assert tp.evaluate(tmp_path / "old", folder / "moved").to_json()["count"] == total


def test_images_over_a_limit_of_pixels_are_refused(trained, tmp_path):
    folder, _, _ = trained
    for name, side in (("blue", 40), ("red", 20)):
        (tmp_path / name).mkdir()
        Image.new("RGB", (side, side), name).save(tmp_path / name / "a.png")
    assert tp.evaluate(folder / "run", tmp_path).to_json()["count"] == 2
    assert tp.evaluate(folder / "run", tmp_path, max_pixels=1000).to_json()["count"] == 1
    with pytest.raises(tp.TriptychError, match=r"a.png has 1,600 pixels, but at most 1,000 are allowed"):
        tp.evaluate(folder / "run", tmp_path, max_pixels=1000, on_bad_image="fail", workers=0)
