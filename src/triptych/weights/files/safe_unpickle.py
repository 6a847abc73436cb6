"""PyTorch's pickled checkpoints, read without executing anything.

Unpickling runs whatever callables the file names. This reader therefore does not unpickle: it walks the
opcodes and keeps a record of what they say. Names of classes and functions stay names (`Name`), calls stay
descriptions (`Call`), and of those only the handful that PyTorch writes for tensors are understood, as
places in the file. So training arguments, Lightning objects, NumPy scalars and hostile code are all the
same inert records.
"""

import math
import pickletools
import struct
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from triptych.weights.files.tensor_entry import Broken


@dataclass(frozen=True)
class Name:
    """A class or function that the file mentions; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """What the file asks to be called or built; never done."""

    function: Any
    arguments: Any
    state: Any = None
    items: dict[str | int, Any] = field(default_factory=dict)
    """What it is filled with if it is a dict of the file's own kind, such as a node of a yacs config."""


@dataclass(frozen=True)
class Storage:
    """A block of numbers in the file."""

    dtype: torch.dtype | None  # none for bytes without a type
    key: str
    numel: int


@dataclass(frozen=True)
class View:
    """A tensor: a storage seen with a shape."""

    storage: Storage
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": None,
}
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in _STORAGES.values() if dtype is not None}
_DTYPES |= {name: getattr(torch, name) for name in ("float8_e4m3fn", "float8_e5m2")}
_DICTS = {("collections", "OrderedDict"), ("builtins", "dict"), ("collections", "defaultdict")}


class _Mark:
    pass


def walk(stream: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """The value that a pickle describes, as plain values and inert records. Reads up to and including STOP.

    Args:
        stream: stands at the pickle's first byte; afterwards right behind its last.
        storages: gathers every storage that the pickle refers to, by key.

    Raises:
        Broken: the opcodes are damaged, or of a kind that no checkpoint has.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    storages = {} if storages is None else storages
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return stack.pop()
            _step(opcode.name, argument, stack, memo, storages)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        struct.error,
    ) as problem:
        raise Broken(f"its pickle is damaged ({problem})") from problem
    except (RecursionError, MemoryError, UnicodeError) as problem:
        raise Broken("its pickle is damaged") from problem
    raise Broken("its pickle ends early")


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
}


def _step(
    name: str, argument: Any, stack: list[Any], memo: dict[int, Any], storages: dict[str, Storage]
) -> None:
    if name in _VALUES:
        stack.append(argument)
    elif name in _CONSTANTS:
        stack.append(_CONSTANTS[name])
    elif name in ("PROTO", "FRAME"):
        pass
    elif name == "MARK":
        stack.append(_Mark)
    elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
        memo[argument] = stack[-1]
    elif name == "MEMOIZE":
        memo[len(memo)] = stack[-1]
    elif name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[argument])
    elif name in ("EMPTY_DICT", "EMPTY_LIST", "EMPTY_TUPLE", "EMPTY_SET"):
        stack.append({"EMPTY_DICT": dict, "EMPTY_TUPLE": tuple}.get(name, list)())
    elif name in ("TUPLE", "LIST", "FROZENSET"):
        items = _to_mark(stack)
        stack.append(tuple(items) if name == "TUPLE" else items)
    elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
        count = int(name[-1])
        items = tuple(_pop(stack) for _ in range(count))
        stack.append(items[::-1])
    elif name in ("APPEND", "APPENDS", "ADDITEMS"):
        items = [_pop(stack)] if name == "APPEND" else _to_mark(stack)
        if isinstance(stack[-1], list):  # what a foreign object is given is of no interest
            stack[-1].extend(items)
    elif name in ("SETITEM", "SETITEMS", "DICT"):
        items = [_pop(stack), _pop(stack)][::-1] if name == "SETITEM" else _to_mark(stack)
        if name == "DICT":
            stack.append({})
        filled = stack[-1].items if isinstance(stack[-1], Call) else stack[-1]
        if isinstance(filled, dict):
            # Other keys are nothing we read, and hashing a hostile one can overflow the C stack.
            filled.update(
                (k, v) for k, v in zip(items[::2], items[1::2], strict=True) if isinstance(k, str | int)
            )
    elif name == "GLOBAL":
        module, _, attribute = argument.partition(" ")
        stack.append(Name(module, attribute))
    elif name == "STACK_GLOBAL":
        attribute, module = _pop(stack), _pop(stack)
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise Broken("its pickle is damaged (a class without a name)")
        stack.append(Name(module, attribute))
    elif name in ("REDUCE", "NEWOBJ"):
        arguments, function = _pop(stack), _pop(stack)
        stack.append(_describe(function, arguments))
    elif name == "NEWOBJ_EX":
        keywords, arguments, cls = _pop(stack), _pop(stack), _pop(stack)
        stack.append(Call(cls, (arguments, keywords)))
    elif name == "OBJ":
        cls, *arguments = _to_mark(stack)
        stack.append(Call(cls, arguments))
    elif name == "INST":
        module, _, attribute = argument.partition(" ")
        stack.append(Call(Name(module, attribute), _to_mark(stack)))
    elif name == "BUILD":
        state = _pop(stack)
        if isinstance(stack[-1], Call):
            stack[-1].state = state
    elif name in ("PERSID", "BINPERSID"):
        stack.append(_persistent(argument if name == "PERSID" else _pop(stack)))
        if isinstance(stack[-1], Storage):
            storages[stack[-1].key] = stack[-1]
    elif name == "POP":
        stack.pop()
    elif name == "POP_MARK":
        _to_mark(stack)
    elif name == "DUP":
        stack.append(stack[-1])
    else:
        raise Broken(f"its pickle has the instruction {name}, which no checkpoint has")


def _pop(stack: list[Any]) -> Any:
    value = stack.pop()
    if value is _Mark:
        raise Broken("its pickle is damaged (a mark where a value belongs)")
    return value


def _to_mark(stack: list[Any]) -> list[Any]:
    items: list[Any] = []
    while (value := stack.pop()) is not _Mark:
        items.append(value)
    return items[::-1]


def _describe(function: Any, arguments: Any) -> Any:
    """A call as a record; the ones that PyTorch writes for tensors as the tensor's place."""
    if not isinstance(function, Name) or not isinstance(arguments, tuple):
        return Call(function, arguments)
    if (function.module, function.name) in _DICTS:
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []  # as Python 2 wrote them
        return {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str | int)}
    if function.module in ("torch._utils", "torch._tensor"):
        if function.name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            return _view(storage, offset, shape, strides, None)
        if function.name == "_rebuild_tensor_v3":
            storage, offset, shape, strides, _, _, dtype = arguments[:7]
            return _view(storage, offset, shape, strides, dtype)
        if function.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return arguments[0]
        if (
            function.name == "_rebuild_from_type_v2"
        ):  # a tensor with attributes: (function, type, arguments, state)
            return _describe(arguments[0], arguments[2])
    return Call(function, arguments)


def _persistent(key: Any) -> Any:
    """What an id stands for: ("storage", type, key, device, number of elements), or an old file's class."""
    if (
        isinstance(key, tuple) and len(key) > 1 and key[0] == "module"
    ):  # beside a class, old files keep its source
        return key[1]
    if not isinstance(key, tuple) or len(key) < 5 or key[0] != "storage" or not isinstance(key[1], Name):
        raise Broken("its pickle refers to something outside the file")
    kind, numel = key[1].name, key[4]
    if kind not in _STORAGES or not isinstance(key[2], str | int) or not isinstance(numel, int) or numel < 0:
        raise Broken(f"it holds a storage of unknown kind {kind}")
    if len(key) > 5 and key[5] is not None:
        raise Broken(
            "it holds views of storages, as PyTorch 0.1 wrote them; save it again with a current PyTorch"
        )
    return Storage(_STORAGES[kind], str(key[2]), numel)


def _view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> Any:
    sizes = (*shape, *strides, offset)
    if not isinstance(storage, Storage) or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise Broken("a tensor in its pickle has no valid shape")
    kind = _DTYPES.get(dtype.name) if isinstance(dtype, Name) else storage.dtype
    if kind is None or len(shape) != len(strides) or len(shape) > 16:
        raise Broken("a tensor in its pickle has no valid shape or type")
    numel = math.prod(shape)
    last = (
        offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if numel else 0
    )
    available = storage.numel if storage.dtype is not None else storage.numel // kind.itemsize
    if (numel and last >= available) or numel > available:
        raise Broken("a tensor in its pickle is larger than its storage")
    return View(storage, kind, offset, tuple(shape), tuple(strides))
