"""A segmented GeoTIFF keeps its position on Earth; large images are segmented when the limit is raised."""

import io

import numpy as np
import pytest
import tifffile
from PIL import Image

import triptych as tp
from triptych.cli import main
from triptych.errors import DataError

TAGS = [
    (33550, 12, 3, (10.0, 10.0, 0.0), True),
    (33922, 12, 6, (0.0, 0.0, 0.0, 399960.0, 5700000.0, 0.0), True),
    (34735, 3, 12, (1, 1, 0, 2, 1024, 0, 1, 1, 3072, 0, 1, 32633), True),
]


@pytest.fixture(scope="module")
def pipe():
    return tp.SegmentationPipeline("swin-scenes", device="cpu", dtype="fp32")


@pytest.fixture
def scene(tmp_path):
    values = np.random.default_rng(0).integers(0, 4096, (40, 56, 6), np.uint16)
    path = tmp_path / "scene.tif"
    tifffile.imwrite(path, values, photometric="minisblack", planarconfig="contig", extratags=TAGS)
    return path


def test_labels_are_georeferenced(pipe, scene, tmp_path):
    result = pipe(scene)
    assert result.image.shape == (40, 56, 3)
    written = result.save(tmp_path / "out")
    assert [path.name for path in written] == [
        *("scene.overlay.png", "scene.labels.png", "scene.json", "scene.labels.tif")
    ]
    result.save(tmp_path / "alone.tif")
    with tifffile.TiffFile(scene) as original:
        for path in (written[-1], tmp_path / "alone.tif"):
            with tifffile.TiffFile(path) as file:
                assert file.pages[0].geotiff_tags == original.pages[0].geotiff_tags
                assert np.array_equal(file.pages[0].asarray(), result.labels)
    assert np.array_equal(np.asarray(Image.open(written[1])), result.labels)


def test_the_command_writes_them(scene, tmp_path, capsys):
    arguments = ["segment", str(scene), "--out", str(tmp_path / "out"), "--write", "labels", "json"]
    assert main([*arguments, "--workers", "0"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("scene.json", "scene.labels.png", "scene.labels.tif")
    ]


def test_other_images_have_no_position(pipe, tmp_path):
    result = pipe(np.zeros((30, 30, 3), np.uint8))
    assert not result.geo_tags
    assert len(result.save(tmp_path)) == 3


def test_the_limit_of_pixels(tmp_path, capsys):
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40)).save(buffer, "PNG")
    limited = tp.SegmentationPipeline("swin-scenes", device="cpu", dtype="fp32", max_pixels=2399)
    with pytest.raises(DataError, match="raise the limit with --max-pixels"):
        limited(buffer.getvalue())
    limited = tp.ClassificationPipeline("vit-emoji", device="cpu", dtype="fp32", max_pixels=2400)
    assert len(limited(buffer.getvalue())) == 5
