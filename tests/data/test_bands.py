"""Images of other depths and numbers of bands, read as tifffile and pydicom read them, and scaled as documented."""

import io
import logging

import numpy as np
import pydicom
import pytest
import tifffile
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.pixels.processing import apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage

from triptych.data import bands
from triptych.data.bands import ReadOptions, scale_to_8_bits
from triptych.data.config import DataConfig
from triptych.data.geotiff import geotiff, read_geo_tags
from triptych.data.images import decode
from triptych.data.loading.loader import make_loader
from triptych.data.open import open_source
from triptych.errors import ConfigError, DataError
from triptych.model_card import Preprocess
from triptych.pipelines.image_input import fitted

RNG = np.random.default_rng(0)
GEO_TAGS = {  # as GDAL writes them for UTM zone 33N
    33550: (10.0, 10.0, 0.0),
    33922: (0.0, 0.0, 0.0, 399960.0, 5700000.0, 0.0),
    34735: (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633),
    34737: "WGS 84 / UTM zone 33N|",
}


@pytest.fixture(autouse=True)
def new_notes():
    bands._log_once.cache_clear()


def tiff(values, **options):
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, values, **options)
    return buffer.getvalue()


def scaled(values, low, high):
    return np.rint((np.clip(values, low, high).astype(np.float64) - low) * 255 / (high - low))


@pytest.mark.parametrize("planar", ["contig", "separate"])
@pytest.mark.parametrize("count", [5, 13])
def test_many_bands(count, planar, caplog):
    values = RNG.integers(0, 4096, (9, 7, count), np.uint16)
    values[0, 0, 0] = 4095
    stored = np.moveaxis(values, -1, 0) if planar == "separate" else values
    content = tiff(stored, photometric="minisblack", planarconfig=planar)
    with caplog.at_level(logging.WARNING):
        assert np.array_equal(decode(content), scaled(values[..., :3], 0, 4095))
    assert f"of {count} bands the first 3 are used; choose others with bands" in caplog.messages
    chosen = decode(content, options=ReadOptions(bands=(3, 2, 1), value_range=(100, 3000)))
    assert np.array_equal(chosen, scaled(values[..., [3, 2, 1]], 100, 3000))
    gray = decode(content, options=ReadOptions(bands=(4,), value_range=(0, 4095)))
    assert np.array_equal(gray, scaled(values[..., [4, 4, 4]], 0, 4095))
    with pytest.raises(DataError, match=f"x has {count} bands, and band 20 is requested"):
        decode(content, name="x", options=ReadOptions(bands=(20,)))


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_data_of_fewer_bits_in_16_bit_files(bits, form, caplog):
    white = 2**bits - 1
    values = RNG.integers(0, white + 1, (8, 8), np.uint16)
    values[0, 0] = white
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form)
    with caplog.at_level(logging.WARNING):
        got = decode(buffer.getvalue())
    assert np.array_equal(got[..., 0], scaled(values, 0, white))
    assert len(caplog.messages) == (8 < bits < 16)
    got = decode(buffer.getvalue(), options=ReadOptions(value_range=(10, 200)))
    assert np.array_equal(got[..., 1], scaled(values, 10, 200))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int16, np.int32, np.uint32])
@pytest.mark.parametrize("channels", [1, 3])
def test_types_of_values(dtype, channels):
    values = np.linspace(-100, 200, 6 * 5 * channels).reshape(6, 5, channels).astype(dtype)
    if dtype == np.uint32:
        values = np.arange(6 * 5 * channels, dtype=dtype).reshape(6, 5, channels) * 1000
        values[0, 0, 0] = 70000
    photometric = "rgb" if channels == 3 else "minisblack"
    content = tiff(values if channels == 3 else values[..., 0], photometric=photometric)
    expected = scaled(values, min(0, values.min()), values.max())
    if dtype == np.uint32 and channels == 1:
        expected = scaled(values, 0, 70000)
    assert np.array_equal(decode(content), np.broadcast_to(expected, (6, 5, 3)))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
@pytest.mark.parametrize("first", [True, False])
def test_arrays_written_without_axes(first, dtype):
    values = RNG.integers(0, 256, (20, 16, 5)).astype(dtype)
    values[0, 0, 0] = 255
    content = tiff(np.ascontiguousarray(np.moveaxis(values, -1, 0)) if first else values)
    assert np.array_equal(decode(content), values[..., :3])
    assert np.array_equal(decode(content, options=ReadOptions(bands=(4, 0, 1))), values[..., [4, 0, 1]])


def test_floats_up_to_one_are_fractions():
    values = RNG.random((4, 4, 3)).astype(np.float32)
    assert np.array_equal(decode(tiff(values, photometric="rgb")), np.rint(values.astype(float) * 255))


@pytest.mark.parametrize("tag", [True, False])
def test_pixels_without_data_are_left_out(tag):
    values = RNG.uniform(100, 300, (5, 5)).astype(np.float32)
    values[0] = -9999 if tag else np.nan
    extratags = [(42113, 2, 0, "-9999", True)] if tag else []
    content = tiff(values, photometric="minisblack", extratags=extratags)
    expected = scaled(values[1:], 0, float(values[1:].max()))
    shown = decode(content, alpha=True)
    assert (shown[0, :, 3] == 0).all()
    assert (shown[1:, :, 3] == 255).all()
    assert np.array_equal(shown[1:, :, 0], expected)
    assert (decode(content)[0] == 255).all()  # on white, as transparent pixels


def test_white_is_zero_and_orientation():
    values = RNG.integers(0, 65536, (4, 6), np.uint16)
    values[0, 0] = 65535
    inverted = tiff(values, photometric="miniswhite")
    assert np.array_equal(decode(inverted)[..., 0], 255 - scaled(values, 0, 65535))
    turned = tiff(values, photometric="minisblack", extratags=[(274, 3, 1, 6, True)])
    assert np.array_equal(decode(turned)[..., 0], np.rot90(scaled(values, 0, 65535), -1))


def dicom(values, **elements):
    data = pydicom.Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.file_meta.MediaStorageSOPClassUID = data.SOPClassUID = SecondaryCaptureImageStorage
    data.file_meta.MediaStorageSOPInstanceUID = data.SOPInstanceUID = pydicom.uid.generate_uid()
    data.Rows, data.Columns = values.shape[:2]
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 12, 11
    data.PixelRepresentation = int(values.dtype.kind == "i")
    data.PixelData = values.tobytes()
    for name, value in elements.items():
        setattr(data, name, value)
    buffer = io.BytesIO()
    data.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue(), data


def test_dicom():
    values = RNG.integers(0, 4096, (6, 8), np.uint16)
    content, _ = dicom(values)
    assert np.array_equal(decode(content)[..., 0], scaled(values, 0, 4095))
    content, _ = dicom(values, PhotometricInterpretation="MONOCHROME1")
    assert np.array_equal(decode(content)[..., 0], 255 - scaled(values, 0, 4095))


def test_the_window_of_dicom_is_that_of_pydicom():
    values = RNG.integers(0, 4096, (6, 8), np.uint16)
    content, data = dicom(
        values, RescaleSlope=2, RescaleIntercept=-1024, WindowCenter=[40, 500], WindowWidth=[400, 9]
    )
    units = values.astype(float) * 2 - 1024
    shown = apply_voi_lut(units, data, prefer_lut=False)
    low, high = shown.min(), shown.max()
    assert np.abs(decode(content)[..., 0].astype(float) - scaled(shown, low, high)).max() <= 1
    lungs = decode(content, options=ReadOptions(value_range=(-1000, 400)))
    assert np.array_equal(lungs[..., 0], scaled(units, -1000, 400))


def test_what_cannot_be_read_is_one_line(monkeypatch):
    content, _ = dicom(np.zeros((2, 2), np.uint16))
    with pytest.raises(DataError, match=r"x is a DICOM file without an image|x is damaged"):
        decode(content[:140], name="x")
    many = tiff(np.zeros((4, 4, 7), np.float32), photometric="minisblack", planarconfig="contig")
    with pytest.raises(DataError, match=r"x is damaged|x is a damaged"):
        decode(many[:60], name="x")
    monkeypatch.setattr(bands.TIFF_BANDS.__class__, "is_readable", property(lambda self: False))
    with pytest.raises(
        DataError, match=r"x is a TIFF of this depth or number of bands, .* pip install tifffile"
    ):
        decode(many, name="x")
    with pytest.raises(DataError, match="x is DICOM, which needs another package: pip install pydicom"):
        decode(content, name="x")


def test_bad_options():
    for options in ({"bands": ()}, {"bands": (-1,)}, {"value_range": (3, 3)}, {"max_pixels": 0}):
        with pytest.raises(ConfigError):
            ReadOptions(**options)


def test_constant_and_empty_values():
    assert scale_to_8_bits(np.zeros((2, 2), np.uint16)).max() == 0
    assert scale_to_8_bits(np.full((2, 2), np.nan, np.float32)).max() == 0
    assert scale_to_8_bits(np.full((2, 2), -3.0)).max() == 0


def test_training_and_inference_read_alike(tmp_path):
    values = RNG.integers(0, 4096, (8, 8, 6), np.uint16)
    for name in "ab":
        (tmp_path / name).mkdir()
        tifffile.imwrite(tmp_path / name / "1.tif", values, photometric="minisblack", planarconfig="contig")
    preprocess = Preprocess(size=(8, 8), crop=1.0, bands=(5, 0, 2), value_range=(0, 5000))
    loader = make_loader(open_source(str(tmp_path)), DataConfig(workers=0), preprocess, train=False)
    image = next(iter(loader))["image"][0].permute(1, 2, 0).numpy()
    assert np.array_equal(image, scaled(values[..., [5, 0, 2]], 0, 5000))
    assert np.array_equal(fitted(tmp_path / "a" / "1.tif", preprocess), image)


def test_the_limit_of_pixels_can_be_raised():
    large = io.BytesIO()
    Image.new("1", (19000, 19000)).save(
        large, "PNG"
    )  # 361 megapixels: Pillow's limit of 358 for bombs is passed, too
    with pytest.raises(DataError, match=r"x has 361 megapixels, but at most 178 are allowed; .*--max-pixels"):
        decode(large.getvalue(), name="x")
    small = io.BytesIO()
    Image.new("L", (40, 30)).save(small, "PNG")
    assert decode(small.getvalue(), options=ReadOptions(max_pixels=1200)).shape == (30, 40, 3)
    with pytest.raises(DataError, match="at most 1,199 are allowed"):
        decode(small.getvalue(), options=ReadOptions(max_pixels=1199))


def test_positions_are_kept():
    types = {33550: 12, 33922: 12, 34735: 3, 34737: 2}
    extratags = [
        (code, types[code], 0 if isinstance(v, str) else len(v), v, True) for code, v in GEO_TAGS.items()
    ]
    image = tiff(
        RNG.integers(0, 4096, (8, 6, 5), np.uint16),
        photometric="minisblack",
        planarconfig="contig",
        extratags=extratags,
    )
    labels = RNG.integers(0, 9, (8, 6), np.uint8)
    for values in (labels, labels.astype(np.uint16) * 300):
        with tifffile.TiffFile(io.BytesIO(geotiff(values, read_geo_tags(image)))) as file:
            page = file.pages[0]
            assert np.array_equal(page.asarray(), values)
            with tifffile.TiffFile(io.BytesIO(image)) as original:
                assert page.geotiff_tags == original.pages[0].geotiff_tags
            for code, value in GEO_TAGS.items():
                assert page.tags[code].value == value
    assert read_geo_tags(tiff(labels)) == {}
    assert read_geo_tags(b"II*\0") == read_geo_tags("nowhere.tif") == read_geo_tags(labels) == {}


@pytest.mark.parametrize("form", [{"ome": True}, {"imagej": True}])
def test_channels_that_ome_and_imagej_store_as_pages(form):
    planes = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
    file = io.BytesIO()
    tifffile.imwrite(file, planes, photometric="minisblack", metadata={"axes": "CYX"}, **form)
    assert np.array_equal(decode(file.getvalue(), "a")[..., :3], np.moveaxis(planes, 0, -1))


@pytest.mark.parametrize("compression", ["lzw", "jpeg"])
def test_many_bands_with_compression(compression):
    pytest.importorskip("imagecodecs")
    bands = np.arange(16 * 16 * 6, dtype=np.uint8).reshape(16, 16, 6) // 8
    file = io.BytesIO()
    options = {"photometric": "minisblack", "planarconfig": "separate", "compression": compression}
    tifffile.imwrite(file, np.moveaxis(bands, -1, 0), **options)
    image = decode(file.getvalue(), "a")[..., :3].astype(int)
    assert np.abs(image - bands[..., :3]).max() <= (0 if compression == "lzw" else 40)


def test_a_compression_that_lacks_its_package_is_named(monkeypatch):
    pytest.importorskip("imagecodecs")
    file = io.BytesIO()
    planes = np.zeros((6, 8, 8), np.uint16)
    tifffile.imwrite(file, planes, photometric="minisblack", planarconfig="separate", compression="lzw")

    def asarray(pages):  # what tifffile does without the package
        raise ValueError("<COMPRESSION.LZW: 5> requires the 'imagecodecs' package")

    monkeypatch.setattr(tifffile.TiffPage, "asarray", asarray)
    with pytest.raises(DataError, match="is a TIFF with LZW compression, which needs another package: pip"):
        decode(file.getvalue(), "a.tif")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "run git lfs pull"),
        (b"<!DOCTYPE html><title>404</title>", "is a web page"),
    ],
)
def test_files_that_are_no_images_are_named(content, what):
    with pytest.raises(DataError, match=what):
        decode(content, "a.jpg")
