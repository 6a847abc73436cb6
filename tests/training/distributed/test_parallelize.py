"""Two processes do what one does: DDP and FSDP2 over gloo, for every kind of run, through checkpoints and deaths."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.training import torchrun_jobs
from tests.training.interrupted_runs import comparable_rows, interrupt_after, last_checkpoint, log_rows
from tests.training.nan_losses import make_losses_nan
from tests.training.torchrun_jobs import Job

import triptych as tp
from triptych.data.config import AugmentConfig, DataConfig
from triptych.diffusion.config import NoiseConfig
from triptych.errors import TriptychError
from triptych.evaluation.config import PerceptualConfig
from triptych.heads.config import HeadConfig
from triptych.layers.norm import BatchNorm
from triptych.training import run
from triptych.training.configs.base import ClassifyConfig, LoopConfig, LossConfig, OptimConfig, SegmentConfig
from triptych.training.configs.first_stage import (
    CodebookConfig,
    CompressConfig,
    DiscriminatorConfig,
)
from triptych.training.configs.second_stage import (
    CaptionConfig,
    LatentCacheConfig,
    SamplesConfig,
    SecondStageConfig,
)
from triptych.training.distributed.parallelize import LossModule, has_unused_parameters
from triptych.training.distributed.process_group import _agree_on_prefix, world_size
from triptych.training.runner import prepare
from triptych.training.task import LossOutput

LOADING = DataConfig(batch_size=6, workers=0, eval_fraction=0.2, eval_batch_size=2)
LOOP = LoopConfig(epochs=2, ema=0.9, precision="fp32", device="cpu")
STAGE = (
    "base_channels=8",
    "norm_groups=4",
    "channel_multipliers=[1,2]",
    "num_res_blocks=1",
    "latent_channels=4",
    "middle_attention=false",
)
CUT = 3  # steps
NAN_STEPS = (1, 3, 4)  # steps, from 0
NAN_RUNS = [("vit", "ddp"), ("vit", "fsdp"), ("kl", "ddp")]


def torchrun(jobs: list[Job], folder: Path, *flags: str) -> str:
    """Two processes do the jobs; gives what they said."""
    (folder / "jobs").write_bytes(pickle.dumps(jobs))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *flags]
    source, root = Path(tp.__file__).parents[1], Path(__file__).parents[3]
    done = subprocess.run(
        [*line, torchrun_jobs.__file__, str(folder / "jobs")], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{source}{os.pathsep}{root}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, Path]:
    """Images in class folders with captions, one of them damaged; and images with masks."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, color in {"blue": (30, 40, 200), "red": (200, 30, 30)}.items():
        (folder / "named" / name).mkdir(parents=True)
        for i in range(13):
            pixels = np.clip(np.array(color) + rng.normal(0, 25, (20, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / "named" / name / f"{i}.png")
            (folder / "named" / name / f"{i}.txt").write_text(f"a {name} square\nthe color {name}\n")
    (folder / "named" / "red" / "5.png").write_bytes(b"not an image")
    for name in ("images", "masks"):
        (folder / "masked" / name).mkdir(parents=True)
    for i in range(16):
        mask = np.zeros((16, 16), np.uint8)
        y, x = rng.integers(1, 8, 2)
        mask[y : y + 6, x : x + 6] = 1
        mask[: i % 5] = 255  # not as many known pixels in each
        pixels = rng.normal(100, 30, (16, 16, 3)) + 60 * mask[..., None]
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "masked" / "images" / f"{i}.png")
        Image.fromarray(mask).save(folder / "masked" / "masks" / f"{i}.png")
    (folder / "masked" / "classes.txt").write_text("ground\nsquare\n")
    (folder / "shards").mkdir()
    for number, part in enumerate(("blue", "red")):
        with tarfile.open(folder / "shards" / f"part-{number}.tar", "w") as tar:
            for i in range(12):
                tar.add(folder / "named" / part / f"{i}.png", f"{part}-{i:02}.png")
                label = tarfile.TarInfo(f"{part}-{i:02}.cls")
                label.size = 1
                tar.addfile(label, io.BytesIO(str(number).encode()))
    return {name: folder / name for name in ("named", "masked", "shards")}


@pytest.fixture(scope="module")
def configs(data, tmp_path_factory):
    """A tiny run of each kind; what chance there can be is there."""
    folder = tmp_path_factory.mktemp("nets")
    looker = tp.create(
        "vit-emoji",
        image_size=16,
        depth=1,
        embed_dim=16,
        num_heads=2,
        mlp_ratio=2.0,
        stem_widths=(8, 8),
        num_classes=0,
    )
    tp.save(looker, folder / "looker.safetensors")
    small = {
        "base_channels": 8,
        "channel_multipliers": (1, 2),
        "num_res_blocks": 1,
        "norm_groups": 4,
        "middle_attention": False,
    }
    tp.save(
        tp.create("kl-f8", image_size=16, latent_channels=2, scale=2.0, **small), folder / "stage.safetensors"
    )
    vit = ClassifyConfig(
        data=str(data["named"]),
        model="vit-ti16",
        model_args=(
            *("depth=2", "embed_dim=24", "num_heads=2", "mlp_ratio=2.0", "dropout=0.1"),
            *("stem=conv", "stem_widths=[8]", "patch_size=4"),
        ),
        image_size=(16, 16),
        head="cosine",  # with a scalar parameter, which FSDP does not shard
        drop_path_rate=0.2,
        loading=LOADING,
        augment=AugmentConfig(brightness=0.1, erasing=0.2, label_smoothing=0.1),
        optim=OptimConfig(lr=3e-3, warmup=0.1),
        loop=LOOP,
    )
    swin = SegmentConfig(
        data=str(data["masked"]),
        model="swin-emoji",
        model_args=(
            *(
                "embed_dim=16",
                "depths=[1,2]",
                "num_heads=[1,2]",
                "window_size=4",
                "stem_widths=[8]",
                "patch_size=2",
            ),
            "dropout=0.1",
        ),
        image_size=(16, 16),
        head=HeadConfig(type="unet", channels=16, image_branch_channels=8, aux_channels=8, dropout=0.1),
        loss=LossConfig(dice=0.5, focal=0.3, aux=0.0),  # a head that no loss looks at
        loading=replace(LOADING, batch_size=4),
        augment=AugmentConfig(crop_scale=(0.7, 1.0), brightness=0.1),
        optim=OptimConfig(lr=2e-3, warmup=0.1),
        loop=replace(LOOP, accumulate=2, epochs=3),
    )
    kl = CompressConfig(
        data=str(data["named"]),
        model_args=STAGE,
        image_size=(16, 16),
        perceptual=PerceptualConfig(model=str(folder / "looker.safetensors"), weight=0.3),
        discriminator=DiscriminatorConfig(channels=4, layers=1, start=0.3),
        features=str(folder / "looker.safetensors"),
        loading=LOADING,
        augment=AugmentConfig(crop_scale=(0.6, 1.0)),
        optim=OptimConfig(lr=1e-3, warmup=0.1, betas=(0.5, 0.9)),
        loop=LOOP,
    )
    ldm = SecondStageConfig(
        data=str(data["named"]),
        first_stage=str(folder / "stage.safetensors"),
        condition="text",
        model="unet-emoji",
        model_args=(
            *(
                "base_channels=8",
                "channel_multipliers=[1,2]",
                "num_res_blocks=1",
                "attention_downsample_factors=[2]",
                "norm_groups=4",
                "head_dim=8",
            ),
            "dropout=0.1",
        ),
        text=CaptionConfig(vocabulary=280, embed_dim=16, depth=1, head_dim=8, max_length=12),
        noise=NoiseConfig(min_snr=5.0, offset=0.1),
        drop_condition=0.2,
        samples=SamplesConfig(num_images=2, num_steps=2),
        cache=LatentCacheConfig(use="on", shard=4, dtype="fp32"),
        loading=LOADING,
        optim=OptimConfig(lr=1e-3),
        loop=LOOP,
    )
    return {
        "vit": vit,
        "swin": swin,
        "kl": kl,
        "vq": replace(
            kl,
            model="vq-f4",
            model_args=(*STAGE, "codebook_size=16"),
            codebook=CodebookConfig(update="ema", revive_below=0.5),
            discriminator=DiscriminatorConfig(weight=0.0),
            features=None,
        ),
        "ldm": ldm,
        "images": replace(ldm, cache=LatentCacheConfig(use="off"), condition="class", buckets=2),
        "stream": replace(vit, data=str(data["shards"]), loading=replace(LOADING, stream=True, lanes=4)),
        # Of two images one is damaged, so that a process has none.
        "pairs": replace(
            vit, head=None, loading=replace(LOADING, batch_size=2), loop=replace(LOOP, epochs=1)
        ),
    }


def by(config, way, **loop):
    return replace(config, loop=replace(config.loop, parallel=way, **loop))


@pytest.fixture(scope="module")
def alone(configs, tmp_path_factory):
    """Every run by one process."""
    folder = tmp_path_factory.mktemp("alone")
    for name, config in configs.items():
        run(config, folder / name)
    return folder


@pytest.fixture(scope="module")
def together(configs, tmp_path_factory):
    """Run each config with two processes, and resume some interrupted runs with another number of processes or in
    another mode."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(patch, CUT)
        run(configs["kl"], folder / "one-then-fsdp")
    jobs = [Job(by(config, "ddp"), folder / f"{name}-ddp") for name, config in configs.items()]
    jobs += [
        Job(by(configs["vit"], "fsdp", recompute=True), folder / "vit-fsdp"),
        Job(by(configs["swin"], "fsdp"), folder / "swin-fsdp"),
        Job(by(configs["ldm"], "fsdp"), folder / "ldm-fsdp"),
        Job(by(configs["kl"], "fsdp"), folder / "one-then-fsdp"),
        Job(by(configs["vit"], "fsdp"), folder / "fsdp-then-one", cut=CUT),
        Job(by(configs["vit"], "ddp"), folder / "ddp-then-fsdp", cut=CUT),
        Job(by(configs["vit"], "fsdp"), folder / "ddp-then-fsdp"),
        Job(by(configs["kl"], "ddp"), folder / "kl-ddp-twice", cut=CUT),
        Job(by(configs["kl"], "ddp"), folder / "kl-ddp-twice"),
        *(
            Job(
                by(configs[name], way, on_nonfinite="skip"),
                folder / f"{name}-{way}-nan_steps",
                nan_steps=NAN_STEPS,
            )
            for name, way in NAN_RUNS
        ),
    ]
    torchrun(jobs, folder)
    assert log_rows(folder / "fsdp-then-one")[-1]["step"] == CUT
    run(configs["vit"], folder / "fsdp-then-one")
    return folder


NAMES = ("vit", "swin", "kl", "vq", "ldm", "images", "stream", "pairs")


@pytest.mark.parametrize(
    ("name", "other"),
    [
        *((name, f"{name}-ddp") for name in NAMES),
        *((name, f"{name}-fsdp") for name in ("vit", "swin", "ldm")),
        *(("kl", "one-then-fsdp"), ("vit", "fsdp-then-one"), ("vit", "ddp-then-fsdp")),
    ],
)
def test_two_processes_log_what_one_does(alone, together, name, other):
    mine, theirs = (comparable_rows(folder) for folder in (alone / name, together / other))
    assert len(mine) == len(theirs) > 5
    for one, two in zip(mine, theirs, strict=True):
        assert one.keys() == two.keys()
        for key in one:
            a, b = (row[key] if key == "eval" else {key: row[key]} for row in (one, two))
            loose = {
                "frechet",
                "kernel",
            } & a.keys()  # of images rounded to 8 bits, which may differ by a level
            assert {k: v for k, v in a.items() if k not in loose} == pytest.approx(
                {k: v for k, v in b.items() if k not in loose}, abs=1e-5, rel=1e-4 if "norm" in key else 1e-5
            )
            assert all(a[k] == pytest.approx(b[k], rel=0.01) for k in loose)


def test_two_processes_that_were_cut_off_do_what_they_would_have_done(together):
    """Bit for bit, discriminator and averages too."""
    (one, facts), (other, others) = (last_checkpoint(together / name) for name in ("kl-ddp", "kl-ddp-twice"))
    assert one.keys() == other.keys()
    assert facts == others
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.mark.parametrize(("name", "way"), NAN_RUNS)
def test_a_step_that_one_process_spoils_is_skipped_by_all(
    configs, together, tmp_path, monkeypatch, name, way
):
    make_losses_nan(monkeypatch, *NAN_STEPS)
    run(by(configs[name], "auto", on_nonfinite="skip"), tmp_path)
    folder = together / f"{name}-{way}-nan_steps"
    mine, theirs = log_rows(tmp_path), log_rows(folder)
    assert [row["step"] for row in theirs if "skipped" in row] == [step + 1 for step in NAN_STEPS]
    for one, two in zip(mine, theirs, strict=True):
        assert one.keys() == two.keys()
        assert sorted(one.get("ids", ())) == sorted(two.get("ids", ()))
        assert one.get("loss", 0.0) == pytest.approx(two.get("loss", 0.0), rel=1e-5)
    (tensors, facts), (others, other_facts) = last_checkpoint(tmp_path), last_checkpoint(folder)
    assert facts["anomalies"]["skipped"] == other_facts["anomalies"]["skipped"]
    for key, tensor in tensors.items():
        torch.testing.assert_close(others[key], tensor, atol=2e-4, rtol=1e-3)
    steps = [key for key in tensors if key.endswith(".step")]
    assert all(torch.equal(tensors[key], others[key]) for key in steps)
    for step in NAN_STEPS:
        for rank in (0, 1):
            about = json.loads((folder / f"nonfinite-step-{step + 1}-rank-{rank}.json").read_text())
            assert about["terms"]["loss"] == "nan"
            assert about["gradients"]


@pytest.mark.parametrize("name", ["vit-fsdp", "ldm-fsdp"])
def test_shards_leave_a_whole_model(alone, together, name):
    mine, theirs = tp.load(alone / name.split("-")[0]), tp.load(together / name)
    assert mine.state_dict().keys() == theirs.state_dict().keys()
    assert replace(mine.card, figures={}) == replace(theirs.card, figures={})
    if name == "ldm-fsdp":
        assert mine.card.figures == pytest.approx(theirs.card.figures, rel=1e-5)
    for key, tensor in mine.state_dict().items():
        torch.testing.assert_close(theirs.state_dict()[key], tensor, atol=2e-4, rtol=1e-3)


def test_checkpoints_of_shards_hold_what_those_of_one_process_hold(alone, together):
    (one, facts), (other, others) = last_checkpoint(alone / "vit"), last_checkpoint(together / "vit-fsdp")
    assert {name: tensor.shape for name, tensor in one.items()} == {
        name: t.shape for name, t in other.items()
    }
    assert facts["loader"] == others["loader"]
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, atol=2e-4, rtol=1e-3)
    newest = sorted((together / "vit-fsdp" / "checkpoints").iterdir())[-1]
    assert {path.name for path in newest.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}


def test_a_process_that_dies_is_started_again_and_the_run_goes_on(configs, alone, tmp_path):
    config = by(configs["vit"], "fsdp", save_every=0.0)
    output = torchrun([Job(config, tmp_path / "r", dies=5)], tmp_path, "--max-restarts", "1")
    assert (tmp_path / "r.died").exists()
    assert "resuming from step" in output
    for one, two in zip(log_rows(alone / "vit"), log_rows(tmp_path / "r"), strict=True):
        assert one["step"] == two["step"]
        if "loss" in one:
            assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="names of threads as Linux shows them")
def test_a_run_ends_the_threads_of_its_process_groups(configs, tmp_path):
    """A thread of gloo that frees a tensor while the interpreter shuts down aborts the process."""
    script = tmp_path / "script.py"
    script.write_text(THREADS_AFTER_A_RUN)
    (tmp_path / "config").write_bytes(pickle.dumps(by(configs["vit"], "ddp")))
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*line, str(script), str(tmp_path)], capture_output=True, text=True, timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(tp.__file__).parents[1])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    threads = [json.loads(path.read_text()) for path in tmp_path.glob("threads-*")]
    assert len(threads) == 2
    for during, after in threads:
        assert any("gloo" in name for name in during)
        assert not any("gloo" in name for name in after)


THREADS_AFTER_A_RUN = """
import json, pickle, os, sys
from pathlib import Path

import triptych.training.runner as runner

def names():
    return [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]

during, fit, folder = [], runner.fit, Path(sys.argv[1])

def observed(run):
    outcome = fit(run)
    during.extend(names())
    return outcome

runner.fit = observed
runner.run(pickle.loads((folder / "config").read_bytes()), folder / "r")
(folder / f"threads-{os.environ['RANK']}").write_text(json.dumps([during, names()]))
"""


def test_each_start_on_the_same_store_gets_its_own_prefix():
    store = torch.distributed.HashStore()
    prefixes = []
    for _ in range(3):
        with ThreadPoolExecutor(3) as pool:
            names = set(pool.map(lambda rank: _agree_on_prefix(store, rank, 3), (1, 2, 0)))
        assert len(names) == 1
        prefixes += names
    assert len(set(prefixes)) == 3


def test_activations_that_are_computed_again_change_nothing(configs, alone, tmp_path):
    for name in ("vit", "swin"):
        run(by(configs[name], "auto", recompute=True), tmp_path / name)
        assert comparable_rows(tmp_path / name) == comparable_rows(alone / name)


def test_parameters_that_are_left_out_are_found_without_a_trace():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), BatchNorm(4), torch.nn.Linear(2, 2))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    step = LossModule(net, lambda net, batch: LossOutput(net[1](net[0](batch["image"])).square().mean(), {}))
    batch = {"image": torch.randn(2, 3, 5, 5)}
    torch.manual_seed(1)
    assert has_unused_parameters(step, batch, [net])
    net[2].requires_grad_(False)
    assert not has_unused_parameters(step, batch, [net])
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())


TWO = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("options", "batch", "environment", "words"),
    [
        (
            {"parallel": "fsdp"},
            8,
            {},
            "--loop.parallel fsdp needs several processes; start them with torchrun",
        ),
        (
            {"parallel": "none"},
            8,
            TWO,
            "torchrun started 2 processes and --loop.parallel is none; give ddp or fsdp",
        ),
        ({}, 7, TWO, "batch of 7 cannot be divided among 2 processes; give --loading.batch-size 8"),
        (
            {"device": "cuda:1"},
            8,
            TWO,
            "device is cuda:1 for 2 processes; give cpu, or cuda for one GPU each",
        ),
    ],
)
def test_impossible_process_groups_are_refused_in_one_line(options, batch, environment, words):
    with pytest.raises(TriptychError, match=words):
        world_size(LoopConfig(**options), batch, environment)


def test_one_process_needs_no_team():
    one = {"RANK": "0", "WORLD_SIZE": "1"}
    assert world_size(LoopConfig(), 7, {}) is world_size(LoopConfig(), 7, one) is None
    assert world_size(LoopConfig(parallel="fsdp"), 7, one) == 1
    assert world_size(LoopConfig(), 8, TWO) == world_size(LoopConfig(parallel="fsdp"), 8, TWO) == 2


def test_shards_have_no_codebook_to_write_to(configs, tmp_path):
    with pytest.raises(
        TriptychError, match=r"training updates a codebook in place.*give --loop.parallel ddp"
    ):
        prepare(by(configs["vq"], "fsdp"))
