"""Every kind of run: its config, and the module whose `prepare` builds its parts. No torch here."""

import dataclasses
from typing import Any

from triptych.train.configs.base import ClassifyConfig, PretrainConfig, SegmentConfig
from triptych.train.configs.first_stage import CompressConfig
from triptych.train.configs.second_stage import SecondStageConfig

RunConfig = ClassifyConfig | SegmentConfig | PretrainConfig | CompressConfig | SecondStageConfig

# Kind of config -> the module whose `prepare` builds its parts.
RUN_MODULES: dict[type, str] = {
    ClassifyConfig: "triptych.train.tasks.classification",
    SegmentConfig: "triptych.train.tasks.segmentation",
    PretrainConfig: "triptych.train.tasks.masked_image",
    CompressConfig: "triptych.train.first_stage.build",
    SecondStageConfig: "triptych.train.second_stage.build",
}


def kind_of(said: dict[str, Any]) -> type:
    """The kind of a config that was written as JSON: the one whose fields are most like these."""
    names = {kind: {field.name for field in dataclasses.fields(kind)} for kind in RUN_MODULES}
    return min(RUN_MODULES, key=lambda kind: len(names[kind] ^ said.keys()))
