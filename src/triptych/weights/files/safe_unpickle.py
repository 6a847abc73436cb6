"""PyTorch's pickled checkpoints, read without executing anything.

Unpickling runs whatever callables the file names. This reader does not unpickle: it interprets the opcodes and records
what they describe. StateDictKeys of classes and functions stay names (`GlobalName`), calls stay descriptions
(`RecordedCall`), and only the few calls that PyTorch writes for tensors are understood, as locations in the file.
Training arguments, Lightning objects, NumPy scalars and hostile code all become the same inert records.
"""

import math
import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import torch

from triptych.weights.files.tensor_entry import DamagedFileError


@dataclass(frozen=True)
class GlobalName:
    """A class or function that the file names. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class RecordedCall:
    """A call that the file asks for. It is never made."""

    function: Any
    arguments: Any
    state: Any = None
    items: dict[str | int, Any] = field(default_factory=dict)
    """Items set on the object, if it is a subclass of dict such as a yacs config node."""


@dataclass(frozen=True)
class StorageRef:
    """A block of numbers in the file."""

    dtype: torch.dtype | None
    """None for bytes without a type."""
    key: str
    numel: int


@dataclass(frozen=True)
class TensorView:
    """A tensor: a view of a storage."""

    storage: StorageRef
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


def parse_pickle(stream: BinaryIO, storages: dict[str, StorageRef] | None = None) -> Any:
    """Return the value that a pickle describes, as plain values and inert records.

    Args:
        stream: positioned at the first byte of the pickle; afterwards right behind its STOP opcode.
        storages: filled with every storage that the pickle refers to, by key.

    Raises:
        DamagedFileError: the opcodes are invalid, or of a kind that no checkpoint contains.
    """
    machine = _Machine({} if storages is None else storages)
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            if opcode.name == "STOP":
                return machine.stack.pop()
            operation = _OPERATIONS.get(opcode.name)
            if operation is None:
                raise DamagedFileError(
                    f"its pickle has the opcode {opcode.name}, which no checkpoint contains"
                )
            operation(machine, argument)
    except (
        ValueError,
        IndexError,
        KeyError,
        TypeError,
        AttributeError,
        OverflowError,
        struct.error,
    ) as problem:
        raise DamagedFileError(f"its pickle is damaged ({problem})") from problem
    except (RecursionError, MemoryError, UnicodeError) as problem:
        raise DamagedFileError("its pickle is damaged") from problem
    raise DamagedFileError("its pickle ends early")


class _Mark:
    """Stands on the stack for MARK."""


@dataclass
class _Machine:
    """The state of the pickle virtual machine."""

    storages: dict[str, StorageRef]
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        value = self.stack.pop()
        if value is _Mark:
            raise DamagedFileError("its pickle is damaged (a mark where a value belongs)")
        return value

    def pop_to_mark(self) -> list[Any]:
        items: list[Any] = []
        while (value := self.stack.pop()) is not _Mark:
            items.append(value)
        return items[::-1]

    def append(self, items: list[Any]) -> None:
        if isinstance(self.stack[-1], list):  # items of other classes are not needed
            self.stack[-1].extend(items)

    def set_items(self, items: list[Any]) -> None:
        target = self.stack[-1].items if isinstance(self.stack[-1], RecordedCall) else self.stack[-1]
        if isinstance(target, dict):
            # Other keys are never read, and hashing a hostile one can overflow the C stack.
            target.update(
                (k, v) for k, v in zip(items[::2], items[1::2], strict=True) if isinstance(k, str | int)
            )

    def push_dict(self, items: list[Any]) -> None:
        self.push({})
        self.set_items(items)

    def push_global(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise DamagedFileError("its pickle is damaged (a class without a name)")
        self.push(GlobalName(module, name))

    def push_persistent(self, key: Any) -> None:
        value = _resolve_persistent_id(key)
        if isinstance(value, StorageRef):
            self.storages[value.key] = value
        self.push(value)


# ------------------------------------------------------------------------------------------------ opcodes


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    def operation(machine: _Machine, argument: Any) -> None:
        items = tuple(machine.pop() for _ in range(count))
        machine.push(items[::-1])

    return operation


def _set_item(machine: _Machine, argument: Any) -> None:
    value, key = machine.pop(), machine.pop()
    machine.set_items([key, value])


def _global(machine: _Machine, argument: Any) -> None:
    module, _, name = argument.partition(" ")
    machine.push_global(module, name)


def _stack_global(machine: _Machine, argument: Any) -> None:
    name, module = machine.pop(), machine.pop()
    machine.push_global(module, name)


def _reduce(machine: _Machine, argument: Any) -> None:
    arguments, function = machine.pop(), machine.pop()
    machine.push(_record_call(function, arguments))


def _new_object_ex(machine: _Machine, argument: Any) -> None:
    keywords, arguments, cls = machine.pop(), machine.pop(), machine.pop()
    machine.push(RecordedCall(cls, (arguments, keywords)))


def _object(machine: _Machine, argument: Any) -> None:
    cls, *arguments = machine.pop_to_mark()
    machine.push(RecordedCall(cls, arguments))


def _instance(machine: _Machine, argument: Any) -> None:
    module, _, name = argument.partition(" ")
    machine.push(RecordedCall(GlobalName(module, name), machine.pop_to_mark()))


def _build(machine: _Machine, argument: Any) -> None:
    state = machine.pop()
    if isinstance(machine.stack[-1], RecordedCall):
        machine.stack[-1].state = state


def _put(machine: _Machine, argument: Any) -> None:
    machine.memo[argument] = machine.stack[-1]


def _memoize(machine: _Machine, argument: Any) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


_LITERALS = (
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
)
_OPERATIONS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(_LITERALS, lambda machine, argument: machine.push(argument)),
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, argument: None),
    "NONE": lambda machine, argument: machine.push(None),
    "NEWTRUE": lambda machine, argument: machine.push(True),
    "NEWFALSE": lambda machine, argument: machine.push(False),
    "MARK": lambda machine, argument: machine.push(_Mark),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _put),
    "MEMOIZE": _memoize,
    **dict.fromkeys(
        ("GET", "BINGET", "LONG_BINGET"), lambda machine, argument: machine.push(machine.memo[argument])
    ),
    "EMPTY_DICT": lambda machine, argument: machine.push({}),
    "EMPTY_TUPLE": lambda machine, argument: machine.push(()),
    # A set becomes a list: its items need not be hashable records.
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_SET"), lambda machine, argument: machine.push([])),
    "TUPLE": lambda machine, argument: machine.push(tuple(machine.pop_to_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    **dict.fromkeys(("LIST", "FROZENSET"), lambda machine, argument: machine.push(machine.pop_to_mark())),
    "DICT": lambda machine, argument: machine.push_dict(machine.pop_to_mark()),
    "APPEND": lambda machine, argument: machine.append([machine.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, argument: machine.append(machine.pop_to_mark())),
    "SETITEM": _set_item,
    "SETITEMS": lambda machine, argument: machine.set_items(machine.pop_to_mark()),
    "GLOBAL": _global,
    "STACK_GLOBAL": _stack_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _reduce),
    "NEWOBJ_EX": _new_object_ex,
    "OBJ": _object,
    "INST": _instance,
    "BUILD": _build,
    "PERSID": lambda machine, argument: machine.push_persistent(argument),
    "BINPERSID": lambda machine, argument: machine.push_persistent(machine.pop()),
    "POP": lambda machine, argument: machine.stack.pop(),
    "POP_MARK": lambda machine, argument: machine.pop_to_mark(),
    "DUP": lambda machine, argument: machine.push(machine.stack[-1]),
}
"""Opcode -> what it does to the machine, given the opcode's argument."""


# ------------------------------------------------------------------------------------------------ tensors


def _record_call(function: Any, arguments: Any) -> Any:
    """Return a record of a call; of the calls that PyTorch writes for tensors, the tensor's location."""
    if not isinstance(function, GlobalName) or not isinstance(arguments, tuple):
        return RecordedCall(function, arguments)
    if (function.module, function.name) in _DICTS:
        pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []  # written by Python 2
        return {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str | int)}
    if function.module in ("torch._utils", "torch._tensor"):
        if function.name in ("_rebuild_tensor", "_rebuild_tensor_v2"):
            storage, offset, shape, strides = arguments[:4]
            return _tensor_view(storage, offset, shape, strides, None)
        if function.name == "_rebuild_tensor_v3":
            storage, offset, shape, strides, _, _, dtype = arguments[:7]
            return _tensor_view(storage, offset, shape, strides, dtype)
        if function.name in ("_rebuild_parameter", "_rebuild_parameter_with_state"):
            return arguments[0]
        if function.name == "_rebuild_from_type_v2":
            # A tensor with attributes: (function, type, arguments, state).
            return _record_call(arguments[0], arguments[2])
    return RecordedCall(function, arguments)


def _resolve_persistent_id(key: Any) -> Any:
    """Resolve ("storage", type, key, device, number of elements), or ("module", class, source, ...) in old files."""
    if isinstance(key, tuple) and len(key) > 1 and key[0] == "module":
        return key[1]
    if (
        not isinstance(key, tuple)
        or len(key) < 5
        or key[0] != "storage"
        or not isinstance(key[1], GlobalName)
    ):
        raise DamagedFileError("its pickle refers to something outside the file")
    storage_type, numel = key[1].name, key[4]
    valid = isinstance(key[2], str | int) and isinstance(numel, int) and numel >= 0
    if storage_type not in _STORAGES or not valid:
        raise DamagedFileError(f"it has a storage of unknown type {storage_type}")
    if len(key) > 5 and key[5] is not None:
        raise DamagedFileError(
            "it has views of storages, as PyTorch 0.1 wrote them; save it again with a current PyTorch"
        )
    return StorageRef(_STORAGES[storage_type], str(key[2]), numel)


def _tensor_view(storage: Any, offset: Any, shape: Any, strides: Any, dtype: Any) -> TensorView:
    sizes = (*shape, *strides, offset)
    if not isinstance(storage, StorageRef) or not all(isinstance(n, int) and n >= 0 for n in sizes):
        raise DamagedFileError("a tensor in its pickle has no valid shape")
    dtype = _DTYPES.get(dtype.name) if isinstance(dtype, GlobalName) else storage.dtype
    if dtype is None or len(shape) != len(strides) or len(shape) > 16:
        raise DamagedFileError("a tensor in its pickle has no valid shape or type")
    numel = math.prod(shape)
    last = (
        offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True)) if numel else 0
    )
    available = storage.numel if storage.dtype is not None else storage.numel // dtype.itemsize
    if (numel and last >= available) or numel > available:
        raise DamagedFileError("a tensor in its pickle is larger than its storage")
    return TensorView(storage, dtype, offset, tuple(shape), tuple(strides))
