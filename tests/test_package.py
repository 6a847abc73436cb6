"""The cost of imports, checked by lists of modules, since times are unreliable on a busy machine."""

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

import triptych as tp

# None of these comes with `import triptych`, nor with `triptych --help`.
HEAVY = {
    "torch", "numpy", "PIL", "tyro", "rich", "matplotlib", "einops", "jaxtyping", "kornia", "datasets", "safetensors",
}  # fmt: skip


def imported_by(script: str) -> set[str]:
    """Names of the modules in a fresh process after `script`."""
    script += "\nimport sys, json; print(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy():
    modules = imported_by("import triptych")
    assert "triptych" in modules
    assert not modules & HEAVY
    assert {name for name in modules if name.startswith("triptych.")} == {
        "triptych.lazy_imports",
        "triptych.version",
    }


def test_help_imports_nothing_heavy():
    modules = imported_by("from triptych.cli import main; assert main(['--help']) == 0")
    assert "triptych.cli" in modules
    assert not modules & HEAVY


def test_listing_models_needs_no_torch():
    modules = imported_by("import triptych; assert triptych.list_models('vit-*')")
    assert "triptych.models.registry" in modules
    assert not modules & HEAVY


def test_public_names_resolve():
    for name in tp.__all__:
        assert getattr(tp, name) is not None, name
    assert issubclass(tp.TriptychError, ValueError)
    assert tp.TriptychError is tp.TriptychError
    assert callable(tp.load)
    assert callable(tp.save)
    assert callable(tp.export)
    assert callable(tp.capture)


def test_dir_lists_public_names_before_their_first_use():
    done = subprocess.run(
        [sys.executable, "-c", "import triptych, sys; print(*dir(triptych)); assert 'torch' not in sys.modules"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert set(tp.__all__) <= set(done.stdout.split())


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'lod'"):
        tp.lod  # noqa: B018
    with pytest.raises(ImportError):
        exec("from triptych import nothing_of_this_name")


def test_the_version_is_the_distributions():
    assert tp.__version__ == importlib.metadata.version("triptych")


def test_the_package_says_it_is_typed():
    assert (Path(tp.__file__).parent / "py.typed").is_file()


def test_every_name_for_type_checkers_is_public():
    # `if TYPE_CHECKING` in __init__ repeats the table for editors: both lists must stay the same.
    text = Path(tp.__file__).read_text()
    block = text.split("if TYPE_CHECKING:")[1].split("def __getattr__")[0]
    named = {line.split(" as ")[1].strip() for line in block.splitlines() if " as " in line}
    assert named | {"__version__"} == set(tp.__all__)


def test_the_collector_is_left_out_of_imports_and_back_after_them():
    names = "import gc, triptych.lazy_imports as lazy\n"
    watch = "ran = []\ngc.callbacks.append(lambda phase, info: ran.append(info))\n"
    imports = (
        "import triptych as tp\ntp.ClassificationPipeline\nassert not ran, len(ran)\nassert gc.isenabled()\n"
    )
    frozen = "loop = []\nloop.append(loop)\ndel loop\nassert gc.collect() and gc.get_freeze_count() == 0\n"
    assert "torch" in imported_by(names + watch + imports + frozen)
    off = "gc.disable()\nimport triptych as tp\ntp.create\nassert not gc.isenabled()\n"
    imported_by(names + off)
    frozen = "gc.freeze()\nimport triptych as tp\ntp.create\nassert gc.get_freeze_count()\n"
    imported_by(names + frozen)
