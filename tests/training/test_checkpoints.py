"""The folder of a checkpoint: whole or not there, checked when read, and what is said where the disk does not do."""

import json
import os
import resource
import shutil
from dataclasses import replace

import pytest
import torch
from tests.training.interrupted_runs import checkpoint_steps, interrupt_after, last_checkpoint, log_rows

from triptych.errors import TriptychError
from triptych.training import run
from triptych.training.checkpoints import Checkpoints, verify


def tensors(value=0.0):
    return {
        "a": torch.full((3, 4), value),
        "b.step": torch.tensor(value),
        "c": torch.full((5,), value).bfloat16(),
    }


def saved(folder, *steps, keep=2):
    checkpoints = Checkpoints(folder, keep)
    for step in steps:
        checkpoints.save(step, tensors(float(step)), {"step": step})
    checkpoints.wait()
    return checkpoints


def newest(checkpoints):
    result = checkpoints.newest()
    assert result is not None
    return result


def test_what_was_saved_is_read_and_the_last_are_kept(tmp_path):
    original = tensors(1.0)
    checkpoints = Checkpoints(tmp_path / "c", keep=2)
    checkpoints.save(7, original, {"step": 7, "best": {"top1": 0.1 + 0.2}})
    for tensor in original.values():
        tensor.fill_(9.0)  # training goes on; what was saved is what it was
    checkpoints.wait()
    checkpoint, notes = newest(checkpoints)
    assert notes == []
    assert (checkpoint.step, checkpoint.facts) == (7, {"step": 7, "best": {"top1": 0.1 + 0.2}})
    read = checkpoint.read()
    assert {name: (t.dtype, t.shape) for name, t in read.items()} == {
        n: (t.dtype, t.shape) for n, t in original.items()
    }
    assert all((t == 1).all() for t in read.values())
    for step in (8, 9, 10):
        checkpoints.save(step, original, {"step": step})
    checkpoints.close()
    assert [path.name for path in (tmp_path / "c").iterdir() if path.name[0] == "."] == []
    assert [path.name for path in checkpoints.paths()] == ["step-000000010", "step-000000009"]
    assert sorted(path.name for path in checkpoints.paths()[0].iterdir()) == [
        ".metadata",
        "__0_0.distcp",
        "facts.json",
    ]


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "facts.json"])
def test_one_bit_is_found_in_every_file(tmp_path, name):
    checkpoints = saved(tmp_path / "c", 1, 2)
    path = checkpoints.paths()[0] / name
    data = bytearray(path.read_bytes())
    for at in (0, len(data) // 2, len(data) - 3):
        path.write_bytes(data[:at] + bytes([data[at] ^ 2]) + data[at + 1 :])
        checkpoint, notes = newest(checkpoints)
        assert checkpoint.step == 1
        assert [note.startswith(f"{path.parent} is damaged (") for note in notes] == [True]
    path.write_bytes(data)
    assert newest(checkpoints)[0].step == 2
    path.unlink()
    assert newest(checkpoints)[0].step == 1
    shutil.rmtree(checkpoints.paths()[1])
    with pytest.raises(
        TriptychError, match=r"every checkpoint in .* is damaged; remove that folder to start again"
    ):
        checkpoints.newest()


def test_a_later_damaged_checkpoint_makes_room_first(tmp_path):
    checkpoints = saved(tmp_path, 450, 500)
    (tmp_path / "step-000000500" / "__0_0.distcp").write_bytes(b"broken")
    saved(tmp_path, 460, keep=1)
    assert [path.name for path in checkpoints.paths()] == ["step-000000460"]


def test_the_same_step_again_has_new_facts_and_the_same_tensors(tmp_path):
    checkpoints = saved(tmp_path, 5)
    before = os.stat(checkpoints.paths()[0] / "__0_0.distcp").st_mtime_ns
    checkpoints.save(5, tensors(5.0), {"step": 5, "evaluated": 5})
    checkpoints.wait()
    assert verify(checkpoints.paths()[0]) == {"step": 5, "evaluated": 5}
    assert os.stat(checkpoints.paths()[0] / "__0_0.distcp").st_mtime_ns == before


def test_an_index_that_would_run_something_is_refused(tmp_path):
    import pickle

    class Ill:
        def __reduce__(self):
            return (os.system, (f"touch {tmp_path}/ran",))

    checkpoint, _ = newest(saved(tmp_path / "c", 5))
    (checkpoint.path / ".metadata").write_bytes(pickle.dumps(Ill()))
    with pytest.raises(pickle.UnpicklingError, match="which no index needs"):
        checkpoint.read()
    assert not (tmp_path / "ran").exists()


def test_half_a_checkpoint_is_none_and_is_tidied_away(tmp_path):
    checkpoints = saved(tmp_path, 5)
    shutil.copytree(checkpoints.paths()[0], tmp_path / ".step-000000006.part")
    assert newest(checkpoints)[0].step == 5
    checkpoints.remove_partial()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000005"]


def test_checkpoints_of_the_earlier_format_are_refused(tmp_path):
    (tmp_path / "step-000000450.safetensors").write_bytes(b"x")
    with pytest.raises(
        TriptychError, match=r"earlier version of triptych; finish that run with it, or give another --out"
    ):
        Checkpoints(tmp_path, 2).newest()


@pytest.fixture
def small_files():
    """No file may grow past 64 KB, as on a disk that is nearly full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", [{"a": torch.zeros(1 << 16)}, {f"a{i}": torch.zeros(9) for i in range(99)}])
def test_a_full_disk_is_one_line_and_harms_nothing(tmp_path, what, small_files):
    """In the middle of a tensor, or between two."""
    checkpoints = saved(tmp_path, 5)
    checkpoints.save(6, what, {})
    with pytest.raises(
        TriptychError, match=r"cannot write .*step-000000006: File too large; choose another place"
    ):
        checkpoints.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000005"]
    assert newest(checkpoints)[0].step == 5
    checkpoints.save(7, tensors(), {})
    checkpoints.wait()


def test_a_place_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(
        TriptychError, match=r"cannot write .*c/step-000000006: Not a directory; choose another place"
    ):
        saved(tmp_path / "c", 6)
    with pytest.raises(TriptychError, match=r"the run's folder .*gone no longer exists"):
        Checkpoints(tmp_path / "gone" / "checkpoints", 2).save(6, tensors(), {})


def test_a_damaged_newest_checkpoint_is_passed_over_and_said(config, tmp_path, monkeypatch, capsys):
    run(config, tmp_path / "whole")
    for _ in range(2):
        with monkeypatch.context() as patch:
            interrupt_after(patch, 2)
            run(config, tmp_path / "r")
    assert checkpoint_steps(tmp_path / "r") == [4, 2]
    newest = tmp_path / "r" / "checkpoints" / "step-000000004" / "__0_0.distcp"
    data = bytearray(newest.read_bytes())
    data[-20] ^= 1
    newest.write_bytes(data)
    capsys.readouterr()
    run(config, tmp_path / "r")
    output = capsys.readouterr().err
    assert (
        "step-000000004 is damaged (the checksum of __0_0.distcp differs); resuming from the previous one"
        in output
    )
    assert "resuming from step 2" in output
    (one, _), (other, _) = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "r")
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_that_is_cut_off_in_an_evaluation_does_it_again(config, tmp_path, monkeypatch):
    """What slurm gives is less than an evaluation may take."""
    from triptych.training.monitoring.signals import Interrupts
    from triptych.training.tasks.classification import Classify

    run(config, tmp_path / "whole")
    sound, breakable, interrupts = Classify.evaluate, Interrupts.abortable, []

    def signalled(self, model, loader, group):
        for figure in sound(self, model, loader, group):
            interrupts[-1].handle(15)
            yield figure

    def listening(self, work):
        interrupts.append(self)
        return breakable(self, work)

    with monkeypatch.context() as patch:
        patch.setattr(Classify, "evaluate", signalled)
        patch.setattr(Interrupts, "abortable", listening)
        for step in (4, 4):
            assert not run(config, tmp_path / "cut").finished
            assert checkpoint_steps(tmp_path / "cut") == [step]
            assert not any("eval" in row for row in log_rows(tmp_path / "cut"))
    assert run(config, tmp_path / "cut").finished
    (one, facts), (other, others) = last_checkpoint(tmp_path / "whole"), last_checkpoint(tmp_path / "cut")
    assert facts == others
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    evaluations = [[row for row in log_rows(tmp_path / name) if "eval" in row] for name in ("whole", "cut")]
    assert evaluations[0] == evaluations[1]


def test_a_save_that_fails_ends_the_run_in_one_line_and_keeps_the_one_before(
    config, tmp_path, monkeypatch, request
):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        run(config, tmp_path)
    request.getfixturevalue("small_files")
    often = replace(config, loop=replace(config.loop, save_every=0.0))
    with pytest.raises(TriptychError, match=r"cannot write .*step-00000000\d: File too large"):
        run(often, tmp_path)
    assert checkpoint_steps(tmp_path) == [2]
    assert (
        json.loads((tmp_path / "checkpoints" / "step-000000002" / "facts.json").read_text())["facts"]["step"]
        == 2
    )
