"""A cache of tensors that depend on sizes alone: index tables, masks, grids."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from triptych.kernels.dispatch import fast_path_allowed

T = TypeVar("T", Tensor, tuple[Tensor, ...])


class ConstantCache:
    """Results of functions of sizes, devices and dtypes, least recently used first out.

    A result larger than a quarter of the limit is not cached: that of a larger map is computed again, in a small part
    of the time that such a map takes.

    Args:
        limit: bytes of all cached tensors together.
    """

    def __init__(self, limit: int):
        self.limit, self.size = limit, 0
        self.entries: OrderedDict[Hashable, Tensor | tuple[Tensor, ...]] = OrderedDict()
        self.lock = threading.Lock()

    def __call__(self, function: Callable[..., T], *args: Hashable) -> T:
        """Return `function(*args)`, computed or cached. Callers must not write into it."""
        if not fast_path_allowed():
            return function(*args)
        key = (function, args)
        with self.lock:
            if key in self.entries:
                self.entries.move_to_end(key)
                return self.entries[key]  # type: ignore[return-value]
        # A tensor of inference mode could not be used in a later backward pass; the default device is not in the key.
        with torch.inference_mode(False), torch.device("cpu"):
            result = function(*args)
        if _nbytes(result) <= self.limit // 4:
            self._store(key, result)
        return result

    def _store(self, key: Hashable, result: Tensor | tuple[Tensor, ...]) -> None:
        with self.lock:
            if key not in self.entries:  # another thread may have added it
                self.entries[key] = result
                self.size += _nbytes(result)
            while self.size > self.limit:
                self.size -= _nbytes(self.entries.popitem(last=False)[1])


def _nbytes(result: Tensor | tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in (result if isinstance(result, tuple) else (result,)))


cached = ConstantCache(2**26)
