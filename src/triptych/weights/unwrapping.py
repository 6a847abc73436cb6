"""Find the network among everything that a training script saved: in which dict, under which prefix, next to what.

Scripts nest and name as they like, so no list of wrappers is complete. Every dict of a file, and every prefix that
several keys share, is a candidate; the one in which a format finds a whole network is taken, and what was left out is
reported. Of several networks, an average of weights or a teacher is taken first, since that is what is published.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

from triptych.weights import linear_head
from triptych.weights.files.checkpoint import CheckpointFile
from triptych.weights.files.sanitize import printable
from triptych.weights.files.tensor_entry import TensorEntry
from triptych.weights.mapping.format import WeightsChoice
from triptych.weights.mapping.rules import Rule, split_slice

Entries = dict[str, TensorEntry]

_AVERAGED = re.compile(r"ema|average|teacher|shadow|swa|momentum|target", re.IGNORECASE)
_TRAINED = re.compile(r"online|student|^raw", re.IGNORECASE)
# Modules that torch.compile, FSDP and activation checkpointing put between a module and its children.
_INFIXES = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module|_module)\.")
_CHUNKED = re.compile(r"((?:^|.*\.)blocks)\.\d+\.(\d+)\.")
_MAX_DEPTH, _MAX_CANDIDATES = 4, 60
# Counters of profilers and averages, which may stand anywhere in a network.
_COUNTERS = ("total_ops", "total_params", "n_averaged", "num_updates")
# First names of tensors that a network of its kind would use: they are never left out.
_ESSENTIAL = re.compile(
    r"^(?!embedding_manager$)(add|controlnet|input|output|pos|rope|rel|patch|norm|fc_norm|ln|cls|class|reg|storage|dist|"
    r"embeddings?|encoder|backbone|blocks?|layers?|stages?|"
    r"features|conv|input_blocks|output_blocks|middle_block|down|mid|up|quant|post_quant|cond_stage_model|conditioner|time|"
    r"label)(_|\.|\d|$)|^(?!decoder)\w*(pos_embed|position|relative|rope)"
)


def candidates(everything: Entries, choice: WeightsChoice | None) -> Iterator[tuple[str, Entries]]:
    """Yield (dict and prefix, tensors in it under the keys without both), those first that should be taken first.

    Args:
        choice: "raw" prefers weights that are no average.
    """
    places: dict[str, Entries] = {}
    nests = _by_nest(everything)
    for nest, entries in nests.items():
        plain = _without_infixes(entries)
        for prefix in _prefixes(plain):
            part = {name[len(prefix) :]: entry for name, entry in plain.items() if name.startswith(prefix)}
            part |= linear_head.next_to(prefix, plain, part)
            places[f"{nest}{prefix}"] = part
            if (joined := _without_chunks(part)) is not part:
                places[f"{nest}{prefix}blocks.*."] = joined
    order = sorted(
        places,
        key=lambda place: (
            is_averaged(place) != (choice != "raw"),
            -len(places[place]),
            "best" not in place.lower(),
        ),
    )
    yield from ((place, places[place]) for place in order[:_MAX_CANDIDATES])
    if len(nests) > 1:
        flat = _flattened(everything)
        prefixes = sorted(_prefixes(flat), key=len)[:_MAX_CANDIDATES]
        for prefix in prefixes:
            yield prefix, {name[len(prefix) :]: e for name, e in flat.items() if name.startswith(prefix)}


def _flattened(everything: Entries) -> Entries:
    """Tensors of a file that nests a dict for each module, `{"patch_embed": {"proj": ...}}`, as a state dict."""
    return {name.replace("/", "."): entry for name, entry in everything.items()}


def _by_nest(everything: Entries) -> dict[str, Entries]:
    nests: dict[str, Entries] = {}
    for name, entry in everything.items():
        nest, slash, key = name.rpartition("/")
        nests.setdefault(nest + slash, {})[key] = entry
    return nests


def _without_infixes(entries: Entries) -> Entries:
    plain = {_INFIXES.sub("", name): entry for name, entry in entries.items()}
    return plain if len(plain) == len(entries) else entries


def _without_chunks(entries: Entries) -> Entries:
    """Blocks that DINOv2's training stores in chunks, `blocks.{chunk}.{block}`, where blocks count from the first."""
    if not any(_CHUNKED.match(name) for name in entries):
        return entries
    return {_CHUNKED.sub(r"\1.\2.", name): entry for name, entry in entries.items()}


def _prefixes(entries: Iterable[str]) -> Sequence[str]:
    counts: dict[str, int] = {"": 0}
    for name in entries:
        parts = name.split(".")
        for depth in range(1, min(len(parts), _MAX_DEPTH + 1)):
            if sum(map(str.isdigit, parts[:depth])) > 1:  # one is that of an nn.Sequential or an ensemble
                break
            prefix = ".".join(parts[:depth]) + "."
            counts[prefix] = counts.get(prefix, 0) + 1
    return [prefix for prefix, count in counts.items() if not prefix or count >= 4]


def is_averaged(place: str) -> bool:
    """Return whether a place holds an average of weights, or a teacher. The innermost name that tells decides:
    `ema/online_model.` holds what was trained."""
    for name in reversed(re.split(r"[/.]", place)):
        if _AVERAGED.search(name) or _TRAINED.search(name):
            return bool(_AVERAGED.search(name))
    return False


def passes_over_an_average(checkpoint: CheckpointFile) -> bool:
    """Return whether the dict that was taken is no average, and another one of that size is."""
    used = {id(entry) for entry in checkpoint.entries.values()}
    for nest, entries in _by_nest(checkpoint.everything).items():
        if is_averaged(nest) and 2 * len(entries) > len(used):
            return not any(id(entry) in used for entry in entries.values())
    return False


def is_complete(keys: Iterable[str], rules: Sequence[Rule] | None) -> bool:
    """Return whether every key has a rule and every rule its keys; shapes are checked when a network is filled."""
    if rules is None:
        return True
    names, claims = set(keys), _claims(rules)
    needed = {split_slice(key)[0] for rule in rules if rule.ours for key in rule.theirs}
    return needed <= names and all(map(claims, names))


def unwrapped(
    checkpoint: CheckpointFile, place: str, entries: Entries, others: Sequence[str]
) -> CheckpointFile:
    """Return a checkpoint of the tensors in one place alone, with a note of the choice.

    Args:
        others: other places that hold a network.
    """
    result = copy.copy(checkpoint)
    result.entries, result.notes = entries, list(checkpoint.notes)
    used = set(map(id, entries.values()))
    left = [name for name, entry in checkpoint.everything.items() if id(entry) not in used]
    note = f"the network is at {printable(place, 60)!r}"
    if left:
        note += f"; {len(left)} other tensors left out ({_first_names(left, place)})"
    if others:
        other, remedy = printable(others[0], 60), "save that part alone to load it"
        if is_averaged(place) != is_averaged(others[0]):
            remedy = f"which weights={'raw' if is_averaged(place) else 'ema'!r} takes"
        note += f"; another network is at {other!r}, {remedy}"
    result.notes.append(note)
    return result


def foreign_keys(keys: Iterable[str], rules: Sequence[Rule]) -> list[str]:
    """Return the keys that no rule claims and that are no part of the network.

    These are counters, and all tensors below a first name that the network does not have: `criterion.weight` next to
    `blocks.*`. A key below a name that the network has, or that would change it, is never one: it stays an error.
    """
    names = list(keys)
    claims = _claims(rules)
    claimed = [key for key in names if claims(key)]
    firsts = {key.split(".")[0] for key in claimed}
    both_stages = any(key.startswith("first_stage_model.") for key in names)
    result = []
    for key in names:
        if claims(key):
            continue
        first = key.split(".")[0]
        copy_of_stage = both_stages and key.startswith("cond_stage_model.")
        copy_of_stage = copy_of_stage and key.replace("cond_stage_model.", "first_stage_model.", 1) in claimed
        outside = first not in firsts and not _ESSENTIAL.match(first)
        if key.rpartition(".")[2] in _COUNTERS or outside or copy_of_stage:
            result.append(key)
    return result


def _claims(rules: Sequence[Rule]) -> Callable[[str], bool]:
    exact = {split_slice(key)[0] for rule in rules for key in rule.theirs if not key.endswith("*")}
    prefixes = tuple(key[:-1] for rule in rules for key in rule.theirs if key.endswith("*"))
    return lambda key: key in exact or (bool(prefixes) and key.startswith(prefixes))


def left_out(keys: Sequence[str]) -> str:
    """Return the note for tensors that are no part of the network."""
    return f"{len(keys)} tensors that are no part of the network left out ({_first_names(keys, '')})"


def _first_names(keys: Sequence[str], place: str) -> str:
    """Return the first names of tensors, without the dict that `place` is in, too."""
    nest = place.rpartition("/")[0] + "/"
    names = list(dict.fromkeys(re.split(r"[./]", key.removeprefix(nest))[0] for key in keys))
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(printable(name, 40) for name in names[:4]) + more
