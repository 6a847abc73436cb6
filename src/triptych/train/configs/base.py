"""What a training run is, as data: checked when made, stored with every checkpoint. No torch here."""

from dataclasses import dataclass, field
from typing import Literal

from triptych.config import check
from triptych.config import need as _need
from triptych.data.config import AugmentConfig, DataConfig
from triptych.errors import UserError
from triptych.heads.config import HeadConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019), linear warmup, cosine decay."""

    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 0.0
    """Learning rate at the end, as a share of the peak."""
    warmup: float = 0.05
    """Share of the run over which the learning rate rises from 0."""
    weight_decay: float = 0.05
    """Decoupled decay; norms, biases, positions, tokens and gains have none."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the running mean of the gradient, and of its square."""
    layer_decay: float = 1.0
    """Each layer's learning rate is this times that of the layer above it; 1 is off, 0.75 usual in fine-tuning."""
    clip: float = 1.0
    """Norm that the gradient is clipped to; 0 is off."""

    def __post_init__(self) -> None:
        check(self)
        _need(self.lr > 0, self, "lr", "positive")
        _need(0 <= self.final_lr <= 1, self, "final_lr", "from 0 to 1")
        _need(0 <= self.warmup < 1, self, "warmup", "a share from 0 to below 1")
        _need(self.weight_decay >= 0, self, "weight_decay", "at least 0")
        _need(0 < self.layer_decay <= 1, self, "layer_decay", "above 0 and at most 1")
        _need(self.clip >= 0, self, "clip", "at least 0")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """How long, how often, and with what around it."""

    epochs: float = 30.0
    """Passes over the training images."""
    accumulate: int = 1
    """Batches whose gradients are summed into one step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocasts products; auto does so where the hardware multiplies bf16 natively."""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps; auto takes the fastest there is."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """What the processes that torchrun started do: ddp, a replica each; fsdp, a shard each of parameters and optimiser;
    auto is ddp if there are several."""
    recompute: bool = False
    """Keep no activations inside the blocks and compute them again for the gradient: less memory, a third more time."""
    compile: bool = False
    """Compile each block with torch.compile."""
    ema: float = 0.0
    """Decay of the moving average of the weights, which is then what is measured and kept; 0 is off."""
    seed: int = 0
    """All randomness of step n is a function of this and n."""
    log_every: float = 10.0
    """Seconds between lines on the screen; the JSON log has every step."""
    eval_every: float = 1.0
    """Epochs between evaluations."""
    save_every: float = 300.0
    """Seconds between checkpoints; one is also written at the end and at an interrupt."""
    keep: int = 2
    """Checkpoints kept; the best weights are kept beside them."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """What to do about a loss or a gradient that is no number: stop, or leave that step's update out. Either way the
    run's folder gets what it was made of."""
    tensorboard: bool = False
    """Also write tensorboard events into the run's folder (pip install 'triptych[track]')."""

    def __post_init__(self) -> None:
        check(self)
        _need(self.epochs > 0, self, "epochs", "positive")
        _need(self.accumulate >= 1, self, "accumulate", "at least 1")
        _need(0 <= self.ema < 1, self, "ema", "from 0 to below 1")
        _need(self.eval_every > 0, self, "eval_every", "positive")
        _need(self.keep >= 1, self, "keep", "at least 1")


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig:
    """A classification run: what to learn from, what learns, and how."""

    data: str = "emoji"
    """`emoji`, a folder, tar shards, a parquet file or a hub id."""
    model: str = "vit-s16"
    """Architecture by name (`triptych list`), with random weights; not looked at when `init` is given."""
    model_args: tuple[str, ...] = ()
    """Changes to the named architecture: depth=8 embed_dim=256."""
    init: str | None = None
    """Start from these weights: a file, folder, RUN, hub id or shipped name, whose architecture it is; of a segmenter
    its backbone."""
    image_size: tuple[int, int] | None = None
    """Height and width to train and evaluate at; none means the model's own. With `init`, positions are resampled."""
    eval_crop: float | None = None
    """Share of the picture that evaluation's centre crop keeps; none means the weights' own, 0.875 without any."""
    head: Literal["linear", "mlp", "cosine"] | None = None
    """Head for a new set of classes: the fine-tuning linear one if none is named; mlp is the pre-training one."""
    drop_path: float | None = None
    """Stochastic depth of the last block; none means the model's own."""
    train: Literal["all", "head", "lora"] = "all"
    """All weights, the head alone (linear probe), or low-rank updates of the attention's products and the head."""
    frozen_blocks: int = 0
    """With `train all`: the embedding and this many first blocks stay as they are."""
    lora_rank: int = 8
    """Rank of the low-rank updates."""
    loss: Literal["cross_entropy", "binary"] = "cross_entropy"
    """Softmax cross entropy, or one binary cross entropy a class (DeiT III)."""
    teacher: str | None = None
    """A classifier of the same classes whose probabilities are learnt beside the labels (Hinton et al. 2015): a file,
    RUN, hub id or shipped name."""
    teacher_share: float = 0.5
    """Share of the loss that is the teacher's."""
    temperature: float = 2.0
    """Both networks' logits are divided by this before the teacher's probabilities are compared."""
    loading: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check(self)
        _need(self.frozen_blocks >= 0, self, "frozen_blocks", "at least 0")
        _need(self.lora_rank >= 1, self, "lora_rank", "at least 1")
        _need(0 <= self.teacher_share <= 1, self, "teacher_share", "from 0 to 1")
        _need(self.temperature > 0, self, "temperature", "positive")
        _need(self.drop_path is None or 0 <= self.drop_path < 1, self, "drop_path", "from 0 to below 1")
        _need(self.eval_crop is None or 0 < self.eval_crop <= 1, self, "eval_crop", "above 0 and at most 1")
        if self.train != "all" and self.init is None:
            raise UserError(
                f"train={self.train} leaves features frozen, which need weights; name them with init"
            )
        if self.train == "lora" and self.loop.compile:
            raise UserError("train=lora cannot be compiled block by block; leave loop.compile out")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A weighted sum of losses on each pixel's class; pixels of unknown class (255 in the mask) count in none."""

    cross_entropy: float = 1.0
    """Weight of the softmax cross entropy."""
    dice: float = 0.0
    """Weight of 1 minus the soft Dice coefficient, mean over the classes of the batch (Milletari et al. 2016)."""
    focal: float = 0.0
    """Weight of the focal loss (Lin et al. 2017): cross entropy where the network is unsure."""
    focal_gamma: float = 2.0
    """Its exponent."""
    label_smoothing: float = 0.0
    """Share of the cross entropy's target spread evenly over all classes."""
    aux: float = 0.4
    """Weight of the auxiliary head's loss, where the head has one."""

    def __post_init__(self) -> None:
        check(self)
        for name in ("cross_entropy", "dice", "focal", "focal_gamma", "aux"):
            _need(getattr(self, name) >= 0, self, name, "at least 0")
        _need(0 <= self.label_smoothing < 1, self, "label_smoothing", "from 0 to below 1")
        _need(
            self.cross_entropy + self.dice + self.focal > 0,
            self,
            "cross_entropy",
            "positive, or dice or focal be so",
        )


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """A run of semantic segmentation: a backbone with a dense head."""

    data: str = "scenes"
    """`scenes`, a folder of images and masks (ADE20K, Cityscapes, VOC too), metadata.jsonl, parquet or a hub id."""
    model: str = "swin-emoji"
    """Backbone by name (`triptych list`), with random weights; not looked at when `init` is given."""
    model_args: tuple[str, ...] = ()
    """Changes to the named backbone: depths=[2,2,2] window=8."""
    init: str | None = None
    """Start from these weights: a file, RUN, hub id or shipped name of a segmenter, whose head stays (its last layer
    where the classes are the same), or of any classifier or masked pre-training, whose backbone is taken."""
    image_size: tuple[int, int] | None = None
    """Height and width to train and evaluate at; none means the model's own."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """The dense head; `num_classes` is the data's. Of a segmenter to start from it must be its own."""
    drop_path: float | None = None
    """Stochastic depth of the backbone's last block; none means the model's own."""
    frozen_blocks: int = 0
    """The embedding and this many first blocks of the backbone stay as they are."""
    loss: LossConfig = field(default_factory=LossConfig)
    loading: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check(self)
        _need(self.frozen_blocks >= 0, self, "frozen_blocks", "at least 0")
        _need(self.drop_path is None or 0 <= self.drop_path < 1, self, "drop_path", "from 0 to below 1")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Masked pre-training without labels, SimMIM (Xie et al. 2022): guess the pixels of hidden patches."""

    data: str = "emoji"
    """Any images: labels are not looked at."""
    model: str = "swin-emoji"
    """Backbone by name (`triptych list`), with random weights; not looked at when `init` is given."""
    model_args: tuple[str, ...] = ()
    """Changes to the named backbone."""
    init: str | None = None
    """Start from these weights: a file, RUN, hub id or shipped name; of a segmenter the backbone."""
    image_size: tuple[int, int] | None = None
    """Height and width to train at; none means the model's own. A multiple of `mask_patch`."""
    mask_patch: int = 32
    """Side in pixels of the squares that are hidden or shown; a multiple of the backbone's patch."""
    mask_ratio: float = 0.6
    """Share of the squares that are hidden."""
    drop_path: float | None = None
    """Stochastic depth of the last block; none means the model's own."""
    loading: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check(self)
        _need(self.mask_patch >= 1, self, "mask_patch", "at least 1")
        _need(0 < self.mask_ratio < 1, self, "mask_ratio", "above 0 and below 1")
        _need(self.drop_path is None or 0 <= self.drop_path < 1, self, "drop_path", "from 0 to below 1")
