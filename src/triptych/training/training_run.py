"""What belongs to one training run."""

import copy
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from triptych import weights
from triptych.data.loading.loader import Loader
from triptych.distributed import ProcessGroup
from triptych.layers.lora import merge_low_rank
from triptych.metrics.cost import count_macs
from triptych.network import Network
from triptych.training.adversary import Adversary
from triptych.training.configs.registry import RunConfig, run_to_json
from triptych.training.distributed.parallelize import SingleProcess
from triptych.training.monitoring.throughput import Throughput
from triptych.training.run_folder import MODEL_FILE, NEWEST
from triptych.training.task import Task


@dataclass(kw_only=True)
class Run:
    """Everything that belongs to a training run: built by the `prepare` of its task, and placed on its device.

    `triptych.training.run` adds folder, processes and throughput before it calls `triptych.training.loop.fit`.
    """

    config: RunConfig
    net: Network
    """The trained network, on `device`: parameters that require a gradient are trained."""
    task: Task
    train_loader: Loader
    eval_loader: Loader
    device: torch.device
    dtype: torch.dtype
    """The dtype of matrix products."""
    autocast: Any
    """Returns the context that forward passes run in."""
    fingerprint: str
    """Hash of the data, and of all frozen networks."""
    num_images: tuple[int, int]
    """Training and evaluation images."""
    adversary: Adversary | None = None
    """A network that is trained against `net`, on the same batches."""
    macs: Callable[[], int] | None = None
    """Returns the multiply-accumulates for one image; needed if what the task saves does not map images to logits or
    maps."""
    on_start: Callable[[Path, ProcessGroup], None] | None = None
    """Called with the run's folder and its processes before the first step."""
    on_evaluation: Callable[[Path, int], None] | None = None
    """Called with the run's folder and the step after each evaluation."""
    save: Callable[[Network, dict[str, float], Path], None] | None = None
    """Saves the network with its metrics into a folder, in place of model.safetensors."""
    on_finish: Callable[[Path], None] | None = None
    """Called with the run's folder after the last step, also when a finished run is started again."""
    folder: Path = field(default_factory=Path)
    parallel: SingleProcess = field(default_factory=SingleProcess)
    """How the run is spread over processes."""
    throughput: Throughput = field(init=False)

    def __post_init__(self) -> None:
        self.throughput = Throughput(self.device)

    def config_dict(self) -> dict[str, Any]:
        """Return the content of config.json: version, task, the config's fields, and the fingerprint."""
        return {**run_to_json(self.config), "fingerprint": self.fingerprint}

    def save_network(self, net: Network, metrics: dict[str, float], is_best: bool) -> None:
        """Save a network that was just evaluated: the best so far into the run's folder, any other into its folder
        `NEWEST`, which exists only while the newest network is not the best one."""
        newest = self.folder / NEWEST
        if not is_best:
            newest.mkdir(exist_ok=True)
        self._save_into(self.folder if is_best else newest, net, metrics)
        if is_best:
            shutil.rmtree(newest, ignore_errors=True)

    def _save_into(self, folder: Path, net: Network, metrics: dict[str, float]) -> None:
        if self.save is not None:
            return self.save(net, metrics, folder)
        product = self.task.product(copy.deepcopy(net))
        merge_low_rank(product)
        metrics = {name: float(value) for name, value in metrics.items()}
        product.card = replace(product.card, figures=metrics)
        weights.save(product, folder / MODEL_FILE)

    def forward_macs(self) -> int:
        """Return the multiply-accumulates of a forward pass for one image of the run's size."""
        if self.macs is not None:
            return self.macs()
        product = self.task.product(copy.deepcopy(self.net))
        channels = getattr(product.config, "in_channels", 3)
        return count_macs(product, (1, channels, *self.net.card.preprocess.size))
