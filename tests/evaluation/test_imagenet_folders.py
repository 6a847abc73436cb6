"""Folders named by WordNet id, index or synonym against networks with ImageNet's classes; the order is timm's."""

import logging

import numpy as np
import pytest
from PIL import Image

import triptych as tp
from triptych.errors import DataError
from triptych.evaluation.class_names import match_classes
from triptych.evaluation.imagenet_folders import match_imagenet
from triptych.model_card import ModelCard
from triptych.weights.mapping.defaults import imagenet_names, imagenet_synsets

IMAGENETTE = (  # https://github.com/fastai/imagenette
    *("n01440764", "n02102040", "n02979186", "n03000684", "n03028079"),
    *("n03394916", "n03417042", "n03425413", "n03445777", "n03888257"),
)
IMAGENETTE_INDICES = (0, 217, 482, 491, 497, 566, 569, 571, 574, 701)
CARD = ModelCard(classes=imagenet_names(1000))


@pytest.mark.parametrize(
    ("count", "subset"), [(1000, "imagenet-1k"), (21841, "imagenet-22k"), (21843, "imagenet-21k-goog")]
)
def test_the_order_is_that_of_timm(count, subset):
    timm = pytest.importorskip("timm.data")
    info = timm.ImageNetInfo(subset)
    assert imagenet_synsets(count) == tuple(info.label_names())
    assert imagenet_names(count) == tuple(info.label_descriptions())
    assert imagenet_synsets(7) is None


def test_the_order_is_that_of_imagenette():
    assert match_classes(CARD, 1000, IMAGENETTE).index == IMAGENETTE_INDICES


@pytest.mark.parametrize("card", [CARD, ModelCard()])
@pytest.mark.parametrize(
    ("classes", "index"),
    [
        (IMAGENETTE, IMAGENETTE_INDICES),
        (("n01440764-tench", "n02102040_English_springer"), (0, 217)),
        (tuple(sorted(map(str, range(1000)))), tuple(sorted(range(1000), key=str))),
        (("0000", "0217"), (0, 217)),
        (("Tench", "english_springer", "chain saw"), (0, 217, 491)),
        (imagenet_synsets(1000), tuple(range(1000))),
    ],
)
def test_names_of_folders(card, classes, index, caplog):
    with caplog.at_level(logging.WARNING):
        match = match_classes(card, 1000, classes)
    assert match.index == index
    assert match.names == imagenet_names(1000)
    (message,) = caplog.messages
    assert message.startswith("the data's classes are ")
    assert message.endswith("; matched to those of the model")


@pytest.mark.parametrize(
    "classes",
    [
        ("n01440764", "dog house"),  # not all ids
        ("n00000001",),  # no class
        ("0", "1000"),  # an index beyond the last class
        ("crane",),  # two classes
        ("tench", "Tinca tinca"),  # one class twice
        ("n01440764", "n01440764_tench"),
        ("cat", "dog"),
    ],
)
def test_what_does_not_match_is_refused(classes):
    if classes != ("crane",):  # the list names both cranes like this
        with pytest.raises(DataError, match="classes that the model does not know"):
            match_classes(CARD, 1000, classes)
    assert match_imagenet(CARD.classes, 1000, classes) is None


def test_other_networks_are_not_matched():
    other = ModelCard(classes=tuple(f"thing {i}" for i in range(1000)))
    with pytest.raises(DataError, match="n01440764"):
        match_classes(other, 1000, IMAGENETTE)
    with pytest.raises(DataError, match="1 classes"):
        match_classes(ModelCard(classes=("a", "b")), 2, ("0",))
    assert match_classes(ModelCard(), 2, ("0", "1")).names == ("0", "1")


def test_names_of_other_lists_are_imagenets():
    spelled = tuple(name.split(",")[0] for name in imagenet_names(1000))  # as torchvision's list
    match = match_classes(ModelCard(classes=spelled), 1000, IMAGENETTE)
    assert match.index == IMAGENETTE_INDICES
    assert match.names == spelled


def test_a_folder_is_evaluated(tmp_path, caplog):
    net = tp.create("vit-ti16", image_size=32, embed_dim=16, depth=1, num_heads=1, num_classes=1000)
    net.head.weight.data.zero_()
    net.head.bias.data[217] = 1.0  # an English springer, always
    for name in ("n01440764", "n02102040"):
        (tmp_path / "val" / name).mkdir(parents=True)
        for i in range(2):
            Image.fromarray(np.full((32, 32, 3), i, np.uint8)).save(tmp_path / "val" / name / f"{i}.JPEG")
    with caplog.at_level(logging.WARNING):
        result = tp.evaluate(net, str(tmp_path), workers=0)
    assert (result.top1, result.per_class[217], result.per_class[0]) == (0.5, 1.0, 0.0)
    assert result.classes[217].startswith("English springer")
    assert caplog.messages[0].startswith(
        "the data's classes are WordNet ids (n01440764 is tench, Tinca tinca)"
    )
