"""A public name means one thing in the package.

python tests/test_names.py        # print the names that the lists below do not have, ready to be added
"""

import ast
import re
from collections import defaultdict
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "triptych"

# Parallel structure on purpose: the same thing for another network, format, stage, suite or module.
PARALLEL = frozenset(
    re.findall(
        r"\w+",
        """
    FORMAT FORMATS SIZES TITLE Layout layout_of read draft table read_stage read_tiny read_unet
    draft_stage draft_unet heads mlp stem attention tokens settings map_head
    Block Middle Stage macs parameters make_head build_network prepare
    FULL QUICK TINY Plan run make table row CLASSIFIER
    matches matches_stage matches_tiny matches_unet imported start train evaluate
    IDLE LOSSES NOTHING recognizes
    find SAMPLERS Window Images Latents Size Shape T N A B log main write save show
    """,
    )
)
# Different things that still share a name. This list only gets shorter: rename instead of adding to it.
SHARED = frozenset(
    re.findall(
        r"\w+",
        """
    CLASSES Classify Condition DIFFERENT DIFFUSERS DTYPES EPS GAP HEAD IMAGENET_MEAN IMAGENET_STD KEY
    LARGEST LAYOUTS OLD PAPER PROMPTS STEM SUFFIXES Segment Source TEXT TIMM TOLERANCES Task UNET UNUSED
    VERSION attention_distance build compare decoding describe draw drawn from_json loading measured
    memory percent position_similarity ratio read_table scaling shortened stage_of starting steps
    throughput to_json
    """,
    )
)


def public_names(source: str) -> set[str]:
    """Return the public functions, classes and variables that a module defines at its top level."""
    names = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {
                part.id for target in node.targets for part in ast.walk(target) if isinstance(part, ast.Name)
            }
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def shared_names() -> dict[str, list[str]]:
    """Return the public names that several modules define, with these modules."""
    modules = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        for name in public_names(path.read_text(encoding="utf-8")):
            modules[name].append(str(path.relative_to(PACKAGE)))
    return {name: paths for name, paths in sorted(modules.items()) if len(paths) > 1}


def test_a_public_name_means_one_thing():
    """If a new name fails here, rename it; if it is the same thing for another network, add it to PARALLEL."""
    new = {name: paths for name, paths in shared_names().items() if name not in PARALLEL | SHARED}
    assert not new, "\n".join(f"{name}: {', '.join(paths)}" for name, paths in new.items())


def test_names_of_values_and_functions_are_found():
    source = "A, B = 1, 2\nC: int = 3\n_d = 4\ndef e(): f = 5\nclass G: h = 6\n"
    assert public_names(source) == {"A", "B", "C", "e", "G"}


if __name__ == "__main__":
    print(*(name for name in shared_names() if name not in PARALLEL | SHARED), sep="\n")
