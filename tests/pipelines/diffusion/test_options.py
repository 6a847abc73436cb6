"""One set of options: the same names in Python, on the command line and in an image's metadata."""

from dataclasses import fields

import pytest

from triptych.cli.generate import SamplingFlags
from triptych.config import from_json, to_json
from triptych.errors import ConfigError
from triptych.pipelines.diffusion.options import (
    IMAGE_ROLES,
    GenerationRecord,
    SamplingArguments,
    SamplingOptions,
    sampling_fields,
)

# Options that are arguments of single tasks, not of all.
OF_TASKS = {"prompt", "negative_prompt", "strength", "mask_feather", "noise_level", "boxes", *IMAGE_ROLES}


def test_json_round_trip():
    record = GenerationRecord(
        prompt="a red apple",
        num_steps=5,
        guidance_interval=(0.3, 5.5),
        loras={"style.safetensors": 0.8},
        boxes=((3, 0.0, 0.0, 0.5, 1.0),),
        label=2,
    )
    assert from_json(GenerationRecord, to_json(record)) == record


def test_python_and_the_command_line_have_the_same_options():
    names = {field.name for field in fields(SamplingOptions)}
    assert set(SamplingArguments.__annotations__) == names - OF_TASKS
    defaults = SamplingOptions()
    assert {field.name for field in fields(SamplingFlags)} == names
    assert all(getattr(SamplingFlags(), name) == getattr(defaults, name) for name in names)


def test_arguments_become_fields():
    arguments = {"tiling": (True, False), "apg": True, "num_images": 3, "seed": 2}
    sampling, others = sampling_fields(arguments)
    assert sampling == {"tiling": "x", "apg": {"eta": 0.0}, "seed": 2}
    assert others == {"num_images": 3}


def test_sizes():
    assert SamplingOptions(height=64).size is None
    with pytest.raises(ConfigError, match="height is 0"):
        SamplingOptions(height=0)
