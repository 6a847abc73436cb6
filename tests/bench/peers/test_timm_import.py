"""Importing timm without torchvision, with small packages of these names, each in a process of its own."""

import importlib.util

import pytest
import torch

from triptych.bench.harness.forward import TOLERANCES
from triptych.bench.harness.subprocesses import run_code
from triptych.bench.harness.timing import check_equal
from triptych.bench.peers import build as peers
from triptych.bench.suites import swin, train, vit

TIMM = """
import torchvision.transforms as T
import torchvision.transforms.functional as F
from torchvision import datasets
from torchvision.ops.misc import FrozenBatchNorm2d
from torchvision.transforms import InterpolationMode

class Pipeline(T.Compose):
    sizes: "T.Resize | None" = None

NAMES = {InterpolationMode.NEAREST: "nearest", InterpolationMode.BICUBIC: "bicubic"}
MODES = {name: mode for mode, name in NAMES.items()}
frozen = isinstance(NAMES, FrozenBatchNorm2d)
"""

USE = """
import sys
from triptych.bench.children.process_memory import report
sys.path.insert(0, sys.argv[1])
{before}
from triptych.bench.peers import timm_import
found, why = timm_import.timm()
assert timm_import.timm() == (found, why)
assert sys.modules["timm"] is found
{after}
report(why=why, left=[name for name in sys.modules if name.startswith("torchvision")])
"""


def used(folder, after="", before=""):
    return run_code(USE.format(before=before, after=after), folder).reported


def package(folder, name, text):
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(text)


@pytest.fixture
def place(tmp_path):
    package(tmp_path, "timm", TIMM)
    return tmp_path


# Hides torchvision, whether or not it is installed.
ABSENT = """
import importlib.machinery as machinery
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = lambda name, *rest: None if name == "torchvision" else find(name, *rest)
"""


def test_placeholders_stand_in_and_are_gone(place):
    after = """
assert found.frozen is False
assert found.NAMES[found.MODES["bicubic"]] == "bicubic" and len(found.NAMES) == 2
import importlib.util
try:
    import torchvision
except ModuleNotFoundError:
    assert importlib.util.find_spec("torchvision") is None
else:
    raise AssertionError("it is still there")
"""
    assert used(place, after, ABSENT) == {"why": "No module named 'torchvision'", "left": []}


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("found.T.Compose([])", "torchvision.transforms.Compose"),
        ("found.F.resize(None, 8)", "torchvision.transforms.functional.resize"),
        ("found.datasets.CIFAR10('data', train=True)", "torchvision.datasets.CIFAR10"),
        ("found.InterpolationMode.NEAREST()", "torchvision.transforms.InterpolationMode.NEAREST"),
        ("found.Pipeline([])", "timm.Pipeline"),
    ],
)
def test_a_placeholder_that_is_used_raises(place, call, name):
    with pytest.raises(
        RuntimeError, match=f"RuntimeError: {name} is used, but torchvision cannot be imported"
    ):
        used(place, call, ABSENT)


def test_a_torchvision_that_works_is_preferred(place):
    package(place, "torchvision", "from torchvision import datasets, ops, transforms")
    package(place / "torchvision", "datasets", "")
    package(place / "torchvision", "ops", "")
    (place / "torchvision" / "ops" / "misc.py").write_text("class FrozenBatchNorm2d: pass")
    modes = "class InterpolationMode:\n    NEAREST, BICUBIC = 1, 2\n"
    package(place / "torchvision", "transforms", modes + "class Compose(list): pass")
    (place / "torchvision" / "transforms" / "functional.py").write_text("")
    reported = used(
        place, "assert found.Pipeline([1]) == [1] and found.MODES == {'nearest': 1, 'bicubic': 2}"
    )
    assert reported["why"] is None
    assert "torchvision.transforms.functional" in reported["left"]


def test_a_torchvision_for_another_torch(place):
    """Modules that its failed import leaves behind are removed, too."""
    package(place, "torchvision", "from torchvision import extension\nraise RuntimeError('no operator nms')")
    (place / "torchvision" / "extension.py").write_text("")
    assert used(place) == {"why": "no operator nms", "left": []}


def test_the_previous_entry_is_restored(place):
    """None in `sys.modules` prevents the import of a module."""
    after = "assert sys.modules['torchvision'] is None"
    reported = used(place, after, "sys.modules['torchvision'] = None")
    assert reported == {
        "why": "import of torchvision halted; None in sys.modules",
        "left": ["torchvision"],
    }


NOTES = """
import sys
from triptych.bench.children.process_memory import report
sys.path.insert(0, sys.argv[1])
from triptych.bench.peers import build as peers
available, notes = peers.present(("timm", "no_such_library"))
left = [name for name in sys.modules if name.startswith(("timm", "torchvision"))]
report(available=available, notes=notes, left=left)
"""


def test_the_report_says_so(place):
    reported = run_code(ABSENT + NOTES, place).reported
    assert reported["available"] == ["timm"]
    assert reported["notes"] == [
        "timm was imported with a stand-in for torchvision (No module named 'torchvision'), which its networks' "
        "forward passes do not touch.",
        "no_such_library is not measured: No module named 'no_such_library'.",
    ]


def test_timm_is_left_out_where_names_are_not_enough(place):
    (place / "timm" / "data.py").write_text(TIMM + "NAMES = [mode.value for mode in InterpolationMode]")
    (place / "timm" / "__init__.py").write_text("from timm import data")
    reported = run_code(ABSENT + NOTES, place).reported
    assert (reported["available"], reported["left"]) == ([], [])
    assert reported["notes"][0] == (
        "timm is not measured: No module named 'torchvision', and timm needs more of it than names: "
        "'_Placeholder' object is not iterable."
    )


installed = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")


@installed
def test_timms_networks_are_ours():
    """A ViT, and a Swin at a size without padding, for which timm is correct."""
    available, _ = peers.present(("timm",))
    assert available == ("timm",)
    for net in (vit.make(vit.QUICK, "vit-ti16"), swin.make(swin.QUICK)):
        images = torch.randn(2, 3, *net.config.image_size)
        (theirs,) = peers.build(net, torch.float32, available).values()
        with torch.inference_mode():
            check_equal({"ours": net(images), "timm": theirs(images)}, TOLERANCES["fp32"])


@installed
def test_timms_networks_train_like_ours(tmp_path):
    """`steps` raises an error if losses or gradients of the first steps differ."""
    tasks = train.classifier_tasks(train.QUICK, tmp_path, ("timm",))
    rows = train.steps(tasks, train.QUICK, {"fp32": 1e12, "bf16": 1e12})
    assert [row["ratio to timm"].median > 0 for row in rows] == [True] * 4
