"""Networks of images with other numbers of bands than 1 and 3: trained, resumed, evaluated and used alike."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training.interrupted_runs import interrupt_after, last_checkpoint

import triptych as tp
from triptych.data.augment.batch import augment, preprocess_batch
from triptych.data.bands import ReadOptions
from triptych.data.config import AugmentConfig, DataConfig
from triptych.data.images import decode
from triptych.data.resizing import resize_crop
from triptych.errors import CheckpointError, ConfigError, DataError
from triptych.heads.config import HeadConfig
from triptych.model_card import Preprocess
from triptych.pipelines.image_input import batched
from triptych.training import run
from triptych.training.configs.base import LoopConfig, LossConfig, OptimConfig, SegmentConfig
from triptych.training.tasks.classification import build_network

tifffile = pytest.importorskip("tifffile")


def write_bands(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig")


@pytest.fixture
def band_folder(tmp_path):
    """Images of five bands of 16 bits: only the last one differs between the classes."""
    rng = np.random.default_rng(0)
    for name, level in (("dry", 8000), ("wet", 56000)):
        for i in range(16):
            values = rng.integers(0, 65536, (16, 16, 5)).astype(np.uint16)
            values[..., 4] = rng.normal(level, 2000, (16, 16)).clip(0, 65535)
            write_bands(tmp_path / "data" / name / f"{i}.tif", values)
    return tmp_path / "data"


@pytest.mark.parametrize("count", [2, 4, 5, 13])
def test_all_paths_normalize_alike(count):
    images = torch.randint(0, 256, (3, count, 8, 8), dtype=torch.uint8)
    mean, std = tuple(np.linspace(0.2, 0.6, count).tolist()), (0.2,) * count
    plain = AugmentConfig(image_size=(8, 8), crop_scale=(1, 1), flip=0, mean=mean, std=std)
    expected = (images / 255 - torch.tensor(mean)[:, None, None]) / 0.2
    pixels = list(images.permute(0, 2, 3, 1).numpy())
    card = Preprocess(size=(8, 8), mean=mean, std=std, bands=tuple(range(count)))
    torch.testing.assert_close(augment(images, None, plain, 0)[0], expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(preprocess_batch(images, mean, std), expected)
    torch.testing.assert_close(batched(pixels, card, channels=count), expected)


def test_all_augmentations_run():
    images, labels = torch.randint(0, 256, (4, 4, 9, 9), dtype=torch.uint8), torch.arange(4) % 2
    config = AugmentConfig(
        image_size=(8, 8), mean=(0.5,) * 4, std=(0.5,) * 4, brightness=0.4, hue=0.1, grayscale=0.5, rand_augment=2,
        erasing=1.0, mixup=0.8, cutmix=1.0,
    )  # fmt: skip
    x, targets = augment(images, labels, config, 0, num_classes=2)
    assert x.shape == (4, 4, 8, 8)
    assert targets is not None
    assert x.isfinite().all()


def test_four_bands_are_not_colors_with_alpha(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (12, 10, 4)).astype(np.uint8)
    write_bands(tmp_path / "a.tif", values)
    Image.fromarray(values).save(tmp_path / "a.png")
    options = ReadOptions(bands=(0, 1, 2, 3))
    for source in (tmp_path / "a.tif", tmp_path / "a.png", values):
        np.testing.assert_array_equal(decode(source, options=options), values)
    small = resize_crop(values, (6, 5), mode="squash", multiband=True)
    for band in range(4):
        np.testing.assert_array_equal(small[..., band], Image.fromarray(values[..., band]).resize((5, 6), 3))
    with pytest.raises(DataError, match=r"a.png has 4 bands, and band 4 is requested"):
        decode(tmp_path / "a.png", options=ReadOptions(bands=(0, 1, 2, 3, 4)))


def test_a_classifier(config, band_folder, tmp_path):
    loop = replace(config.loop, epochs=12)
    config = replace(config, data=str(band_folder), in_channels=5, loop=loop)
    assert run(config, tmp_path / "run").finished
    net = tp.load(tmp_path / "run")
    assert net.config.in_channels == len(net.card.preprocess.mean) == 5
    assert net.card.preprocess.bands == (0, 1, 2, 3, 4)
    assert tp.evaluate(tmp_path / "run", str(band_folder), workers=0).to_json()["top1"] == 1
    pipe = tp.ClassificationPipeline(net, device="cpu")
    assert pipe(str(band_folder / "wet" / "3.tif"))[0].name == "wet"


def test_a_segmenter_that_is_interrupted_and_resumed(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    (tmp_path / "data" / "masks").mkdir(parents=True)
    for i in range(20):
        values = rng.integers(0, 65536, (32, 32, 5)).astype(np.uint16)
        mask = np.zeros((32, 32), np.uint8)
        y, x = rng.integers(2, 16, 2)
        mask[y : y + 12, x : x + 12] = 1
        values[..., 4] = np.where(mask, 56000, 8000)
        write_bands(tmp_path / "data" / "images" / f"{i}.tif", values)
        Image.fromarray(mask).save(tmp_path / "data" / "masks" / f"{i}.png")
    config = SegmentConfig(
        data=str(tmp_path / "data"),
        model="swin-emoji",
        model_args=(
            "embed_dim=16", "depths=[1,2]", "num_heads=[1,2]", "window_size=4", "stem_widths=[8]", "patch_size=2",
        ),
        in_channels=5,
        image_size=(32, 32),
        head=HeadConfig(type="unet", channels=16, image_branch_channels=8, aux_channels=8),
        loss=LossConfig(dice=0.5),
        loading=DataConfig(batch_size=4, workers=0, eval_fraction=0.2),
        augment=AugmentConfig(crop_scale=(0.7, 1.0), brightness=0.1),
        optim=OptimConfig(lr=1e-2, warmup=0.1),
        loop=LoopConfig(epochs=10, ema=0.0, precision="fp32", device="cpu"),
    )  # fmt: skip
    run(config, tmp_path / "full")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        assert not run(config, tmp_path / "cut").finished
    assert run(config, tmp_path / "cut").finished
    (full, _), (cut, _) = last_checkpoint(tmp_path / "full"), last_checkpoint(tmp_path / "cut")
    assert all(torch.equal(full[name], cut[name]) for name in full)
    metrics = tp.evaluate(tmp_path / "cut", str(tmp_path / "data"), workers=0).to_json()
    assert metrics["miou"] > 0.95
    result = tp.SegmentationPipeline(tmp_path / "cut", device="cpu")(tmp_path / "data" / "images" / "0.tif")
    truth = np.asarray(Image.open(tmp_path / "data" / "masks" / "0.png"))
    assert (result.labels == truth).mean() > 0.95
    assert result.overlay() is not None


def test_weights_are_repeated(config):
    config = replace(
        config, init="vit-emoji", model_args=(), drop_path_rate=None, image_size=None, in_channels=5
    )
    net = build_network(config, ("a", "b"), {})
    old, mean = tp.load("vit-emoji"), net.card.preprocess.mean
    first = next(name for name, value in old.stem.state_dict().items() if value.ndim == 4)
    expected = old.stem.state_dict()[first][:, [0, 1, 2, 0, 1]] * (3 / 5)
    torch.testing.assert_close(net.stem.state_dict()[first], expected)
    assert mean == (*old.card.preprocess.mean, *old.card.preprocess.mean[:2])


def test_numbers_that_differ(config):
    loading = replace(config.loading, bands=(0, 1, 2, 3))
    with pytest.raises(ConfigError, match="of 5 channels, and 4 bands are chosen; give --in-channels and"):
        build_network(replace(config, in_channels=5, loading=loading), ("a", "b"), {})
    with pytest.raises(ConfigError, match="of 3 channels, and 4 bands are chosen"):
        build_network(replace(config, loading=loading), ("a", "b"), {})


def test_a_teacher_of_other_images_is_refused(config, band_folder, tmp_path):
    options = {
        "depth": 1,
        "embed_dim": 16,
        "num_heads": 1,
        "patch_size": 8,
        "image_size": 16,
        "num_classes": 2,
    }
    tp.save(tp.create("vit-ti16", **options), tmp_path / "teacher.safetensors")
    five = replace(
        config, data=str(band_folder), in_channels=5, teacher=str(tmp_path / "teacher.safetensors")
    )
    with pytest.raises(
        CheckpointError, match="takes images of 3 channels, and the network to train 5; give a"
    ):
        run(five, tmp_path / "r")


def test_an_explanation_of_a_network_of_five_bands(config, band_folder, tmp_path):
    run(replace(config, data=str(band_folder), in_channels=5), tmp_path / "r")
    explanation = tp.explain(tmp_path / "r", band_folder / "wet" / "0.tif")
    assert explanation.to_json()
