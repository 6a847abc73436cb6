"""Help answers at once: no torch, no matplotlib; and the flags of every verb are pinned here."""

import re
import subprocess
import sys

import pytest

from triptych.cli import VERBS, main

# Changing a flag is changing what people typed into their scripts: change it here too, and in CHANGELOG.
FLAGS = {
    "classify": "IMAGE... --model --top --dtype --batch-size --workers --on-bad-image --json",
    "convert": "SRC DST --format --json",
    "demo": "--out --model --json",
    "evaluate": "MODEL-or-RUN --data --split --batch-size --workers --dtype --on-bad-image --out --json",
    "explain": "IMAGE --model --out --size --json",
    "info": "FILE --json",
    "list": "[PATTERN] --json",
    "plot": "RUN --out",
}
HEAVY = (
    "torch",
    "matplotlib",
    "numpy",
    "PIL",
    "transformers",
    "datasets",
    "kornia",
    "huggingface_hub",
    "rich.progress",
)


@pytest.mark.parametrize("verb", FLAGS)
def test_flags(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    assert main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: triptych {verb} ")
    listed = [
        match[1]
        for match in re.finditer(
            r"^(?:│ | {2})(?:-h, )?(--?[\w-]+|\[?[A-Z]+\]?(?:-or-RUN|\.\.\.)?)", out, re.MULTILINE
        )
    ]
    assert " ".join(name for name in listed if name != "--help") == FLAGS[verb]
    assert all(len(line) <= 100 for line in out.splitlines() if line.startswith((" ", "│")))


def test_every_verb_is_listed_and_pinned(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for verb, (_, _, words) in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(words)}$", out, re.MULTILINE)
    assert set(FLAGS) | {"train", "bench"} == set(VERBS)


def loaded_by(*args):
    """Modules that a verb imports in a process of its own."""
    code = (
        "import sys\nfrom triptych.cli import main\n"
        f"code = main({list(args)!r})\nprint('LOADED', *sys.modules)\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split("LOADED")[1].split())


def test_help_imports_nothing_heavy():
    assert not loaded_by("--help") & {*HEAVY, "tyro", "rich"}


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_imports_nothing_heavy(verb):
    assert not loaded_by(verb, "--help") & set(HEAVY)


def test_list_imports_no_torch():
    assert "torch" not in loaded_by("list")


def test_import_triptych_imports_nothing_heavy():
    code = "import sys, triptych; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & set(HEAVY)


def test_console_script_and_module():
    for command in (
        ["-m", "triptych"],
        ["-c", "import sys; from triptych.cli import main; sys.exit(main())"],
    ):
        done = subprocess.run([sys.executable, *command, "clasify"], capture_output=True, text=True)
        assert done.returncode == 2
        assert done.stderr == "triptych: no verb is called 'clasify'; did you mean classify?\n"
    done = subprocess.run([sys.executable, "-m", "triptych", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("triptych 0.")


def test_a_reader_that_leaves_gets_no_traceback():
    script = f"{sys.executable} -m triptych list --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
