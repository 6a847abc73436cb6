"""Rare classes: weights in the loss against PyTorch's, balanced sampling, and evaluations that name what they lack."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import triptych as tp
from triptych.data.config import AugmentConfig, DataConfig
from triptych.data.loading.batch_order import BalancedOrder
from triptych.data.open import open_source, train_and_eval
from triptych.errors import ConfigError, DataError
from triptych.model_card import ModelCard, Preprocess
from triptych.training import run
from triptych.training.configs.base import ClassifyLossConfig, LossConfig
from triptych.training.runner import prepare
from triptych.training.tasks.class_weights import count_pixels, read_class_weights
from triptych.training.tasks.classification import Classify
from triptych.training.tasks.segmentation import pixel_loss

PLAIN = AugmentConfig(image_size=(4, 4), crop_scale=(1, 1), flip=0, random_background=0, mixup=0.5)


def write_folder(folder, counts):
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 255, (16, 16, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def test_a_rare_class_is_evaluated(tmp_path, config):
    folder = write_folder(tmp_path / "data", {"common": 100, "rare": 2})
    train, held_out = train_and_eval(str(folder))
    assert np.bincount(held_out.labels, minlength=2).tolist()[1] == 1
    assert (train.labels == 1).sum() == 1
    short = replace(config, data=str(folder), loop=replace(config.loop, epochs=0.2))
    assert run(short, tmp_path / "run").finished
    result = tp.evaluate(tmp_path / "run", workers=0)
    assert result.per_class_count[1] == 1
    assert result.mean_per_class == pytest.approx(result.per_class.mean())


def test_unmeasured_classes_are_named(tmp_path, config, caplog):
    folder = write_folder(tmp_path / "data", {"a": 9, "b": 9, "single": 1})
    short = replace(config, data=str(folder), loop=replace(config.loop, epochs=1))
    with caplog.at_level(logging.WARNING):
        assert run(short, tmp_path / "run").finished
    note = "1 of 3 classes do not occur in the data and are not measured: single"
    assert f"evaluation: {note}" in caplog.messages
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        result = tp.evaluate(tmp_path / "run", workers=0)
    assert note in caplog.messages
    assert result.mean_per_class == pytest.approx(np.nanmean(result.per_class))


@pytest.mark.parametrize("loss", ["cross_entropy", "binary"])
def test_the_weighted_loss_is_that_of_pytorch(loss):
    weights = torch.tensor([0.5, 3.0, 1.0])
    card = ModelCard(preprocess=Preprocess(size=(4, 4)))
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(48, 3))
    images = torch.randint(0, 255, (6, 3, 4, 4), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 1])
    config = replace(PLAIN, mixup=0.0)
    batch = {"image": images, "label": labels, "seed": (0, 0, 0), "aspect": torch.ones(6)}
    inputs = (images / 255 - torch.tensor(config.mean)[:, None, None]) / torch.tensor(config.std)[
        :, None, None
    ]
    targets = F.one_hot(labels, 3).float()
    ours = Classify(config, card, 3, loss, class_weights=weights).loss(net, batch).loss
    if loss == "binary":
        want = F.binary_cross_entropy_with_logits(net(inputs), targets, weight=weights, reduction="sum") / 6
    else:
        want = F.cross_entropy(net(inputs), targets, weight=weights)
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("smooth", [0.0, 0.2])
def test_the_weighted_loss_of_pixels_is_that_of_pytorch(smooth):
    logits = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    masks = torch.randint(0, 4, (2, 5, 6))
    masks[0, 0] = 255
    weights = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)
    ours = pixel_loss(logits, masks, LossConfig(label_smoothing=smooth), weights)
    want = F.cross_entropy(logits, masks, weights, ignore_index=255, label_smoothing=smooth)
    torch.testing.assert_close(ours, want)


def test_balanced_weights_are_those_of_scikit_learn():
    # compute_class_weight("balanced") is n / (k * counts), which weights the data to n in total.
    counts = np.array([100, 2, 10])
    weights = read_class_weights("balanced", ("a", "b", "c"), lambda: counts)
    np.testing.assert_allclose(weights, 112 / (3 * counts), rtol=1e-6)
    assert float((weights * torch.tensor(counts)).sum()) == pytest.approx(112)
    assert read_class_weights("none", ("a",), lambda: counts) is None
    assert read_class_weights("balanced", ("a", "b"), lambda: np.array([4, 0])).tolist() == [1, 0]


def test_weights_from_files(tmp_path):
    def read(name, text, classes=("cat", "dog")):
        (tmp_path / name).write_text(text)
        return read_class_weights(str(tmp_path / name), classes, lambda: np.zeros(2, int)).tolist()

    assert read("a.json", json.dumps({"dog": 2, "cat": 0.5})) == [0.5, 2]
    assert read("b.json", "[1, 3]") == [1, 3]
    assert read("c.csv", "class,weight\ndog,2\ncat,0.5\n") == [0.5, 2]
    assert read("d.csv", '"cat",1\n\ndog,4') == [1, 4]
    for name, text, message in (
        ("e.csv", "cat,1", "lacks a weight for 'dog'; give each of the 2 classes"),
        ("f.csv", "cat,1\ndog,1\ncow,1", "names 'cow', which is no class"),
        ("g.csv", "cat,1\ndog,-1", "gives 'dog' the weight -1.0; give a positive"),
        ("h.json", '{"cat": NaN, "dog": 1}', "gives 'cat' the weight nan"),
        ("i.json", "[1]", "cannot be read as class weights"),
        ("j.csv", "cat;1\ndog;2", "cannot be read as class weights"),
        ("k.json", "{", "cannot be read as class weights"),
    ):
        with pytest.raises(DataError, match=message):
            read(name, text)
    with pytest.raises(DataError, match="balance', which is no file; give balanced, none or a file"):
        read_class_weights("balance", ("a",), lambda: np.ones(1, int))


def test_pixels_are_counted(tmp_path):
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    for i in range(3):
        Image.new("RGB", (4, 4)).save(tmp_path / "images" / f"{i}.png")
        mask = np.zeros((4, 4), np.uint8)
        mask[0], mask[1, : i + 1] = 255, 1
        Image.fromarray(mask).save(tmp_path / "masks" / f"{i}.png")
    (tmp_path / "classes.txt").write_text("ground\nsquare\n")
    assert count_pixels(open_source(str(tmp_path))).tolist() == [36 - 6, 6]


def test_balanced_order():
    labels = np.repeat([0, 1, 2], [90, 2, 28])
    order = BalancedOrder(labels, 16, seed=3)
    assert len(order) == 120 // 16
    rows = np.concatenate(list(order.batches(0)))
    assert np.array_equal(rows, np.concatenate(list(order.batches(0))))
    assert not np.array_equal(rows, np.concatenate(list(order.batches(1))))
    assert not np.array_equal(rows, np.concatenate(list(BalancedOrder(labels, 16, seed=4).batches(0))))
    full = np.concatenate(list(BalancedOrder(labels, 120, seed=3).batches(5)))
    assert np.bincount(labels[full]).tolist() == [40, 40, 40]
    repeats = np.bincount(full, minlength=120)
    assert (repeats[:90] <= 1).all()
    assert (repeats[90:92] == 20).all()
    assert set(repeats[92:]) == {1, 2}


def test_balanced_sampling_and_weights_in_a_run(tmp_path, config):
    folder = write_folder(tmp_path / "data", {"common": 30, "rare": 4})
    loading = replace(config.loading, sampling="balanced")
    config = replace(
        config, data=str(folder), loading=loading, loss=ClassifyLossConfig(class_weights="balanced")
    )
    built = prepare(config)
    seen = torch.cat([batch["label"] for batch in built.train_loader])
    assert abs(seen.float().mean() - 0.5) < 0.2
    assert built.task.class_weights[1] > built.task.class_weights[0]
    with pytest.raises(ConfigError, match="sampling is balanced, which must be shuffled with stream"):
        DataConfig(sampling="balanced", stream=True)
