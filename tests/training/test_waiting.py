"""Within a step the host does not wait for the device, so that the device always has work."""

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests.training.distributed.test_parallelize import configs, data  # noqa: F401 - fixtures
from tests.training.sync_detector import SyncDetector, watch_calls, watch_steps

import triptych as tp
from triptych.data.augment import batch as augment
from triptych.data.config import AugmentConfig
from triptych.distributed import SINGLE_PROCESS
from triptych.kernels import dispatch
from triptych.training import loop, run
from triptych.training.configs.base import PretrainConfig
from triptych.training.configs.first_stage import CodebookConfig, DiscriminatorConfig
from triptych.training.monitoring.anomalies import nonfinite_flag
from triptych.training.optim import clip
from triptych.training.runner import prepare
from triptych.training.second_stage import task as denoise
from triptych.training.tasks.classification import Classify, Teacher

RUNS = ("vit", "taught", "swin", "simmim", "kl", "vq", "ldm", "images")


@pytest.fixture(scope="module")
def runs(configs, tmp_path_factory):  # noqa: F811
    """A tiny run of each kind, one epoch long, with all that takes part in a step."""
    vit, ldm = configs["vit"], configs["ldm"]
    everything = AugmentConfig(
        brightness=0.2, hue=0.1, saturation=0.2, mixup=0.2, cutmix=0.5, erasing=0.3, label_smoothing=0.1
    )
    folder = tmp_path_factory.mktemp("taught")
    teacher = tp.create(
        "vit-ti16", image_size=24, depth=1, embed_dim=24, num_heads=2, mlp_ratio=32 / 24, num_classes=2
    )
    preprocess = replace(teacher.card.preprocess, mean=(0.4, 0.5, 0.6))
    teacher.card = replace(teacher.card, classes=("blue", "red"), preprocess=preprocess)
    tp.save(teacher, folder / "teacher.safetensors")
    changed = {
        **configs,
        "vit": replace(vit, augment=everything, loop=replace(vit.loop, accumulate=2, epochs=2)),
        "taught": replace(vit, teacher=str(folder / "teacher.safetensors"), head=None),
        "simmim": PretrainConfig(
            data=vit.data,
            model=vit.model,
            model_args=vit.model_args[:4],
            image_size=(16, 16),
            mask_patch=16,
            loading=vit.loading,
            loop=vit.loop,
        ),
        "kl": replace(configs["kl"], features=None),
        "vq": replace(
            configs["vq"],
            codebook=CodebookConfig(update="ema", revive_below=0.9, decay=0.7),
            discriminator=DiscriminatorConfig(channels=4, layers=1, start=0.3, adaptive=False),
        ),
        "ldm": replace(ldm, samples=replace(ldm.samples, num_images=0)),
        "images": replace(configs["images"], samples=replace(ldm.samples, num_images=0)),
    }
    return {
        name: replace(changed[name], loop=replace(changed[name].loop, epochs=changed[name].loop.accumulate))
        for name in RUNS
    }


def without_checks(labels, classes):
    """`F.one_hot`, which checks its labels on the CPU only."""
    return (labels[:, None] == torch.arange(classes, device=labels.device)).long()


@pytest.fixture(params=["cpu"])
def waits(request, monkeypatch):
    detector = SyncDetector(request.param)
    watch_calls(monkeypatch, detector)
    monkeypatch.setattr(dispatch, "_get_current_dispatch_mode", lambda: None)  # it traces nothing
    monkeypatch.setattr(augment.F, "one_hot", without_checks)
    return detector


@pytest.mark.parametrize("name", RUNS)
def test_a_step_of_a_run_waits_for_nothing(runs, tmp_path, waits, monkeypatch, name):
    steps = watch_steps(monkeypatch, waits)
    with waits:
        assert run(runs[name], tmp_path).finished
    assert len(steps) >= 3
    assert waits.seen > 100 * len(steps)
    assert waits.events == []


@pytest.mark.parametrize(
    "ask",
    [
        lambda loss: loss.item(),
        lambda loss: bool(loss > 0),
        lambda loss: float(loss.detach()),
        lambda loss: loss.detach().tolist(),
        lambda loss: loss[loss > 0],
        lambda loss: loss.reshape(1).nonzero(),
        lambda loss: loss.detach().cpu(),
        lambda loss: loss.detach().numpy(),
    ],
    ids=("item", "bool", "float", "tolist", "mask", "nonzero", "cpu", "numpy"),
)
def test_a_step_that_waits_is_noticed(runs, tmp_path, waits, monkeypatch, ask):
    sound = Classify.loss

    def waiting(self, model, batch):
        output = sound(self, model, batch)
        ask(output.loss)
        return output

    monkeypatch.setattr(Classify, "loss", waiting)
    watch_steps(monkeypatch, waits)
    with waits:
        run(runs["vit"], tmp_path)
    assert waits.events


class Drawn:
    """Stands for a generator on the device, of which `randn` and its kin know nothing here."""

    device = torch.device("meta")


def passes(config, folder, waits, monkeypatch):
    """The passes of two steps on `meta`, a device that has nothing to tell: whoever asks it for a number fails, and
    what goes there is seen on its way. The second is watched: the first makes tables that are kept there (Swin's
    windows, the process of a diffusion model)."""
    parts = prepare(replace(config, loop=replace(config.loop, precision="fp32")))
    if parts.on_start is not None:
        parts.on_start(folder, SINGLE_PROCESS)
    meta, streams, task = torch.device("meta"), denoise.random_streams, vars(parts.task)
    others = [
        task.get(name) for name in ("first_stage", "frozen_encoder", "distance", "discriminator", "teacher")
    ]
    for net in (parts.net, *others):
        if net is not None:
            (net.net if isinstance(net, Teacher) else net).to(meta)
    for name in ("rand", "randn", "randperm"):
        real = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _real=real, generator=None, **k: _real(*a, **k))
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())  # knows no such device
    monkeypatch.setattr(
        denoise, "random_streams", lambda seed, device: (streams(seed, torch.device("cpu"))[0], Drawn)
    )
    batches = iter(parts.train_loader)
    for step in range(2):
        batch = next(batches)
        with waits:
            waits.on = step > 0
            batch = loop.to_device(batch, meta) | {"seed": (0, step, 0), "progress": 1.0}
            loss, logs, inputs = parts.task.loss(parts.net, batch)
            loss.backward()
            if parts.adversary is not None:
                logs |= parts.adversary.backward(inputs, 1.0, contextlib.nullcontext)
            norm, _ = clip(parts.net, 1.0)
            assert nonfinite_flag({"loss": loss, **logs, "grad_norm": norm}).device == meta
            waits.on = False


@pytest.mark.parametrize("waits", ["meta"], indirect=True)
@pytest.mark.parametrize("name", RUNS)
def test_what_goes_to_a_device_is_not_waited_for(runs, tmp_path, waits, monkeypatch, name):
    passes(runs[name], tmp_path, waits, monkeypatch)
    assert waits.seen > 100
    assert waits.events == []


@pytest.mark.parametrize("waits", ["meta"], indirect=True)
@pytest.mark.parametrize(
    ("owner", "name", "waiting"),
    [
        (augment, "copy_to_device", lambda tensor, device: tensor.to(device)),
        (
            augment,
            "copy_to_device",
            lambda tensor, device: torch.tensor(tensor.tolist(), device=device).to(tensor.dtype),
        ),
        (
            loop,
            "copy_to_device",
            lambda tensor, device: torch.empty_like(tensor, device=device).copy_(tensor),
        ),
    ],
)
def test_what_is_waited_for_is_noticed(runs, tmp_path, waits, monkeypatch, owner, name, waiting):
    monkeypatch.setattr(owner, name, waiting)
    passes(runs["vit"], tmp_path, waits, monkeypatch)
    assert waits.events


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", RUNS)
def test_cuda_reports_no_synchronization(runs, tmp_path, waits, monkeypatch, name):
    """Except for what is created once, in the first step."""
    steps: list[int] = []

    class Switch(SyncDetector):
        def __setattr__(self, name: str, value: Any) -> None:
            super().__setattr__(name, value)
            if name == "on":
                torch.cuda.set_sync_debug_mode("error" if value and steps else "default")

    waits = Switch("cuda")
    steps = watch_steps(monkeypatch, waits)
    try:
        assert run(replace(runs[name], loop=replace(runs[name].loop, device="cuda")), tmp_path).finished
    finally:
        torch.cuda.set_sync_debug_mode("default")
