"""Tensors that are functions of sizes alone, kept from one call to the next."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from triptych.kernels.dispatch import plain

T = TypeVar("T", Tensor, tuple[Tensor, ...])


class Kept:
    """Results of functions of sizes, devices and the like, up to `limit` bytes; those not asked for longest go first.

    One result may take a quarter of it: that of a larger map is made anew, in little of the time that such a map takes.
    """

    def __init__(self, limit: int):
        self.limit, self.held = limit, 0
        self.entries: OrderedDict[Hashable, Tensor | tuple[Tensor, ...]] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(self, make: Callable[..., T], *key: Hashable) -> T:
        """`make(*key)`, or what it returned before. A caller may not write into it."""
        if not plain():
            return make(*key)
        at = (make, key)
        with self.lock:
            if at in self.entries:
                self.entries.move_to_end(at)
                return self.entries[at]  # type: ignore[return-value]
        # Inference mode would keep a later backward pass from using it, and the default device is no part of the key.
        with torch.inference_mode(False), torch.device("cpu"):
            made = make(*key)
        if _bytes(made) <= self.limit // 4:
            with self.lock:
                if at not in self.entries:  # another thread may have made it, too
                    self.entries[at] = made
                    self.held += _bytes(made)
                while self.held > self.limit:
                    self.held -= _bytes(self.entries.popitem(last=False)[1])
        return made


def _bytes(made: Tensor | tuple[Tensor, ...]) -> int:
    return sum(part.nbytes for part in (made if isinstance(made, tuple) else (made,)))


kept = Kept(2**26)
