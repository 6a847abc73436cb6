"""Generation metadata in an image file: written, read, and used to regenerate the image."""

import hashlib
import io
import json
import logging
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from triptych.config import from_json, to_json
from triptych.diffusion.config import SPACINGS
from triptych.errors import TriptychError
from triptych.pipelines.diffusion import image_metadata
from triptych.pipelines.diffusion.foreign_metadata.a1111 import BEFORE_1_9, DISCARDS
from triptych.pipelines.diffusion.options import GenerationRecord
from triptych.pipelines.diffusion.pipeline import DiffusionPipeline

pytestmark = pytest.mark.proves(
    "Prompts and generation metadata", "`parameters` text of AUTOMATIC1111's web UI", by="names", writes=True
)

# As AUTOMATIC1111's web UI writes it; the first is the example in its source.
WEB_UI = """girl with an artist's beret, determined, blue eyes, ((eyeshadow)), (coquettish), detailed
Negative prompt: ugly, fat, obese, (((deformed))), [blurry]
Steps: 20, Sampler: Euler a, CFG scale: 7, Seed: 965400086, Size: 512x768, Model hash: 45dee52b"""


@pytest.fixture(scope="module")
def pipe(ldm):
    pipelines = {}

    def get(name: str = "text") -> DiffusionPipeline:
        if name not in pipelines:
            pipelines[name] = DiffusionPipeline(ldm(name), device="cpu", dtype="fp32")
        return pipelines[name]

    return get


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


# The text


def test_the_text_is_the_web_uis():
    record = GenerationRecord(
        prompt="a red apple,\non a table",
        negative_prompt="blurry",
        num_steps=20,
        sampler="euler-ancestral",
        schedule="karras",
        guidance_scale=7.0,
        seed=1,
        height=512,
        width=768,
        model="models/sd, v1.5.safetensors",
        model_hash="6ce0161689",
        software="triptych 0.1.0",
    )
    assert image_metadata.parameters(record) == (
        "a red apple,\non a table\nNegative prompt: blurry\n"
        "Steps: 20, Sampler: Euler a, Schedule type: Karras, CFG scale: 7, Seed: 1, Size: 768x512, "
        'Model hash: 6ce0161689, Model: "sd, v1.5", RNG: CPU, Version: triptych 0.1.0'
    )
    bare = GenerationRecord(guidance_scale=7.5, height=8, width=8, task="inpaint", strength=0.75, tiling="xy")
    assert image_metadata.parameters(bare) == (
        "Steps: 30, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 0, Size: 8x8, Denoising strength: 0.75, RNG: CPU, "
        "Tiling: True"
    )


def test_the_web_uis_text_is_read():
    settings = image_metadata.parse_parameters(WEB_UI)
    assert settings == GenerationRecord(
        prompt="girl with an artist's beret, determined, blue eyes, ((eyeshadow)), (coquettish), detailed",
        negative_prompt="ugly, fat, obese, (((deformed))), [blurry]",
        num_steps=20,
        sampler="euler-ancestral",
        guidance_scale=7.0,
        seed=965400086,
        rng="cuda",
        height=768,
        width=512,
    )


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("Sampler: DPM++ 2M Karras", {"sampler": "dpm++2m", "schedule": "karras"}),
        ("Sampler: DPM++ 2M SDE Exponential", {"sampler": "dpm++2m-sde", "schedule": "exponential"}),
        ("Sampler: DPM++ 2M, Schedule type: SGM Uniform", {"sampler": "dpm++2m", "schedule": "sgm-uniform"}),
        ("Sampler: UniPC, Schedule type: Automatic", {"sampler": "unipc"}),
        ("Sampler: k_euler_a", {"sampler": "euler-ancestral"}),
        ("Sampler: LMS Karras", {"sampler": "lms", "schedule": "karras"}),
        (
            "Sampler: Euler, Schedule type: KL Optimal",
            {"sampler": "euler", "schedule": "kl-optimal-to-first"},
        ),
        ("Sampler: Euler, Schedule type: Turbo", {"sampler": "euler"}),
        ("Sampler: DDIM, Denoising strength: 0.4", {"sampler": "ddim", "strength": 0.4}),
        ('Model: "a, b: c", Tiling: True, Version: v1.9.4', {"tiling": "xy"}),
        ("Seed: -1, Size: 512x0, CFG scale: nan", {}),
        ("Seed: 5, Denoising strength: many, Size: 99999999999x1", {"seed": 5, "rng": "cuda"}),
        ('Lora hashes: "a: 1, b: 2", Clip skip: 2', {"clip_skip": 2}),
    ],
)
def test_other_lines(line, expected):
    settings = image_metadata.parse_parameters(f"x\nSteps: 7, Width: 3, {line}")
    assert settings == replace(GenerationRecord(prompt="x", num_steps=7), **expected)


def test_what_is_left_out_is_reported_in_a_line_each(caplog):
    with caplog.at_level(logging.WARNING):
        image_metadata.parse_parameters(
            "x\nSteps: 7, Sampler: IPNDM, Clip skip: 2, Seed: -1, ENSD: 31337, Model: a, RNG: CPU",
            "old.png",
        )
    assert [r.message.removeprefix("old.png (AUTOMATIC1111's web UI): ") for r in caplog.records] == [
        "the sampler 'IPNDM' is unknown here; dpm++2m is used instead",
        "seed: -1 is not reproduced",
        "made with the model a; give its file as the model",
        "ensd: 31337 is not reproduced",
    ]


@pytest.mark.parametrize(
    ("text", "prompt", "negative"),
    [
        ("a red apple", "a red apple", ""),
        ("a\nb\nNegative prompt: c\nd", "a\nb", "c\nd"),
        ("Negative prompt: c\nSteps: 1, Seed: 2, Size: 8x8", "", "c"),
        ("a\r\nNegative prompt: c\r\nSteps: 1, Seed: 2, Size: 8x8\r\n", "a", "c"),
        (
            "cat: black, dog: white",
            "cat: black, dog: white",
            "",
        ),  # two pairs are a prompt, three are parameters
        ("Steps: 1, Seed: 2, Size: 8x8", "", ""),
        ("", "", ""),
    ],
)
def test_prompts_and_their_lines(text, prompt, negative):
    settings = image_metadata.parse_parameters(text)
    assert (settings.prompt, settings.negative_prompt) == (prompt, negative)


letters = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=60)


@given(st.text(max_size=400))
def test_any_text_is_read(text):
    image_metadata.parse_parameters(text)
    image_metadata.parse_parameters(
        f"{text}\nSteps: {text}, Sampler: {text}, Size: {text}, Seed: {text}, CFG scale: {text}"
    )


@given(
    letters.map(str.strip),
    letters.map(str.strip),
    st.sampled_from(sorted(image_metadata.SAMPLERS)),
    st.sampled_from([None, *SPACINGS]),
    st.integers(0, 2**32 - 1),
    st.floats(-100, 100).map(lambda x: float(f"{x:g}")),
)
@settings(max_examples=200)
def test_what_is_written_is_read(prompt, negative, sampler, spacing, seed, guidance):
    record = GenerationRecord(
        prompt=prompt.replace("Negative prompt:", ""),
        negative_prompt=negative,
        sampler=sampler,
        schedule=spacing,
        seed=seed,
        guidance_scale=guidance,
        height=16,
        width=24,
    )
    # The web UI's text without levels stands for its uniform ones.
    expected = record if spacing else replace(record, schedule=BEFORE_1_9.get(sampler))
    if spacing is None and sampler in DISCARDS:
        expected = replace(record, schedule="sgm-uniform")
    assert image_metadata.parse_parameters(image_metadata.parameters(record)) == expected
    assert from_json(GenerationRecord, json.loads(json.dumps(to_json(record)))) == record


@pytest.mark.parametrize("word", ["a", "a ", '"', 'a: "b, ', "a: ", ",", "\\", " "])
def test_long_texts_take_no_time(word):
    started = time.process_time()
    image_metadata.parse_parameters(word * 100_000)
    image_metadata.parse_parameters("x\nSteps: 1, Seed: 2, Size: 8x8, " + word * 100_000)
    assert time.process_time() - started < 5


# The file


def test_png_has_both_chunks(pipe, tmp_path):
    (image,) = pipe().text_to_image("a (red:1.2) apple", "blurry", num_steps=1, seed=3)
    assert image.info["seed"] == 3
    assert (image.info["height"], image.info["width"]) == (32, 32)
    json.dumps(image.info)  # plain values
    (path,) = pipe().save([image], tmp_path / "new" / "apple.png")
    assert path == tmp_path / "new" / "apple.png"
    with Image.open(path) as read:
        assert same(read, image)
        assert set(read.text) == {"parameters", "triptych"}
        assert read.text["parameters"] == image.info["parameters"]
        assert json.loads(read.text["triptych"])["negative_prompt"] == "blurry"
    assert b"tEXtparameters\0a (red:1.2) apple\nNegative prompt: blurry\nSteps: 1, " in path.read_bytes()
    assert (
        image_metadata.read(str(path)) == image_metadata.read(image) == image_metadata.read(path.read_bytes())
    )


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_every_letter_comes_back(suffix, tmp_path):
    image = Image.new("RGB", (8, 8))
    image.info["parameters"] = "ein grüner Apfel, 林檎 🍏\nSteps: 3, Seed: 2, Size: 8x8"
    (path,) = image_metadata.save([image], tmp_path / f"x{suffix}")
    settings = image_metadata.read(path)
    assert settings.prompt == "ein grüner Apfel, 林檎 🍏"
    assert settings.num_steps == 3


def test_metadata_too_long_for_a_jpeg_do_not_prevent_saving(tmp_path, caplog):
    image = Image.new("RGB", (8, 8), "red")
    image.info["parameters"] = (
        "raspberry " * 5000 + "\nSteps: 3, Sampler: Euler, Seed: 2, Size: 8x8, RNG: CPU"
    )
    assert image_metadata.read(image_metadata.save([image], tmp_path / "x.webp")[0]).num_steps == 3
    assert not caplog.records
    (path,) = image_metadata.save([image], tmp_path / "x.jpg")
    assert [record.message for record in caplog.records] == [
        "the metadata are longer than a JPEG can hold and are left out; .png keeps them"
    ]
    with Image.open(path) as written:
        assert written.size == (8, 8)


def test_names_of_files(tmp_path):
    def make_image(prompt, seed):
        image = Image.new("RGB", (8, 8))
        image.info |= {"parameters": f"{prompt}\nSteps: 1, Seed: {seed}", "seed": seed}
        return image

    both = [make_image("A red, (round:1.2) apple/../" + "on a table " * 9, 7), make_image("", 8)]
    names = [path.name for path in image_metadata.save(both, tmp_path / "out")]
    assert names == ["0001-a-red-round-1-2-apple-on-a-table-on-a-ta-7.png", "0002-image-8.png"]
    assert image_metadata.save(both[1:], tmp_path / "out")[0].name == "0003-image-8.png"
    assert [p.name for p in image_metadata.save(both, tmp_path / "x.webp")] == ["x-7.webp", "x-8.webp"]
    assert [p.name for p in image_metadata.save([both[0]] * 2, tmp_path / "x.png")] == ["x-0.png", "x-1.png"]
    with pytest.raises(TriptychError, match=r"written as \.png"):
        image_metadata.save(both, tmp_path / "x.tiff")


def test_the_name_of_a_model(tmp_path):
    small = tmp_path / "small.safetensors"
    small.write_bytes(b"x" * 1000)
    assert image_metadata.model_hash(str(small)) == hashlib.sha256(b"x" * 1000).hexdigest()[:10]
    large = tmp_path / "large.ckpt"
    with large.open("wb") as file:
        file.truncate(2**28)
        file.seek(0x100000)
        file.write(b"y" * 0x10000)
    assert image_metadata.model_hash(str(large)) == hashlib.sha256(b"y" * 0x10000).hexdigest()[:8]
    assert image_metadata.model_hash(str(tmp_path)) == image_metadata.model_hash("") == ""


def test_files_without_metadata(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (8, 8)).save(path)
    with pytest.raises(TriptychError, match=r"x\.png has no generation metadata; give"):
        image_metadata.read(path)
    with pytest.raises(TriptychError, match="does not exist"):
        image_metadata.read(tmp_path / "none.png")
    (tmp_path / "cut.png").write_bytes(path.read_bytes()[:20])
    with pytest.raises(TriptychError, match="damaged"):
        image_metadata.read(tmp_path / "cut.png")
    with pytest.raises(TriptychError, match="an array"):
        image_metadata.read(np.zeros((8, 8, 3), np.uint8))


def chunked(**chunks) -> bytes:
    from PIL.PngImagePlugin import PngInfo

    info, file = PngInfo(), io.BytesIO()
    for name, words in chunks.items():
        info.add_text(name, words)
    Image.new("RGB", (8, 8)).save(file, format="PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize(
    "broken", ["{", "[]", "null", "{}x", '{"num_steps": "many"}', '{"new_field": 1}', "[" * 100_000]
)
def test_a_broken_chunk_leaves_the_text(broken, caplog):
    assert image_metadata.read(chunked(triptych=broken, parameters=WEB_UI)).num_steps == 20
    assert "its JSON cannot be read" in caplog.text
    with pytest.raises(TriptychError, match="no generation metadata"):
        image_metadata.read(chunked(triptych=broken))
    with pytest.raises(TriptychError, match="ComfyUI"):
        image_metadata.read(chunked(prompt="{}", workflow="{}"))


# Regenerate


@pytest.mark.parametrize("sampler", ["dpm++2m", "ddim", "euler-ancestral"])
def test_regenerate_gives_the_same_pixels(pipe, sampler, tmp_path):
    options = {
        "sampler": sampler,
        "num_steps": 2,
        "guidance_rescale": 0.5,
        "tiling": "x",
        "guidance_interval": (0.1, 9.0),
        "height": 20,
        "width": 28,
    }
    images = pipe().text_to_image("a (red:1.3) apple", "blurry", seed=5, num_images=2, **options)
    paths = pipe().save(images, tmp_path)
    (again,) = pipe().regenerate(paths[1])
    assert same(again, images[1])
    assert again.info == images[1].info
    with Image.open(paths[0]) as opened:
        assert same(pipe().regenerate(opened)[0], images[0])
    other = pipe().text_to_image("x", num_steps=1, apg={"eta": 0.5, "threshold": 2.0})
    assert same(pipe().regenerate(image_metadata.read(other[0]))[0], other[0])


def test_from_the_text_alone(pipe, tmp_path):
    images = pipe().text_to_image("a red apple", "blurry", seed=5, num_steps=2)
    images[0].info = {"parameters": images[0].info["parameters"]}
    (path,) = pipe().save(images, tmp_path / "x.png")
    assert same(pipe().regenerate(path)[0], images[0])


@pytest.mark.parametrize("side", [None, 24])
def test_tasks_with_an_initial_image_are_regenerated(pipe, photo, blob, side, tmp_path, caplog):
    path, hole = tmp_path / "photo.png", tmp_path / "mask.png"
    Image.fromarray(photo(27, 41)).save(path)
    Image.fromarray(blob(27, 41)).save(hole)
    images = [
        *pipe().image_to_image("x", path, num_steps=2, height=side, width=side),
        *pipe().inpaint(
            "x", str(path), hole, num_steps=2, height=side, width=side, mask_feather=2.0, strength=0.7
        ),
    ]
    for image in images:
        assert image.info["init_image"] == str(path)
        assert same(pipe().regenerate(image)[0], image)
    assert same(pipe().regenerate(images[1], init_image=photo(27, 41), mask_image=blob(27, 41))[0], images[1])
    assert not caplog.records
    pipe().regenerate(images[1], mask_image=255 - blob(27, 41))
    assert [r.message for r in caplog.records] == [
        "the mask_image is not the one that the image was made from"
    ]
    path.unlink()
    with pytest.raises(TriptychError, match=r"photo\.png, does not exist; give init_image"):
        pipe().regenerate(images[0])


def test_every_other_task_is_regenerated(pipe, photo):
    small = photo(8, 8)
    (image,) = pipe("upscaler").upscale("x", small, num_steps=1, noise_level=9, seed=4)
    assert same(pipe("upscaler").regenerate(image, init_image=small)[0], image)
    (image,) = pipe("classes").class_conditional(2, num_steps=1)
    assert same(pipe("classes").regenerate(image)[0], image)
    (image,) = pipe("unconditional").unconditional(num_steps=1, height=24, width=24)
    assert same(pipe("unconditional").regenerate(image)[0], image)
    (image,) = pipe("depth").text_to_image("x", num_steps=1, depth_map=small)
    assert same(pipe("depth").regenerate(image, depth_map=small)[0], image)


def test_regenerate_reports_what_is_different(pipe, ldm, caplog):
    (image,) = pipe().text_to_image("x", num_steps=1)
    DiffusionPipeline(ldm("text-v"), device="cpu", dtype="fp32").regenerate(
        image
    )  # the same weights, another diffusion process
    assert [r.message for r in caplog.records] == ["the image was made with another model (unnamed)"]
    caplog.clear()
    other = DiffusionPipeline(ldm("text"), device="cpu", dtype="bf16")
    other.regenerate(image)
    assert [r.message for r in caplog.records] == [
        "the image was made in fp32, this is bf16: pixels may differ"
    ]
    images = pipe().text_to_image("x", num_steps=1, latents=torch.zeros(1, 4, 8, 8))
    with pytest.raises(TriptychError, match="latents that were passed in"):
        pipe().regenerate(images[0])
