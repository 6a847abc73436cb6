"""Build a network in other libraries: our weights are exported in their format and read by their own readers."""

import contextlib
import importlib
import tempfile
from collections.abc import Callable, Sequence

import torch

from triptych.bench.harness.forward import Forward
from triptych.bench.peers import timm_import
from triptych.bench.peers.readers import timm_network, transformers_network
from triptych.network import Network
from triptych.weights import export


def present(names: Sequence[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return which of the libraries can be imported, and notes for the report: a sentence about each that cannot be, or
    that needs a stand-in for torchvision."""
    available, notes = [], []
    for name in names:
        try:
            _, why = timm_import.timm() if name == "timm" else (importlib.import_module(name), None)
        except ImportError as problem:
            notes.append(f"{name} is not measured: {str(problem).splitlines()[0]}.")
            continue
        available.append(name)
        if why:
            notes.append(
                f"{name} was imported with a stand-in for torchvision ({why}), "
                "which its networks' forward passes do not touch."
            )
    return tuple(available), notes


def transformers_classifier(net: Network, dtype: torch.dtype) -> Forward:
    """Return the classifier of transformers with the weights of `net`: images (B, C, H, W) to logits."""
    with tempfile.TemporaryDirectory() as folder:
        export(net, folder, "hf")
        theirs = transformers_network(folder, dtype)
    return lambda images: theirs(images).logits


def timm_classifier(net: Network, dtype: torch.dtype) -> Forward:
    """Return timm's network with the weights of `net`."""
    with tempfile.TemporaryDirectory() as folder:
        export(net, folder, "timm")
        return timm_network(folder, dtype)


PEERS: dict[str, Callable[[Network, torch.dtype], Forward]] = {
    "transformers": transformers_classifier,
    "timm": timm_classifier,
}


FORMATS = {"transformers": "hf", "timm": "timm"}  # as `triptych.export` names them


def build(net: Network, dtype: torch.dtype, names: tuple[str, ...]) -> dict[str, Forward]:
    """Return the network of each library with the weights of `net`, in `dtype`. Their messages are suppressed."""
    with contextlib.redirect_stderr(None):
        return {name: PEERS[name](net, dtype) for name in names}
