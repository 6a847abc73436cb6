"""Files made to harm: nothing in them runs, and each is one line that names the file."""

import io
import json
import os
import pickle
import struct
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from triptych.errors import CheckpointError
from triptych.weights import load
from triptych.weights.files.opening import open_checkpoint
from triptych.weights.files.safe_unpickle import GlobalName, RecordedCall, parse_pickle

ran: list[str] = []


def _trip(*_, **__):
    ran.append("ran")
    return {}


class Command:
    """Unpickling it calls a function with arguments."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


class State:
    """Unpickling it calls __setstate__, which trips."""

    def __init__(self):
        self.x = 1

    def __setstate__(self, state):
        _trip()


class Key(str):
    def __hash__(self):
        _trip()
        return 1

    def __reduce__(self):
        return Key, ("w",)


def zipped(data: bytes, storages: dict[str, bytes] | None = None) -> bytes:
    """A torch archive around a pickle."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/version", "3\n")
        for name, content in (storages or {}).items():
            archive.writestr(f"archive/data/{name}", content)
    return out.getvalue()


def complaint(function, *arguments) -> str:
    """What a CheckpointError says; nothing where none is raised. Another error is a failure."""
    try:
        function(*arguments)
    except CheckpointError as problem:
        return str(problem)
    return ""


def payloads(marker):
    yield Command(os.system, f"touch {marker}")
    yield Command(eval, f"open({str(marker)!r}, 'w').close()")
    yield Command(exec, f"open({str(marker)!r}, 'w').close()")
    yield Command(_trip)
    yield State()
    yield {"model": {"w": torch.ones(1)}, "args": Command(os.system, f"touch {marker}")}
    yield {"model": {"w": Command(_trip)}}
    yield Command(Command, Command(os.system, f"touch {marker}"))
    yield {Key("w"): torch.ones(1)}


@pytest.mark.parametrize("modern", [True, False])
@pytest.mark.parametrize("index", range(9))
def test_no_payload_runs(tmp_path, index, modern):
    ran.clear()
    marker = tmp_path / "harmed"
    value = list(payloads(marker))[index]
    path = tmp_path / "model.pth"
    torch.save(value, path, _use_new_zipfile_serialization=modern)
    ran.clear()  # pickling a Key hashes it
    message = complaint(load, path)
    assert "model.pth" in message
    assert "\n" not in message
    assert ran == []
    assert not marker.exists()
    # The same file does run where it is unpickled: the test would see it.
    torch.load(path, weights_only=False)
    assert ran or marker.exists()


def opcodes(*parts: bytes) -> bytes:
    return b"\x80\x02" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    "program",
    [
        opcodes(b"cos\nsystem\n", b"X\x04\x00\x00\x00true", b"\x85R"),
        opcodes(b"(X\x04\x00\x00\x00truecos\nsystem\no"),  # OBJ
        opcodes(b"(X\x04\x00\x00\x00trueios\nsystem\n"),  # INST
        opcodes(b"cbuiltins\nobject\n", b")\x81", b"}b"),  # NEWOBJ, BUILD
        opcodes(b"ccollections\nOrderedDict\n", b")R", b"}X\x0c\x00\x00\x00__setstate__cos\nsystem\nsb"),
        opcodes(b"ctorch._utils\n_rebuild_tensor_v2\n", b"}X\x01\x00\x00\x00xK\x01sb"),  # state on a function
        opcodes(b"ctriptych.weights.files.safe_unpickle\nparse_pickle\n", b"X\x01\x00\x00\x00x\x85R"),
        opcodes(
            b"cbuiltins\ngetattr\n", b"cos\nfoo\nX\x06\x00\x00\x00system\x86R", b"X\x01\x00\x00\x00x\x85R"
        ),
    ],
)
def test_handmade_programs_are_only_described(program):
    value = parse_pickle(io.BytesIO(program))
    assert isinstance(value, RecordedCall | GlobalName | dict)


def test_extensions_and_foreign_buffers_are_refused():
    for program in (opcodes(b"\x82\x01"), b"\x80\x05\x97."):
        with pytest.raises(Exception, match="no checkpoint contains"):
            parse_pickle(io.BytesIO(program))


def test_deep_nesting_and_self_reference_end(tmp_path):
    deep = b"\x80\x02" + b")" + b"\x85" * 20_000 + b"."
    parse_pickle(io.BytesIO(deep))
    as_key = b"\x80\x02}" + b")" + b"\x85" * 20_000 + b"K\x01s."
    assert parse_pickle(io.BytesIO(as_key)) == {}
    loop = parse_pickle(io.BytesIO(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."))
    assert loop["a"] is loop
    (tmp_path / "a.pth").write_bytes(zipped(b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s."))
    with pytest.raises(CheckpointError, match="holds no tensors"):
        open_checkpoint(tmp_path / "a.pth")


def test_settings_that_hold_themselves_end(tmp_path):
    """A thousand names for itself, in itself: what is read of it has a bound."""
    loop: dict[str, object] = {}
    loop |= {str(i): loop for i in range(1000)} | {"plain": 3, "list": [loop, 1]}
    torch.save({"model": {"w": torch.ones(1)}, "config": loop, "args": [loop]}, tmp_path / "a.pth")
    assert open_checkpoint(tmp_path / "a.pth").settings["inside"]["config"]["plain"] == 3


def test_dicts_of_dicts_of_dicts_end(tmp_path):
    """A thousand names for one dict, at each of ten levels."""
    nested: dict[str, object] = {"w": torch.ones(1)}
    for _ in range(10):
        nested = {str(i): nested for i in range(1000)}
    torch.save(nested, tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match="no tensors"):
        open_checkpoint(tmp_path / "a.pth")


STORAGE = object()


def tensor_program(numel: int, offset: int, size: tuple, stride: tuple) -> bytes:
    """A dict {"w": tensor} with given numbers, as torch pickles it."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if value is STORAGE else None

    out = io.BytesIO()
    rebuild = Command(torch._utils._rebuild_tensor_v2, STORAGE, offset, size, stride, False, {})
    Pickler(out, 2).dump({"w": rebuild})
    return out.getvalue()


@pytest.mark.parametrize(
    ("arguments", "data"),
    [
        ((4, 0, (1 << 40,), (0,)), 16),  # a small storage blown up by stride 0
        ((4, 0, (8,), (1,)), 16),
        ((4, 3, (2,), (1,)), 16),
        ((4, -1, (2,), (1,)), 16),
        ((4, 0, (-2,), (1,)), 16),
        ((4, 0, (2,), (-1,)), 16),
        ((4, 0, (2, 2), (1,)), 16),
        ((1 << 60, 0, (1 << 60,), (1,)), 16),  # says more than the file has
        ((4, 0, (4,), (1,)), 8),
        ((-4, 0, (1,), (1,)), 16),
        (("4", 0, (1,), (1,)), 16),
        ((4, 0, (1.5,), (1,)), 16),
    ],
)
def test_tensors_that_reach_outside_are_refused(tmp_path, arguments, data):
    path = tmp_path / "model.pth"
    path.write_bytes(zipped(tensor_program(*arguments), {"0": b"\0" * data}))
    with pytest.raises(CheckpointError, match=r"model\.pth is not a valid pickle checkpoint"):
        open_checkpoint(path)


def safetensors_bytes(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def test_a_zip_member_without_a_name_is_refused(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(zipped(pickle.dumps({})).replace(b"archive/version", b"\0rchive/version"))
    assert "without a name" in complaint(load, path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"hello, this is a text file and no checkpoint at all\n",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        safetensors_bytes({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 7),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, b"\0" * 8),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, b"\0" * 8),
        safetensors_bytes({"w": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 8]}}, b"\0" * 8),
        safetensors_bytes({"w": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, b"\0" * 8),
        safetensors_bytes(
            {n: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} for n in "ab"}, b"\0" * 8
        ),  # overlapping
        safetensors_bytes(b'{"w": ', length=1 << 62),  # a header that says it is enormous
        safetensors_bytes(b"{" + b'"a":{' * 5000 + b"}" * 5001),
        safetensors_bytes(b"[]"),
        b"PK\x03\x04" + b"\0" * 100,
        b"\x80\x02" + b"\xff" * 100,
        zipped(b"\x80\x02}."),
        zipped(b""),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "model.pth", "model.npz"])
def test_damaged_files_are_one_line_with_their_name(tmp_path, content, name):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        load(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """One good file of each kind."""
    folder = tmp_path_factory.mktemp("whole")
    tensors = {f"blocks.{i}.weight": torch.randn(5, 7) for i in range(6)}
    save_file(tensors, folder / "a.safetensors")
    torch.save({"model": tensors}, folder / "b.pth")
    torch.save({"model": tensors}, folder / "c.pth", _use_new_zipfile_serialization=False)
    np.savez(folder / "d.npz", **{name: t.numpy() for name, t in tensors.items()})
    np.savez_compressed(folder / "e.npz", **{name: t.numpy() for name, t in tensors.items()})
    return sorted(folder.iterdir())


def read_all(path) -> None:
    """Open and read everything; a complaint is fine, another error is not."""

    def everything():
        checkpoint = open_checkpoint(path)
        for name in checkpoint.entries:
            checkpoint.read(name)
            checkpoint.mapped(name)

    message = complaint(everything)
    assert "\n" not in message
    assert not message or path.name in message


SLOWLY = settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))


@SLOWLY
@given(which=st.integers(0, 4), share=st.floats(0, 1))
def test_truncated_anywhere(full, tmp_path_factory, which, share):
    content = full[which].read_bytes()
    path = tmp_path_factory.getbasetemp() / f"cut-{full[which].name}"
    path.write_bytes(content[: int(share * (len(content) - 1))])
    with pytest.raises(CheckpointError, match="cut-"):
        open_checkpoint(path)


@SLOWLY
@given(
    which=st.integers(0, 4),
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), min_size=1, max_size=20),
)
def test_bytes_changed_anywhere(full, tmp_path_factory, which, changes):
    content = bytearray(full[which].read_bytes())
    for share, value in changes:
        content[int(share * (len(content) - 1))] = value
    path = tmp_path_factory.getbasetemp() / f"changed-{full[which].name}"
    path.write_bytes(bytes(content))
    read_all(path)


@SLOWLY
@given(which=st.integers(0, 4), seed=st.integers(0, 10_000), size=st.sampled_from([1, 16, 64, 512]))
def test_shuffled_pieces(full, tmp_path_factory, which, seed, size):
    content = full[which].read_bytes()
    pieces = [content[i : i + size] for i in range(0, len(content), size)]
    order = np.random.default_rng(seed).permutation(len(pieces))
    path = tmp_path_factory.getbasetemp() / f"shuffled-{full[which].name}"
    path.write_bytes(b"".join(pieces[i] for i in order))
    read_all(path)


@SLOWLY
@given(program=st.binary(max_size=200))
def test_random_pickles(tmp_path_factory, program):
    path = tmp_path_factory.getbasetemp() / "random.pth"
    path.write_bytes(zipped(b"\x80\x02" + program + b"."))
    read_all(path)
