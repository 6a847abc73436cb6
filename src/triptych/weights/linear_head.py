"""The classifier of a fine-tuned network, under the name that its author gave it.

Who replaces the head of a network of timm or torchvision seldom keeps its name: `model.heads = nn.Linear(...)`,
`model.head = nn.Sequential(nn.Dropout(), nn.Linear(...))`, or a module with `self.backbone` and `self.fc`. One linear
layer is the same classifier under any name; a deeper head is another one.
"""

from collections.abc import Container, Iterable, Mapping
from dataclasses import replace

from triptych.weights.files.tensor_entry import Shape, TensorEntry
from triptych.weights.mapping.format import LoadPlan, zeros_factory
from triptych.weights.mapping.rules import constant

USUAL_HEADS = ("head.", "heads.head.", "classifier.")
"""The classifier's name in timm and Microsoft's Swin, torchvision's ViT, and transformers."""
_NAMES = frozenset(
    {
        *("head", "heads", "fc", "classifier", "linear", "logits", "last_linear", "linear_head", "cls_head"),
        *("mlp_head", "fc_out", "out", "output_layer", "classification_head", "classifier_head", "final"),
    }
)


def find(shapes: Mapping[str, Shape], foreign: Iterable[str]) -> str | None:
    """Return the prefix of the one linear layer among keys that no rule claims; None if there is none, or more.

    Args:
        shapes: of all tensors. Of transformers' networks with a pooler, nothing tells what the layer is applied to.
    """
    keys = [key for key in foreign if key.split(".")[0] in _NAMES]
    prefixes = {key.rpartition(".")[0] + "." for key in keys}
    if len(prefixes) != 1 or any("pooler." in key for key in shapes):
        return None
    name = prefixes.pop()
    weight, bias = shapes.get(name + "weight", ()), shapes.get(name + "bias", ())
    linear = len(keys) == 2 and len(weight) == 2 and bias == weight[:1]
    return name if linear else None


def next_to(prefix: str, entries: Mapping[str, TensorEntry], part: Iterable[str]) -> dict[str, TensorEntry]:
    """Return the tensors of the linear layer that a dict has next to a network under a prefix, `fc.*` at `backbone.*`.

    Args:
        part: keys of the network, without the prefix.
    """
    outer = prefix.rstrip(".").rpartition(".")[0] + "."
    outer = "" if outer == "." else outer
    names = set(part)
    siblings = {
        key[len(outer) :]: entry
        for key, entry in entries.items()
        if prefix and key.startswith(outer) and not key.startswith(prefix)
    }
    name = find({key: entry.shape for key, entry in siblings.items()}, siblings)
    if name is None or any(key.split(".")[0] in _NAMES for key in names):
        return {}
    return {key: entry for key, entry in siblings.items() if key.startswith(name)}


def with_bias(plan: LoadPlan, keys: Container[str]) -> LoadPlan:
    """Return a plan in which the bias of a classifier is zero if the file has none, as after `bias=False`."""
    if plan.family not in ("vit", "swin") or plan.rules is None:
        return plan
    zeros = zeros_factory(plan.config.num_classes)
    lacking = [rule for rule in plan.rules if rule.ours == ("head.bias",) and rule.theirs[0] not in keys]
    if not lacking or lacking[0].theirs[0].replace("bias", "weight") not in keys:
        return plan
    rules = [rule for rule in plan.rules if rule is not lacking[0]]
    rules.append(constant("head.bias", "the classifier has none", zeros))
    return replace(plan, rules=rules, facts=plan.facts | {"head": "a classifier without bias"})


def renamed(plan: LoadPlan, usual: str, name: str) -> LoadPlan:
    """Return a plan whose rules take the classifier from the name that it has in the file."""
    leaves = {usual + leaf: name + leaf for leaf in ("weight", "bias")}
    rules = [
        replace(rule, theirs=tuple(leaves.get(key, key) for key in rule.theirs)) for rule in plan.rules or ()
    ]
    facts = plan.facts | {"head": f"guess: {name}weight is the classifier of the pooled features"}
    return replace(plan, rules=rules, facts=facts)
