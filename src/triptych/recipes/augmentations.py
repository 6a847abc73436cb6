"""Augmentations that recipes share."""

from triptych.data.config import AugmentConfig

DRAWINGS = AugmentConfig(
    crop_scale=(1.0, 1.0),
    crop_ratio=(0.85, 1.18),
    degrees=20.0,
    translate=(0.1, 0.1),
    zoom=(0.65, 1.25),
    shear=12.0,
    brightness=0.4,
    contrast=0.4,
    saturation=0.7,
    hue=0.12,
    grayscale=0.12,
    erasing=0.1,
    label_smoothing=0.1,
)


PHOTOGRAPHS = AugmentConfig(
    crop_scale=(0.35, 1.0), brightness=0.3, contrast=0.3, saturation=0.3, hue=0.02, label_smoothing=0.1, mixup=0.2,
    mix_probability=0.5,
)  # fmt: skip
DEIT_AUGMENTATION = AugmentConfig(
    crop_scale=(0.08, 1.0), rand_augment=2, rand_augment_magnitude=9.0, erasing=0.25, mixup=0.8, cutmix=1.0,
    label_smoothing=0.1,
)  # fmt: skip
