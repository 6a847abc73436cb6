"""The command line. A command (verb) is a module with a dataclass: its fields are the flags, and `run` does the work.

Nothing heavy is imported here: `triptych --help` reads a table, `triptych COMMAND --help` imports one small module and
tyro, and torch is imported when a command runs.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from triptych.errors import ConfigError, TriptychError, near_names

# Verb -> its module, the class or function in it, and what `triptych --help` says of it.
VERBS: dict[str, tuple[str, str, str]] = {
    "demo": ("demo", "Demo", "run the shipped networks on shipped images and plot triptych.png"),
    "list": ("list_models", "List", "list the networks that can be created by name"),
    "info": ("info", "Info", "describe a checkpoint file, folder or hub id"),
    "classify": ("classify", "Classify", "classify images"),
    "segment": ("segment", "Segment", "segment images: overlay, label map, legend, areas"),
    "explain": ("explain", "Explain", "plot attention heads, rollout, positions and filters"),
    "generate": ("generate", "generate", "generate images from a prompt, a class or an image"),
    "evaluate": (
        "evaluate",
        "Evaluate",
        "evaluate a model: accuracy, mIoU, confusion matrix, Fréchet distance",
    ),
    "train": ("train", "train", "train or fine-tune on your images; run it again to resume"),
    "plot": ("plot", "Plot", "plot the curves of a training run"),
    "convert": ("convert", "Convert", "convert a checkpoint to another library's format"),
    "export": ("export", "Export", "write a network as a graph: ONNX, OpenVINO, torch.export"),
    "bench": ("bench", "bench", "benchmark against timm, transformers and diffusers"),
}

USAGE = "usage: triptych COMMAND [...]\n       triptych COMMAND --help\n       triptych --version"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a verb; returns the exit code. A user's mistake is one line on stderr and 2, never a traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(args)
    except TriptychError as problem:
        return _fail(str(problem))
    except SystemExit as stop:  # tyro, after printing help
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        _fail("interrupted")
        return 130
    except BrokenPipeError:
        # The reader of our output left (`triptych list | head`). There is no reader for what Python would still flush.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as problem:
        if problem.filename is None:
            raise
        return _fail(f"{problem.filename}: {(problem.strerror or str(problem)).lower()}; check the path")


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        width = max(map(len, VERBS))
        print(USAGE, "", *(f"  {verb:<{width}}  {words}" for verb, (_, _, words) in VERBS.items()), sep="\n")
        return 0
    if args[0] == "--version":
        from triptych.version import __version__

        print(f"triptych {__version__}")
        return 0
    verb, rest = args[0], args[1:]
    if verb not in VERBS:
        near = near_names(verb, VERBS, limit=2, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else f"the commands are {', '.join(VERBS)}"
        raise ConfigError(f"no command is called {verb!r}; {hint}")
    module, name, _ = VERBS[verb]
    target = getattr(importlib.import_module(f"triptych.cli.{module}"), name)
    if not isinstance(
        target, type
    ):  # a verb that reads its arguments itself: train's flags depend on the recipe
        return target(rest) or 0
    from triptych.cli.parsing import logged_to_stderr, parse

    command = parse(target, rest, f"triptych {verb}")
    with logged_to_stderr():
        return command.run() or 0


def _fail(message: str) -> int:
    rank = os.environ.get("RANK", "0")  # of a process that torchrun started
    of = "" if rank == "0" else f" (process {rank})"
    print(f"triptych{of}: " + " ".join(message.split()), file=sys.stderr)
    return 2
