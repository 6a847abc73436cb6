"""Recipes for the Swin Transformer and for dense prediction: each returns a complete config; its docstring has the
command and the score."""

from dataclasses import replace

from triptych.data.config import AugmentConfig, DataConfig
from triptych.heads.config import HeadConfig
from triptych.recipes.augmentations import DEIT_AUGMENTATION, DRAWINGS
from triptych.training.configs.base import (
    ClassifyConfig,
    LoopConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
    SegmentConfig,
)

_SCENES = AugmentConfig(
    crop_scale=(0.5, 1.0),
    crop_ratio=(0.85, 1.18),
    degrees=10.0,
    brightness=0.4,
    contrast=0.4,
    saturation=0.7,
    hue=0.12,
    grayscale=0.12,
)


def swin() -> SegmentConfig:
    """Fine-tune the shipped segmenter on your own folder of images and masks; runs on a laptop.

        triptych train swin --data DIR --out RUN

    DIR has images/ and masks/ paired by name, or is the folder of ADE20K or Cityscapes. For detailed photographs, start
    from larger weights: `upernet_swin_t_ade20k --init CHECKPOINT`.
    """
    return SegmentConfig(
        init="swin-scenes",
        head=HeadConfig(
            type="unet", channels=96, image_branch_channels=8
        ),  # that of the shipped segmenter, whose training continues
        loading=DataConfig(batch_size=8),
        augment=replace(_SCENES, brightness=0.3, contrast=0.3, saturation=0.3, hue=0.02, grayscale=0.0),
        loss=LossConfig(cross_entropy=1.0, dice=0.5),
        optim=OptimConfig(lr=5e-4, layer_decay=0.9),
        loop=LoopConfig(epochs=30, ema=0.99),
    )


def swin_emoji() -> ClassifyConfig:
    """Train a small Swin from scratch on the built-in drawings at 32 px: the first half of the backbone's training.

    The backbone is that of `swin_scenes`; the shipped ViT is the teacher.

    python tools/make_emoji.py --styles all --out EMOJI
    triptych train swin_emoji --data emoji:EMOJI --out runs/swin_emoji

    Reached on Twemoji: concept 0.694, subgroup 0.800, group 0.861 (563,200 images seen, an hour on one shared core).
    """
    return ClassifyConfig(
        model="swin-emoji",
        image_size=(32, 32),
        eval_crop=1.0,
        drop_path_rate=0.0,
        teacher="vit-emoji",
        teacher_share=0.8,
        loading=DataConfig(batch_size=128, workers=0, load_size=(48, 48)),
        augment=replace(DRAWINGS, label_smoothing=0.0),
        optim=OptimConfig(lr=2e-3, warmup=0.05, weight_decay=0.05, betas=(0.9, 0.99)),
        loop=LoopConfig(epochs=100, ema=0.998, eval_every=10, save_every=300),
    )


def swin_emoji64() -> ClassifyConfig:
    """Continue `swin_emoji` at 64 px, with smaller drawings: the second half of the backbone's training.

    As in scenes, a drawing is at any place of the image and at least a third of its side in size. At 32 px, the maps of
    the last two stages are smaller than a window, so attention between windows is not trained there.

    triptych train swin_emoji64 --data emoji:EMOJI --init runs/swin_emoji --out runs/swin_emoji64
    """
    small = swin_emoji()
    return replace(
        small,
        init="runs/swin_emoji",
        image_size=(64, 64),
        drop_path_rate=None,
        teacher_share=0.4,
        loading=replace(small.loading, load_size=(64, 64)),
        augment=replace(small.augment, zoom=(0.35, 1.0), translate=(0.25, 0.25), degrees=30.0),
        optim=replace(small.optim, lr=1e-3),
        loop=replace(small.loop, epochs=12, eval_every=4),
    )


def swin_scenes() -> SegmentConfig:
    """Train the shipped segmenter at 96 px: a small Swin, trained on single drawings, and a U-Net decoder on scenes.

    python tools/make_emoji.py --styles all --out EMOJI
    triptych train swin_emoji --data emoji:EMOJI --out runs/swin_emoji
    triptych train swin_emoji64 --data emoji:EMOJI --init runs/swin_emoji --out runs/swin_emoji64
    triptych train swin_scenes --data scenes:EMOJI --init runs/swin_emoji64 --out runs/swin_scenes

    The shipped weights were trained for less: 20 epochs of `swin_emoji`, no `swin_emoji64`, and 1.8 epochs of scenes.
    """
    return SegmentConfig(
        init="runs/swin_emoji64",
        data="scenes",
        model="swin-emoji",
        image_size=(96, 96),
        head=HeadConfig(type="unet", channels=96, image_branch_channels=8),
        drop_path_rate=0.05,
        loss=LossConfig(cross_entropy=1.0, dice=0.5),
        loading=DataConfig(batch_size=32, workers=0, load_size=(96, 96)),
        augment=_SCENES,
        optim=OptimConfig(lr=1e-3, warmup=0.05, weight_decay=0.05, betas=(0.9, 0.99), layer_decay=0.9),
        loop=LoopConfig(epochs=4, ema=0.998, eval_every=1, save_every=300),
    )


def unet_scenes() -> SegmentConfig:
    """Train the baseline of `swin_scenes`: a plain U-Net on the same scenes, from scratch.

    triptych train unet_scenes --data scenes:EMOJI --out runs/unet_scenes
    """
    small = swin_scenes()
    return replace(
        small,
        init=None,
        model="convnet-unet",
        head=HeadConfig(type="unet", channels=128),
        drop_path_rate=None,
        optim=replace(small.optim, layer_decay=1.0),
    )


def swin_t_imagenet() -> ClassifyConfig:
    """Train Swin-T on ImageNet-1k for 300 epochs (Liu et al. 2021, Section 4.1): published 81.2 top-1.

        triptych train swin_t_imagenet --data IMAGENET --out RUN

    Not run here: the score is the publication's. For Swin-S, add `--model swin-s --drop-path-rate 0.3` (published
    83.2); for Swin-B, `--model swin-b --drop-path-rate 0.5` (published 83.5).
    """
    return ClassifyConfig(
        model="swin-t",
        drop_path_rate=0.2,
        eval_crop=0.9,
        loading=DataConfig(batch_size=1024, workers=16, load_size=(256, 256)),
        augment=DEIT_AUGMENTATION,
        optim=OptimConfig(lr=1e-3, final_lr=0.01, warmup=20 / 300, weight_decay=0.05, clip=5.0),
        loop=LoopConfig(epochs=300),
    )


def upernet_swin_t_ade20k() -> SegmentConfig:
    """Train UPerNet with Swin-T on ADE20K at 512 px (Liu et al. 2021, Section 4.3): published 44.5 mIoU.

        triptych train upernet_swin_t_ade20k --data ADEChallengeData2016 --out RUN

    160,000 steps of 16 images. It starts from the ImageNet-1k weights of the hub; `--init FILE` takes others. Not run
    here: the score is the publication's, which decays the learning rate linearly (here: half a cosine) and evaluates
    full images.
    """
    return SegmentConfig(
        init="microsoft/swin-tiny-patch4-window7-224",
        data="ADEChallengeData2016",
        image_size=(512, 512),
        head=HeadConfig(type="upernet", channels=512, aux_channels=256),
        drop_path_rate=0.3,
        loading=DataConfig(batch_size=16, workers=8, load_size=(640, 640), reduce_zero_label=False),
        augment=AugmentConfig(
            crop_scale=(0.25, 1.0),
            crop_ratio=(0.75, 1.33),
            brightness=0.125,
            contrast=0.5,
            saturation=0.5,
            hue=0.05,
        ),
        optim=OptimConfig(lr=6e-5, warmup=1500 / 160_000, weight_decay=0.01),
        loop=LoopConfig(epochs=160_000 * 16 / 20_210, eval_every=12),
    )


def simmim() -> PretrainConfig:
    """Pre-train by masking on your own images, without labels (SimMIM, Xie et al. 2022); then use it as `--init RUN`.

        triptych train simmim --data DIR --out RUN
        triptych train simmim --data DIR --model vit-s16 --image-size 224 224 --out RUN      # a ViT
        triptych train swin --data DIR --init RUN --out RUN2

    Squares of 16 px are masked in images of 64 px. For large networks, use `simmim_swin_b_imagenet`.
    """
    return PretrainConfig(
        image_size=(64, 64),
        mask_patch=16,
        loading=DataConfig(batch_size=128, workers=0, load_size=(64, 64)),
        augment=AugmentConfig(crop_scale=(0.67, 1.0)),
        optim=OptimConfig(lr=1e-3, warmup=0.05),
        loop=LoopConfig(epochs=100, eval_every=10),
    )


def simmim_swin_b_imagenet() -> PretrainConfig:
    """Pre-train Swin-B on ImageNet-1k at 192 px with SimMIM (Xie et al. 2022): published 84.0 top-1 after fine-tuning.

        triptych train simmim_swin_b_imagenet --data IMAGENET --out RUN

    Not run here: the score is the publication's.
    """
    return PretrainConfig(
        data="IMAGENET",
        model="swin-b",
        model_args=("window_size=6",),
        image_size=(192, 192),
        drop_path_rate=0.0,
        loading=DataConfig(batch_size=2048, workers=16, load_size=(224, 224)),
        augment=AugmentConfig(crop_scale=(0.67, 1.0)),
        optim=OptimConfig(lr=8e-4, warmup=10 / 800, weight_decay=0.05, clip=5.0),
        loop=LoopConfig(epochs=800, eval_every=50),
    )
