"""Files appear complete or not at all, and a failure leaves the previous file and nothing else."""

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest

import triptych as tp
from triptych.atomic_write import write_atomically, write_text_atomically
from triptych.errors import CheckpointError, StorageError


def test_a_new_file_in_a_new_folder(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, lambda file: file.write(b"whole"))
    assert path.read_bytes() == b"whole"
    assert os.listdir(path.parent) == ["file.bin"]


@pytest.mark.parametrize("save", [tp.save, tp.export], ids=["save", "export"])
def test_for_a_network_no_more_than_one_folder_is_made(tmp_path, save):
    net = tp.create("vit-ti16", depth=1, embed_dim=16, num_heads=1, image_size=32, num_classes=2)
    format = () if save is tp.save else ("triptych",)
    with pytest.raises(StorageError, match=r"the folder .*a does not exist; make it first"):
        save(net, tmp_path / "a" / "b" / "net.safetensors", *format)
    assert os.listdir(tmp_path) == []
    save(net, tmp_path / "a" / "net.safetensors", *format)
    assert os.listdir(tmp_path / "a") == ["net.safetensors"]


@pytest.mark.parametrize("name", ["net.pth", "net.pt", "net.ckpt", "net.bin", "net"])
def test_a_network_is_not_saved_under_the_suffix_of_another_format(tmp_path, name):
    net = tp.create("vit-ti16", depth=1, embed_dim=16, num_heads=1, image_size=32, num_classes=2)
    with pytest.raises(CheckpointError, match=r"saved as \.safetensors; give a name that ends so, or use tp"):
        tp.save(net, tmp_path / name)
    assert os.listdir(tmp_path) == []


def test_text_is_utf8(tmp_path):
    write_text_atomically(tmp_path / "words.txt", "é😀\n")
    assert (tmp_path / "words.txt").read_bytes() == "é😀\n".encode()


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new" * 100_000)
        file.flush()
        assert path.read_bytes() == b"old"

    write_atomically(path, write)
    assert path.read_bytes() == b"new" * 100_000


def test_the_writer_may_seek(tmp_path):
    def write(file):
        file.write(b"....tail")
        file.seek(0)
        file.write(b"head")

    write_atomically(tmp_path / "file", write)
    assert (tmp_path / "file").read_bytes() == b"headtail"


@pytest.mark.parametrize(
    "problem", [ValueError("in the middle"), KeyboardInterrupt()], ids=["error", "Ctrl-C"]
)
def test_a_failure_in_the_middle_leaves_the_old_file(tmp_path, problem):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"half of the n")
        raise problem

    with pytest.raises(type(problem)):
        write_atomically(path, write)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_full_disk_is_a_users_problem_in_one_line(tmp_path, monkeypatch, moment):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    if moment != "write":
        monkeypatch.setattr(os, moment, full)
    with pytest.raises(StorageError) as caught:
        write_atomically(path, full if moment == "write" else lambda file: file.write(b"new"))
    assert (
        str(caught.value)
        == f"cannot write {path}: No space left on device; free space or choose another place"
    )
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs limits of a POSIX process")
def test_a_disk_that_really_fills_up(tmp_path):
    # The system refuses to let files grow past 64 KiB: the same path through the C library as a full disk.
    script = """
import resource, sys
from triptych.errors import StorageError
from triptych.atomic_write import write_atomically
resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))
try:
    write_atomically(sys.argv[1], lambda file: file.write(bytes(10_000_000)))
except StorageError as problem:
    print(problem)
"""
    path = tmp_path / "file"
    path.write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script, str(path)], capture_output=True, text=True)
    assert done.stdout.startswith(f"cannot write {path}: "), done.stderr
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_bytes(b"a file, no folder")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "file" / "inside", tmp_path / "folder", tmp_path / ("n" * 300)):
        with pytest.raises(StorageError, match="cannot write"):
            write_atomically(path, lambda file: file.write(b"x"))
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder") == []


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX modes")
def test_a_result_is_an_ordinary_file(tmp_path, monkeypatch):
    """Its permissions are those that the umask leaves, which is never changed: other threads would see it."""
    before = os.umask(0o027)
    try:
        with monkeypatch.context() as patch:
            patch.delattr(os, "umask")
            write_text_atomically(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_readers_see_one_whole_file_or_another(tmp_path):
    path, stop, seen = tmp_path / "file", threading.Event(), set()
    write_atomically(path, lambda file: file.write(b"0" * 50_000))

    def read():
        while not stop.is_set():
            content = path.read_bytes()
            seen.add((len(content), len(set(content))))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for i in range(30):
            write_atomically(path, lambda file, i=i: file.write(str(i % 10).encode() * 50_000))
    finally:
        stop.set()
        reader.join()
    assert seen == {(50_000, 1)}
