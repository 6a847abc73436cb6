"""`--help` is fast, since it imports neither torch nor matplotlib; and the flags of each command."""

import contextlib
import io
import re
import subprocess
import sys

import pytest

from triptych.cli import VERBS, main
from triptych.cli.parsing import WrappedHelp

# Changing a flag breaks users' scripts: change it here, too, and mention it in CHANGELOG.
TRAINING = """
    --loading.batch-size --loading.eval-batch-size --loading.workers --loading.load-size --loading.cache
    --loading.on-bad-image --loading.max-pixels --loading.value-range --loading.bands
    --loading.keep-alpha --loading.sampling --loading.stream --loading.shuffle-buffer
    --loading.lanes
    --loading.eval-fraction --loading.image-column
    --loading.label-column --loading.caption-column --loading.mask-column
    --loading.ignore-index --loading.reduce-zero-label --loading.mask-threshold --loading.mask-palette
    --augment.image-size --augment.crop-scale --augment.crop-ratio --augment.flip --augment.degrees
    --augment.translate --augment.zoom --augment.shear --augment.brightness --augment.contrast
    --augment.saturation --augment.hue --augment.grayscale --augment.rand-augment
    --augment.rand-augment-magnitude --augment.erasing --augment.mixup --augment.cutmix
    --augment.mix-probability --augment.label-smoothing --augment.random-background --augment.background
    --augment.mean --augment.std
    --optim.lr --optim.final-lr --optim.warmup --optim.weight-decay --optim.betas --optim.layer-decay
    --optim.clip
    --loop.epochs --loop.accumulate --loop.precision --loop.device --loop.parallel --loop.recompute
    --loop.compile --loop.ema --loop.seed --loop.log-every --loop.eval-every --loop.save-every --loop.keep
    --loop.on-nonfinite --loop.tensorboard
"""
FLAGS = {
    "bench": "SUITE --out --quick --short --compiled --json",
    "classify": "IMAGE... --model --top --dtype --compile --batch-size --workers --on-bad-image --max-pixels --json",
    "convert": "SRC DST --format --prediction --json",
    "demo": "--out --classifier --segmenter --generator --json",
    "evaluate": "[MODEL-or-RUN] --data --split --include-trained --batch-size --workers --dtype --compile"
    " --on-bad-image --max-pixels --image-column --label-column --mask-column --ignore-index --reduce-zero-label"
    " --mask-threshold --mask-palette --size --window --overlap --scales"
    " --flip --caption-column --samples --extractor --reference --classifier --num-steps --guidance-scale --sampler"
    " --seed --out --json",
    "explain": "IMAGE --model --out --point --size --json",
    "export": "MODEL OUT --format --dynamic --size --prediction --json",
    "generate": "[PROMPT] --prompts --class --box --model --num-images --size --from --lora --lora-dir"
    " --embedding --out --skip-existing --strip --preview --batch-size --prediction --dtype --compile"
    " --json --negative-prompt --num-steps --guidance-scale --seed --height --width --sampler"
    " --schedule --clip-skip --rng --variation-seed --variation-strength --hires-scale --hires-steps --hires-strength"
    " --hires-upscaler --init-image --strength --mask-image --mask-feather --depth-map --class-map"
    " --noise-level --guidance-rescale --guidance-interval --merge-tokens --deep-cache --decoder"
    " --tiling --tiled-decode",
    "info": "FILE --json",
    "list": "[PATTERN] --json",
    "plot": "RUN --out",
    "segment": "IMAGE... --model --out --write --skip-existing --size --window --overlap --scales --flip --dtype"
    " --compile --batch-size --workers --on-bad-image --max-pixels --json",
    "train latent-diffusion": f"""
        --out --dry-run --json
        --data --model --model-args --init --image-size --first-stage --condition --image-encoder --prediction --train
        --buckets --drop-condition
        {TRAINING}
        --text.encoder --text.vocabulary --text.max-length --text.embed-dim --text.depth --text.head-dim --text.train
        --lora.rank --lora.alpha --lora.feed-forward --word.name --word.like --word.vectors --word.templates
        --process.schedule --process.beta-start --process.beta-end --process.num-timesteps --process.zero-terminal-snr
        --process.prediction
        --noise.times --noise.logit-mean --noise.logit-std --noise.min-snr --noise.offset
        --cache.use --cache.folder --cache.dtype --cache.shard --cache.batch-size
        --samples.num-images --samples.prompts --samples.num-steps --samples.guidance-scale
    """,
    "train simmim": f"""
        --out --dry-run --json
        --data --model --model-args --init --image-size --mask-patch --mask-ratio --drop-path-rate
        {TRAINING}
    """,
    "train swin": f"""
        --out --dry-run --json
        --data --model --model-args --init --image-size --drop-path-rate --in-channels --frozen-blocks
        {TRAINING}
        --head.type --head.num-classes --head.channels --head.blocks --head.pool-scales --head.image-branch-channels
        --head.dropout --head.aux-channels
        --loss.cross-entropy --loss.dice --loss.focal --loss.focal-gamma --loss.label-smoothing
        --loss.class-weights --loss.aux
    """,
    "train vit": f"""
        --out --dry-run --json
        --data --model --model-args --init --image-size --in-channels --eval-crop --head --drop-path-rate --train
        --frozen-blocks --lora-rank --teacher --teacher-share --temperature
        {TRAINING}
        --loss.type --loss.class-weights
    """,
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
    assert main([*verb.split(), "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"usage: triptych {verb} ")
    # Within tyro's frame names are at the start of the line, descriptions are indented.
    name = r"^(?:│ | {2})(?:-h, )?(--\w[\w.-]*|\[?[A-Z]{2,}(?:-or-RUN|\.\.\.)?\]?)(?=\s)"
    listed = [match[1] for match in re.finditer(name, out, re.MULTILINE)]
    assert " ".join(name for name in listed if name != "--help") == " ".join(FLAGS[verb].split())
    # Commands in the description of a recipe are indented by four, and may be longer.
    assert all(len(line) <= 100 for line in out.splitlines() if not line.startswith("    "))


def test_every_verb_is_listed_and_pinned(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for verb, (_, _, words) in VERBS.items():
        assert re.search(rf"^  {verb} +{re.escape(words)}$", out, re.MULTILINE)
    assert {verb.split()[0] for verb in FLAGS} == set(VERBS)


@pytest.mark.parametrize("args", [[], ["train"]])
def test_lists_fit_a_terminal_of_80_columns(args, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main(args) == 0
    assert all(len(line) <= 80 for line in capsys.readouterr().out.splitlines())


def test_prose_is_wrapped_also_around_the_colors_of_a_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    usage = "\x1b[1musage:\x1b[0m triptych demo" + " [\x1b[1m--flag\x1b[0m]" * 8
    frame, command = "\x1b[2m│\x1b[0m" + "x" * 70, "    triptych " + "x" * 70
    prose = "a word " * 20
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stdout(WrappedHelp()):
        print(f"{usage}\n\n\n{prose}\n\n{command}")
        print(frame)
    head, text, *rest = out.getvalue().split("\n\n")
    assert head.startswith("usage: triptych demo [--flag]")
    assert all(len(line) <= 60 for line in (head + "\n" + text).splitlines())
    assert text.split() == prose.split()
    assert rest == [f"{command}\n{frame}\n"]


def test_a_flag_in_the_place_of_the_recipe_is_named(capsys):
    assert main(["train", "--data", "emoji"]) == 2
    assert "the first argument is --data, which must be a recipe" in capsys.readouterr().err


def loaded_by(*args):
    """Return the modules that a command imports in a fresh process."""
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
        assert done.stderr == "triptych: no command is called 'clasify'; did you mean classify?\n"
    done = subprocess.run([sys.executable, "-m", "triptych", "--version"], capture_output=True, text=True)
    assert done.stdout.startswith("triptych 0.")


def test_a_closed_pipe_gives_no_traceback():
    script = f"{sys.executable} -m triptych list --json | head -c 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", script], capture_output=True, text=True)
    assert done.stderr == ""
