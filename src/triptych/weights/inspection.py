"""`inspect`: what a checkpoint is, without loading it."""

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from triptych.config import to_json
from triptych.errors import CheckpointError, TriptychError
from triptych.network import on_meta_device
from triptych.weights import native
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.filling import rules_for, widened
from triptych.weights.hub import locate
from triptych.weights.mapping import families
from triptych.weights.mapping.format import Hints, StateDictKeys, state_dict_shapes
from triptych.weights.mapping.rules import plan_rules
from triptych.weights.recognition import looks_like, plan_loading, recognize, unsupported


def inspect(source: str | os.PathLike[str]) -> dict[str, Any]:
    """Describe a checkpoint without loading it, as `triptych info` prints it.

    Returns:
        Plain values: path, container, tensors (number), bytes, dtype (the most frequent), notes, format. For a known
        network also family, config, parameters (number), classes (number and names), preprocess, license, figures,
        notes_of_card, facts (where each value came from) and fits (None, or why the tensors do not match). Otherwise
        format is None, and looks_like says what it may be; of a LoRA, adapter holds ranks, alphas, numbers of layers
        and the metadata of its training.

    Raises:
        CheckpointError: no such source, or no checkpoint.
    """
    checkpoint = open_checkpoint(locate(source))
    keys = StateDictKeys(checkpoint)
    if not native.is_ours(checkpoint) and (recognize(keys) is None or unsupported(keys) is not None):
        from triptych.weights.diffusion.lora import lora_facts

        if adapter := lora_facts(checkpoint):
            return _of_file(checkpoint) | {"adapter": adapter}
        try:
            checkpoint, plan, format_name, _ = plan_loading(checkpoint, Hints())
        except CheckpointError:
            return _of_file(checkpoint) | {"looks_like": looks_like(keys)}
    else:
        checkpoint, plan, format_name, _ = plan_loading(checkpoint, Hints())
    description = _of_file(checkpoint, plan.notes)
    with on_meta_device():
        net = families.build(plan.config)
    try:
        plan_rules(rules_for(net, plan), checkpoint.shapes, state_dict_shapes(net), str(checkpoint.path))
        mismatch = None
    except TriptychError as problem:
        mismatch = str(problem)
    return description | {
        "format": format_name,
        "family": plan.family,
        "config": families.to_json(plan.config),
        "parameters": sum(p.numel() for p in net.parameters()),
        "classes": {
            "number": getattr(plan.config, "num_classes", 0),
            "names": list(plan.card.classes or ()),
        },
        "preprocess": to_json(plan.card.preprocess),
        "license": plan.card.license,
        "figures": dict(plan.card.figures),
        "notes_of_card": plan.card.notes,
        "facts": dict(plan.facts),
        "fits": mismatch,
    }


def _of_file(checkpoint: CheckpointFile, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Return what is known of a file without knowing its network."""
    numel: Counter[str] = Counter()
    for entry in checkpoint.entries.values():
        numel[str(entry.dtype).removeprefix("torch.")] += entry.numel
    dtypes = {entry.dtype for entry in checkpoint.entries.values()}
    if any(widened(dtype) is not dtype for dtype in dtypes):
        notes = [*notes, "float8 weights are loaded as float16"]
    return {
        "path": str(checkpoint.path),
        "container": checkpoint.container,
        "tensors": len(checkpoint.entries),
        "bytes": sum(entry.nbytes for entry in checkpoint.entries.values()),
        "dtype": max(numel, key=lambda dtype: numel[dtype]),
        "notes": [*checkpoint.notes, *notes],
        "format": None,
    }
