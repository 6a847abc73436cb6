"""Masks that are not clean class numbers: sparse values, gray levels, soft edges, colors, and files of any mode."""

import io
import logging
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triptych.data.masks import MaskEncoding, read_mask
from triptych.data.open import open_source
from triptych.data.sources.mask_values import find_soft_levels
from triptych.errors import DataError

pytestmark = pytest.mark.usefixtures("cache")


def encode(array: np.ndarray | Image.Image, format: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image = array if isinstance(array, Image.Image) else Image.fromarray(array)
    image.save(file, format, **options)
    return file.getvalue()


def disk(size: int = 96, low: int = 0, high: int = 255) -> np.ndarray:
    """Return a disk with soft edges, drawn eight times larger and reduced."""
    y, x = np.mgrid[: size * 8, : size * 8] / 8
    inside = np.hypot(x - size / 2, y - size / 3) < size / 4
    large = Image.fromarray(np.where(inside, high, low).astype(np.uint8))
    return np.asarray(large.resize((size, size), Image.Resampling.BOX))


def stripes(*values: int, dtype=np.uint8) -> np.ndarray:
    return np.tile(np.array(values, dtype).repeat(8), (16, 1))


@pytest.fixture
def folder(tmp_path):
    """Write images and masks with the given contents; return their folder."""

    def make(*masks: bytes, suffix: str = ".png") -> Path:
        for number, content in enumerate(masks):
            (tmp_path / "masks").mkdir(exist_ok=True)
            (tmp_path / "images").mkdir(exist_ok=True)
            (tmp_path / "masks" / f"{number}{suffix}").write_bytes(content)
            with Image.open(io.BytesIO(content)) as mask:
                Image.new("RGB", mask.size, (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        return tmp_path

    return make


@pytest.fixture
def logged(caplog):
    """Return what the readers of masks have logged."""
    caplog.set_level(logging.INFO, "triptych.data")
    return lambda: " ".join(record.getMessage() for record in caplog.records)


# ---------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("values", "classes"),
    [
        ((0, 7, 11, 200), ("class 0", "class 7", "class 11", "class 200")),
        ((0, 128), ("class 0", "class 128")),
        ((0, 100, 200), ("class 0", "class 100", "class 200")),
        ((0, 128, 255), ("class 0", "class 128", "class 255")),
        ((0, 127, 255), ("class 0", "class 127", "class 255")),
        ((0, 85, 170, 255), ("class 0", "class 85", "class 170", "class 255")),
        ((127, 255), ("class 127", "class 255")),
        ((0, 10, 20, 30), ("class 0", "class 10", "class 20", "class 30")),
    ],
)
def test_few_values_with_gaps_are_classes_in_order(folder, logged, values, classes):
    source = open_source(folder(encode(stripes(*values))))
    assert source.mask_classes == classes
    assert source[0].mask[0, ::8].tolist() == list(range(len(values)))
    assert f"taken as {len(values)} classes in this order" in logged()


def test_255_is_void_unless_it_is_a_gray_level(folder, logged):
    source = open_source(folder(encode(stripes(0, 7, 90, 255))))
    assert source.mask_classes == ("class 0", "class 7", "class 90")
    assert source[0].mask[0, ::8].tolist() == [0, 1, 2, 255]
    assert "0, 7 and 90" in logged()
    source = open_source(folder(encode(stripes(0, 1, 2, 255))))
    assert len(source.mask_classes) == 3
    assert len(open_source(folder(encode(stripes(1, 255)))).mask_classes) == 2  # object and void


def test_values_are_counted_over_all_masks_and_consecutive_numbers_are_not_mentioned(folder, logged):
    source = open_source(folder(encode(stripes(0, 1)), encode(stripes(0, 4)), encode(stripes(3))))
    assert source.mask_classes == tuple(f"class {i}" for i in range(5))
    assert logged() == ""


def test_sparse_values_with_options(folder):
    data = folder(encode(stripes(0, 7, 11, 200)))
    source = open_source(data, ignore_index=11)
    assert source.mask_classes == ("class 0", "class 7", "class 200")
    assert source[0].mask[0, ::8].tolist() == [0, 1, 255, 2]
    source = open_source(data, reduce_zero_label=True)
    assert source[0].mask[0, ::8].tolist() == [255, 0, 1, 2]
    assert source.mask_classes == ("class 6", "class 10", "class 199")  # name k belongs to value k + 1


def test_as_many_names_as_gray_levels(folder, logged):
    data = folder(encode(stripes(0, 127, 254)))
    (data / "classes.txt").write_text("ground\nskin\nhair")
    source = open_source(data)
    assert source.mask_classes == ("ground", "skin", "hair")
    assert source[0].mask[0, ::8].tolist() == [0, 1, 2]
    assert "taken as 3 classes in this order (ground, skin, hair)" in logged()
    (data / "classes.txt").write_text("ground\nskin\nhair\nnail")
    with pytest.raises(DataError, match="holds 127, but the 4 classes are numbered"):
        open_source(data)
    (data / "classes.txt").write_text("no\nyes")
    data = folder(encode(stripes(0, 128)))
    assert open_source(data).mask_classes == ("no", "yes")


def test_names_of_sparse_numbers_count_for_themselves(folder, logged):
    data = folder(encode(stripes(0, 128, 255)))
    (data / "id2label.json").write_text('{"0": "ground", "128": "crack"}')
    assert open_source(data)[0].mask[0, ::8].tolist() == [0, 1, 255]
    assert logged() == ""


def test_many_values_without_names_are_refused(folder, refusal):
    noise = np.random.default_rng(0).choice(np.arange(0, 250, 3), (64, 64)).astype(np.uint8)
    message = refusal(folder(encode(noise)))
    assert "hold 84 distinct values up to 249" in message
    assert "id2label.json" in message
    assert "mask_threshold" in message


# ------------------------------------------------------------------------------------------------ soft edges


def test_soft_edges_are_two_classes_with_a_threshold(folder, logged):
    soft, hard = disk(), np.where(disk() > 127, 255, 0).astype(np.uint8)
    assert len(np.unique(soft)) > 20
    source = open_source(folder(encode(soft), encode(hard)))
    assert source.mask_classes == ("background", "foreground")
    for index in range(2):
        assert np.array_equal(source[index].mask, hard > 0)
    assert "values above 127 are taken as foreground" in logged()


def test_soft_edges_between_other_levels(folder):
    soft = disk(low=20, high=200)
    source = open_source(folder(encode(soft)))
    assert source.mask_classes == ("background", "foreground")
    assert np.array_equal(source[0].mask, soft > 110)


@pytest.mark.parametrize("quality", [40, 75, 95])
def test_a_jpeg_saved_as_png_and_a_blurred_mask(folder, quality):
    hard = np.where(disk(192) > 127, 255, 0).astype(np.uint8)
    lossy = np.asarray(Image.open(io.BytesIO(encode(hard, "JPEG", quality=quality))))
    assert np.array_equal(open_source(folder(encode(lossy)))[0].mask, lossy > 127)
    small = Image.fromarray(hard).resize((64, 64), Image.Resampling.BICUBIC)
    source = open_source(folder(encode(small)))
    assert source.mask_classes == ("background", "foreground")


def test_soft_edges_of_several_levels_are_refused(folder, refusal):
    soft = np.concatenate([disk(high=128), disk(low=128, high=255), disk()], axis=1)
    message = refusal(folder(encode(soft)))
    assert "between 0, 128 and 255" in message
    assert "nearest neighbor" in message


@pytest.mark.parametrize("void", [0, 40_000])
def test_class_numbers_are_not_taken_for_soft_edges(void):
    rng = np.random.default_rng(0)
    for count in (21, 64, 151, 182):
        counts = np.zeros(65536, np.int64)
        counts[:count] = np.sort((rng.pareto(0.7, count) * 300).astype(np.int64) + 5)[::-1]
        counts[255] = void
        assert find_soft_levels(counts) is None
    counts[:] = 0
    counts[[0, 64, 128, 191, 255]] = 10_000, 30, 40, 30, 5_000
    assert find_soft_levels(counts) is None  # too few values: gray levels


# --------------------------------------------------------------------------------------------- a threshold


def test_a_threshold_divides_masks_of_any_kind(folder, refusal):
    hard = np.where(disk() > 127, 255, 0).astype(np.uint8)
    jpeg = encode(hard, "JPEG", quality=50)
    assert "mask_threshold" in refusal(folder(jpeg, suffix=".jpg"))
    source = open_source(folder(jpeg, suffix=".jpg"), mask_threshold=127)
    assert source.mask_classes == ("background", "foreground")
    assert np.array_equal(source[0].mask, hard > 0)
    for name in (tuple("ab"), tuple("abc")):
        (folder() / "classes.txt").write_text("\n".join(name))
        if len(name) == 2:
            assert open_source(folder(), mask_threshold=127).mask_classes == name
        else:
            assert "makes two classes, but 3 are named" in refusal(folder(), mask_threshold=127)


def test_a_threshold_of_fractions_and_of_16_bits(folder, refusal, tmp_path):
    soft = disk().astype(np.float32) / 255
    data = folder(encode(soft, "TIFF"), suffix=".tif")
    assert "holds fractions such as" in refusal(data)
    assert np.array_equal(open_source(data, mask_threshold=0.5)[0].mask, disk() > 127)
    deep = disk().astype(np.uint16) * 257
    values = read_mask(encode(deep), "m", MaskEncoding(threshold=32767))
    assert np.array_equal(values, disk() > 127)


def test_transparent_pixels_are_below_the_threshold():
    alpha = disk()
    pixels = np.dstack([np.full((*alpha.shape, 3), 255, np.uint8), alpha])
    with pytest.raises(DataError, match="only its transparency varies"):
        read_mask(encode(pixels), "m")
    values = read_mask(encode(pixels), "m", MaskEncoding(threshold=127))
    assert np.array_equal(values, alpha > 127)


# ------------------------------------------------------------------------------------------------- channels

NUMBERS = stripes(0, 3, 1, 2)


@pytest.mark.parametrize(
    "content",
    [
        encode(Image.fromarray(NUMBERS).convert("RGB")),
        encode(Image.fromarray(NUMBERS).convert("RGBA")),
        encode(Image.fromarray(NUMBERS).convert("LA")),
        encode(Image.fromarray(NUMBERS).convert("RGB"), "BMP"),
        encode(Image.fromarray(NUMBERS).convert("RGB"), "WEBP", lossless=True),
        encode(NUMBERS.astype(np.uint16)),
        encode(NUMBERS.astype(np.float32), "TIFF"),
        encode(NUMBERS.astype(np.int32), "TIFF"),
    ],
    ids=["RGB", "RGBA", "LA", "BMP", "WebP", "16 bits", "float", "int32"],
)
def test_one_channel_of_any_mode(folder, content):
    assert np.array_equal(read_mask(content, "m"), NUMBERS)
    assert len(open_source(folder(content)).mask_classes) == 4


def test_binary_floats_and_one_bit():
    binary = stripes(0, 1)
    assert np.array_equal(read_mask(encode(binary.astype(np.float32), "TIFF"), "m"), binary)
    assert np.array_equal(read_mask(encode(Image.fromarray(binary * 255).convert("1")), "m"), binary)
    with pytest.raises(DataError, match="NaN"):
        read_mask(encode(np.full((2, 2), np.nan, np.float32), "TIFF"), "m")


def raw_png(width: int, bits: int, color_type: int, rows: list[bytes]) -> bytes:
    """Return a PNG with these rows, as Pillow cannot write it."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, len(rows), bits, color_type, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    return b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grayscale_of_few_bits_keeps_its_numbers(bits):
    numbers = np.arange(2**bits, dtype=np.uint8).repeat(8 // bits)
    packed = np.packbits(np.unpackbits(numbers[:, None], axis=-1)[:, -bits:].ravel())
    png = raw_png(len(numbers), bits, 0, [packed.tobytes()] * 3)
    assert np.array_equal(read_mask(png, "m"), np.tile(numbers, (3, 1)))


def test_colors_of_16_bits_per_channel_are_refused():
    with pytest.raises(DataError, match="16 bits per channel"):
        read_mask(raw_png(2, 16, 2, [np.full(6, 7, ">u2").tobytes()] * 2), "m")
