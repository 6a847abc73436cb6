"""The same network in other libraries: our weights exported in their format, read by their own readers."""

import contextlib
import importlib
import tempfile
from collections.abc import Callable

import torch

from triptych.bench.forward import Forward
from triptych.bench.readers import timm_network, transformers_network
from triptych.network import Network
from triptych.weights import export


def available(names: tuple[str, ...]) -> dict[str, str | None]:
    """Peer -> None if it can be imported, else why not, in one line."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            importlib.import_module(name)
            found[name] = None
        except ImportError as problem:
            found[name] = str(problem).splitlines()[0]
    return found


def transformers_classifier(net: Network, dtype: torch.dtype) -> Forward:
    """Their classifier of the same family, images (B, C, H, W) to logits."""
    with tempfile.TemporaryDirectory() as folder:
        export(net, folder, "hf")
        theirs = transformers_network(folder, dtype)
    return lambda images: theirs(images).logits


def timm_classifier(net: Network, dtype: torch.dtype) -> Forward:
    """timm's network of the same family."""
    with tempfile.TemporaryDirectory() as folder:
        export(net, folder, "timm")
        return timm_network(folder, dtype)


PEERS: dict[str, Callable[[Network, torch.dtype], Forward]] = {
    "transformers": transformers_classifier,
    "timm": timm_classifier,
}


FORMATS = {"transformers": "hf", "timm": "timm"}  # as `triptych.export` names them


def build(net: Network, dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Forward]:
    """The network of each named peer with the weights of `net`, in `dtype`, quietly."""
    with contextlib.redirect_stderr(None):
        return {name: PEERS[name](net, dtype) for name in names}
