"""Configs of training runs: optimizer, loop, and the tasks classification, segmentation and masked pre-training."""

from dataclasses import dataclass, field
from typing import Literal

from triptych.config import check, need, need_at_least, need_fraction
from triptych.data.config import AugmentConfig, DataConfig
from triptych.errors import ConfigError
from triptych.heads.config import HeadConfig


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW (Loshchilov and Hutter 2019) with linear warmup and cosine decay."""

    lr: float = 1e-3
    """Peak learning rate."""
    final_lr: float = 0.0
    """Final learning rate, as a fraction of the peak."""
    warmup: float = 0.05
    """Fraction of the run over which the learning rate rises from 0."""
    weight_decay: float = 0.05
    """Decoupled weight decay; none for norms, biases, positions, tokens and gains."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the running means of the gradient and of its square."""
    layer_decay: float = 1.0
    """Learning rate of each layer relative to the layer above it; 1 is off, 0.75 is usual in fine-tuning."""
    clip: float = 1.0
    """Maximum norm of the gradient; 0 is off."""

    def __post_init__(self) -> None:
        check(self)
        need(self.lr > 0, self, "lr", "positive")
        need_fraction(self, "final_lr")
        need_fraction(self, "warmup", below_one=True)
        need_at_least(self, 0, "weight_decay", "clip")
        need(0 < self.layer_decay <= 1, self, "layer_decay", "above 0 and at most 1")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """Length of the run, intervals, precision, device and processes."""

    epochs: float = 30.0
    """Passes over the training images."""
    accumulate: int = 1
    """Batches whose gradients are accumulated into one step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16 autocasts matrix products; auto uses it if the hardware has native bf16 products."""
    device: str = "auto"
    """cpu, cuda, cuda:1 or mps; auto is the fastest available."""
    parallel: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """What processes started by torchrun do: ddp, a replica each; fsdp, a shard of parameters and optimizer each; auto
    is ddp with several processes."""
    recompute: bool = False
    """Activation checkpointing: recompute the activations inside blocks in the backward pass. Less memory, a third more
    time."""
    compile: bool = False
    """Compile each block with torch.compile."""
    ema: float = 0.0
    """Decay of the exponential moving average of the weights, which is then evaluated and saved; 0 is off."""
    seed: int = 0
    """Random seed: all randomness of step n is a function of this and n."""
    log_every: float = 10.0
    """Seconds between lines on the screen; the JSON log has every step."""
    eval_every: float = 1.0
    """Epochs between evaluations."""
    save_every: float = 300.0
    """Seconds between checkpoints; one is also saved at the end and at an interrupt."""
    keep: int = 2
    """Number of checkpoints to keep, besides the best weights."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """If a loss or gradient is NaN or infinite: stop, or skip the update of that step. Either way its batch is written
    into the run's folder."""
    tensorboard: bool = False
    """Also write TensorBoard events into the run's folder (pip install 'triptych[track]')."""

    def __post_init__(self) -> None:
        check(self)
        need(self.epochs > 0, self, "epochs", "positive")
        need(self.eval_every > 0, self, "eval_every", "positive")
        need_at_least(self, 1, "accumulate", "keep")
        need_fraction(self, "ema", below_one=True)


@dataclass(frozen=True, kw_only=True)
class DataAndModel:
    """The fields that all runs have: data, network, loading, augmentation, optimizer, loop."""

    data: str
    """Training data."""
    model: str
    """Architecture by name (`triptych list`), with random weights; ignored if `init` is given."""
    model_args: tuple[str, ...] = ()
    """Changes to the named architecture, such as depth=8 embed_dim=256."""
    init: str | None = None
    """Start from these weights, in their architecture: a file, folder, RUN, hub id or shipped name."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels to train and evaluate at; none is the model's own."""
    loading: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ClassifyLossConfig:
    """The loss of an image classifier."""

    type: Literal["cross_entropy", "binary"] = "cross_entropy"
    """Softmax cross entropy, or one binary cross entropy per class (DeiT III)."""
    class_weights: str = "none"
    """Weight of each class in the loss. balanced: the mean number of images of a class over that of this class; none:
    1; or a JSON or CSV file with the name and weight of each class."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True, kw_only=True)
class ClassifyConfig(DataAndModel):
    """A run that trains an image classifier."""

    data: str = "emoji"
    """`emoji`, a folder, tar shards, a parquet file or a hub id."""
    model: str = "vit-s16"
    """Architecture by name (`triptych list`), with random weights; ignored if `init` is given."""
    init: str | None = None
    """Start from these weights, in their architecture: a file, folder, RUN, hub id or shipped name. Of a segmenter, its
    backbone."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels to train and evaluate at; none is the model's own. With `init`, positions are
    resampled."""
    in_channels: int | None = None
    """Channels of the network's input: 3, 1 for gray images, or the number of bands; none is the model's own. With
    `init`, the weights of the first layer are adapted."""
    eval_crop: float | None = None
    """Fraction of the image that the center crop of evaluation keeps; none is that of the weights, or 0.875."""
    head: Literal["linear", "mlp", "cosine"] | None = None
    """Head for a new set of classes; none is linear, as in fine-tuning; mlp is that of ViT pre-training."""
    drop_path_rate: float | None = None
    """Stochastic depth rate of the last block; none is the model's own."""
    train: Literal["all", "head", "lora"] = "all"
    """Train all weights, only the head (linear probe), or low-rank updates of the attention's products and the head."""
    frozen_blocks: int = 0
    """With `train all`: freeze the embedding and this many of the first blocks."""
    lora_rank: int = 8
    """Rank of the low-rank updates."""
    loss: ClassifyLossConfig = field(default_factory=ClassifyLossConfig)
    teacher: str | None = None
    """Distill from this classifier of the same classes (Hinton et al. 2015): a file, RUN, hub id or shipped name."""
    teacher_share: float = 0.5
    """Weight of the distillation loss, from 0 to 1; the loss on labels has the rest."""
    temperature: float = 2.0
    """Temperature of the distillation: both networks' logits are divided by it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        need_at_least(self, 0, "frozen_blocks")
        need_at_least(self, 1, "lora_rank")
        need_fraction(self, "teacher_share")
        need_fraction(self, "drop_path_rate", below_one=True)
        need(self.temperature > 0, self, "temperature", "positive")
        need(self.eval_crop is None or 0 < self.eval_crop <= 1, self, "eval_crop", "above 0 and at most 1")
        if self.train != "all" and self.init is None:
            raise ConfigError(
                f"train={self.train} keeps the features frozen, which need weights; name them with init"
            )
        if self.train == "lora" and self.loop.compile:
            raise ConfigError("train=lora cannot be compiled block by block; leave loop.compile out")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """A weighted sum of losses per pixel; pixels of unknown class (255 in the mask) are ignored."""

    cross_entropy: float = 1.0
    """Weight of the softmax cross entropy."""
    dice: float = 0.0
    """Weight of 1 minus the soft Dice coefficient, averaged over the classes of the batch (Milletari et al. 2016)."""
    focal: float = 0.0
    """Weight of the focal loss (Lin et al. 2017)."""
    focal_gamma: float = 2.0
    """Exponent gamma of the focal loss."""
    label_smoothing: float = 0.0
    """Fraction of the cross entropy's target that is spread evenly over all classes."""
    class_weights: str = "none"
    """Weight of each class in the cross entropy. balanced: the mean number of pixels of a class over that of this
    class, from up to 1,000 training masks; none: 1; or a JSON or CSV file with the name and weight of each class."""
    aux: float = 0.4
    """Weight of the auxiliary head's loss, if the head has one."""

    def __post_init__(self) -> None:
        check(self)
        need_at_least(self, 0, "cross_entropy", "dice", "focal", "focal_gamma", "aux")
        need_fraction(self, "label_smoothing", below_one=True)
        total = self.cross_entropy + self.dice + self.focal
        need(total > 0, self, "cross_entropy", "positive, or dice or focal must be")


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(DataAndModel):
    """A run that trains a semantic segmenter: a backbone with a dense head."""

    data: str = "scenes"
    """`scenes`, a folder of images and masks (also ADE20K, Cityscapes, VOC), metadata.jsonl, parquet or a hub id."""
    model: str = "swin-emoji"
    """Backbone by name (`triptych list`), with random weights; ignored if `init` is given."""
    init: str | None = None
    """Start from these weights: a file, RUN, hub id or shipped name. A segmenter keeps its head (and the last layer if
    the classes are the same); of a classifier or a masked pre-training, the backbone is used."""
    head: HeadConfig = field(default_factory=HeadConfig)
    """Dense head; `num_classes` is set from the data. With `init` of a segmenter, it must be the head that it has."""
    drop_path_rate: float | None = None
    """Stochastic depth rate of the backbone's last block; none is the model's own."""
    in_channels: int | None = None
    """Channels of the network's input: 3, 1 for gray images, or the number of bands; none is the model's own. With
    `init`, the weights of the first layer are adapted."""
    frozen_blocks: int = 0
    """Freeze the embedding and this many of the first blocks of the backbone."""
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        need_at_least(self, 0, "frozen_blocks")
        need_fraction(self, "drop_path_rate", below_one=True)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(DataAndModel):
    """A run of masked pre-training without labels, SimMIM (Xie et al. 2022): predict the pixels of masked patches."""

    data: str = "emoji"
    """Any images; labels are not used."""
    model: str = "swin-emoji"
    """Backbone by name (`triptych list`), with random weights; ignored if `init` is given."""
    init: str | None = None
    """Start from these weights: a file, RUN, hub id or shipped name. Of a segmenter, its backbone."""
    image_size: tuple[int, int] | None = None
    """Height and width in pixels to train at, multiples of `mask_patch`; none is the model's own."""
    mask_patch: int = 32
    """Side in pixels of the squares that are masked; a multiple of the backbone's patch size."""
    mask_ratio: float = 0.6
    """Fraction of the squares that are masked."""
    drop_path_rate: float | None = None
    """Stochastic depth rate of the last block; none is the model's own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        need_at_least(self, 1, "mask_patch")
        need(0 < self.mask_ratio < 1, self, "mask_ratio", "above 0 and below 1")
        need_fraction(self, "drop_path_rate", below_one=True)
