"""One image, a list, a folder and a stream give the same results in order, without reading more than needed."""

import io
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import triptych as tp
from triptych import device as hardware
from triptych.model_card import ModelCard, Preprocess
from triptych.pipelines.classification import ClassificationPipeline
from triptych.pipelines.classification_result import Guess
from triptych.pipelines.image_input import fitted, images_below, normalized

NAMES = ("cat", "dog", "fox", "owl")


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    net = tp.create(
        "vit-ti16", depth=2, embed_dim=48, num_heads=3, mlp_ratio=2.0, num_classes=4, image_size=32
    )
    torch.nn.init.normal_(net.head.weight)
    net.card = ModelCard(preprocess=Preprocess(size=(32, 32), crop=1.0, mode="squash"), classes=NAMES)
    return net


@pytest.fixture(scope="module")
def pipe(net):
    return ClassificationPipeline(net, dtype="fp32", batch_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    (folder / "b").mkdir()
    for i in range(11):
        size = (int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3)
        path = folder / ("b" if i > 7 else ".") / f"{i:02d}.png"
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(path)
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden.png").write_text("not an image either")
    return folder


def test_result(pipe, folder):
    result = pipe(folder / "00.png", top=3)
    assert [guess.name for guess in result] == [NAMES[guess.index] for guess in result]
    assert len(result) == 3
    assert result[0] == Guess(result.name, result.label, result.probability)
    assert result[0].probability >= result[1].probability >= result[2].probability > 0
    assert result.source == str(folder / "00.png")
    assert repr(result).startswith(f"<{result.source}: {result.name} 0.")
    assert result.to_json()["top"][0]["name"] == result.name


def test_logits_are_the_networks(net, pipe, folder):
    """The probabilities are those of preprocessing and the network by hand."""
    x = normalized(fitted(folder / "00.png", net.card.preprocess), net.card.preprocess)[None]
    with torch.inference_mode():
        expected = net.eval()(x).softmax(1)[0]
    result = pipe(folder / "00.png", top=4)
    for guess in result:
        assert NAMES[guess.index] == guess.name
        assert guess.probability == pytest.approx(expected[guess.index].item(), abs=1e-6)


def test_every_type_of_image(pipe, folder):
    path = folder / "00.png"
    data = path.read_bytes()
    array = np.asarray(Image.open(path))
    images = [path, str(path), data, Image.open(io.BytesIO(data)), array]
    results = pipe(images)
    assert isinstance(results, list)
    for result in results:
        assert result.label == pipe(path).label
        assert result.probability == pytest.approx(pipe(path).probability, abs=1e-6)
    assert pipe(array).source == "array"
    assert pipe(array[..., 0])[0]  # gray


def test_list_folder_and_stream_agree(pipe, folder):
    files = list(images_below(folder))
    assert [file.name for file in files] == [f"{i:02d}.png" for i in range(11)]
    single = [pipe(file) for file in files]
    for results in (pipe(files), list(pipe(folder)), list(pipe(iter(files))), list(pipe(str(folder)))):
        assert [one.source for one in results] == [one.source for one in single]
        for one, other in zip(results, single, strict=True):
            assert [guess.index for guess in one] == [guess.index for guess in other]
            np.testing.assert_allclose(
                [g.probability for g in one], [g.probability for g in other], atol=1e-6
            )


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_change_nothing(net, pipe, folder, workers):
    images = [*images_below(folder), (folder / "03.png").read_bytes(), np.full((9, 7, 3), 9, np.uint8)]
    images.insert(2, Image.open(folder / "05.png"))
    read = ClassificationPipeline(net, dtype="fp32", batch_size=4, workers=workers)
    assert list(read(iter(images))) == list(pipe(iter(images)))


@pytest.mark.parametrize(("workers", "ahead"), [(0, 4), (2, 5 * 4)])
def test_a_stream_is_read_as_it_is_asked_for(net, workers, ahead):
    num_read = 0

    def endless():
        nonlocal num_read
        while True:
            num_read += 1
            yield np.zeros((8, 8, 3), np.uint8)

    stream = ClassificationPipeline(net, dtype="fp32", batch_size=4, workers=workers)(endless())
    assert num_read == 0
    next(stream)
    assert num_read <= ahead + 1
    stream.close()


def test_bad_images_fail_or_are_skipped(net, folder, caplog):
    images = [folder / "00.png", folder / "notes.txt", b"", folder / "01.png"]
    with pytest.raises(tp.TriptychError, match=r"notes\.txt"):
        ClassificationPipeline(net)(images)
    pipe = ClassificationPipeline(net, on_bad_image="skip")
    with caplog.at_level(logging.WARNING, logger="triptych"):
        results = pipe(images)
    assert [one.source for one in results] == [str(folder / "00.png"), str(folder / "01.png")]
    assert pipe.skipped == [str(folder / "notes.txt"), "bytes"]
    assert "notes.txt" in caplog.text
    with pytest.raises(tp.TriptychError, match=r"notes\.txt"):
        pipe(folder / "notes.txt")


def test_the_callers_network_stays_as_it_is(net):
    net.train()
    pipe = ClassificationPipeline(net, dtype="bf16")
    pipe(np.zeros((8, 8, 3), np.uint8))
    assert net.training
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert {p.dtype for p in pipe.net.parameters()} == {torch.bfloat16}
    shared = ClassificationPipeline(net, device="cpu", dtype="fp32")
    assert shared.net.head.weight is net.head.weight
    assert not shared.net.training


def test_bf16_gives_nearly_the_same(net, folder):
    fp32 = ClassificationPipeline(net, device="cpu", dtype="fp32")(folder / "03.png", top=4)
    bf16 = ClassificationPipeline(net, device="cpu", dtype="bf16")(folder / "03.png", top=4)
    by_index = {guess.index: guess.probability for guess in fp32}
    for guess in bf16:
        assert guess.probability == pytest.approx(by_index[guess.index], abs=0.05)


def test_precision_follows_the_hardware_and_is_logged_once(monkeypatch, caplog):
    cpu = torch.device("cpu")
    monkeypatch.setattr(hardware, "_LOGGED", set())
    with caplog.at_level(logging.INFO, logger="triptych"):
        monkeypatch.setattr(hardware, "native_bf16", lambda device: "AMX_BF16")
        assert hardware.choose_dtype(None, cpu) == torch.bfloat16
        assert caplog.text == ""  # logged when the work begins
        hardware.log_dtype(torch.bfloat16, cpu)
        hardware.log_dtype(torch.bfloat16, cpu)
    assert caplog.text.count("bf16 on cpu (native bf16: AMX_BF16)") == 1
    monkeypatch.setattr(hardware, "native_bf16", lambda device: None)
    assert hardware.choose_dtype(None, cpu) == torch.float32
    assert hardware.choose_dtype("bf16", cpu) == torch.bfloat16


def test_background_under_alpha():
    clear = np.zeros((16, 16, 4), np.uint8)
    for ground in ((255, 255, 255), (10, 20, 30)):
        preprocess = Preprocess(size=(8, 8), crop=1.0, background=ground)
        assert (fitted(clear, preprocess) == np.array(ground)).all()


def test_a_grayscale_network_accepts_color_images():
    net = tp.create(
        "vit-ti16",
        depth=1,
        embed_dim=24,
        num_heads=3,
        mlp_ratio=1.0,
        in_channels=1,
        num_classes=2,
        image_size=16,
    )
    net.card = replace(net.card, preprocess=Preprocess(size=(16, 16), mean=(0.5,) * 3, std=(0.5,) * 3))
    assert ClassificationPipeline(net)(np.full((9, 9, 3), 77, np.uint8))[0].name.startswith("class ")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net, f: ClassificationPipeline(net, device="cuda:99"), "cuda:99"),
        (lambda net, f: ClassificationPipeline(net, dtype="fp7"), "'fp7'"),
        (lambda net, f: ClassificationPipeline(net, batch_size=0), "batch_size 0"),
        (lambda net, f: ClassificationPipeline(net, on_bad_image="maybe"), "'maybe'"),
        (lambda net, f: ClassificationPipeline(net)(f / "00.png", top=0), "top is 0"),
        (lambda net, f: ClassificationPipeline(net)(f / "nowhere.png"), "nowhere.png does not exist"),
        (lambda net, f: ClassificationPipeline(net)(np.zeros((4, 4), np.float32)), "float32"),
        (lambda net, f: ClassificationPipeline(net)(f / "empty"), "no images"),
        (
            lambda net, f: ClassificationPipeline(tp.create("dinov2-s14", depth=1, num_classes=0)),
            "no classes",
        ),
    ],
)
def test_mistakes_are_named(net, folder, call, message):
    (folder / "empty").mkdir(exist_ok=True)
    with pytest.raises(tp.TriptychError, match=message):
        call(net, folder)


def test_one_pixel(pipe):
    assert len(pipe(np.zeros((1, 1, 3), np.uint8))) == 4
