import json
import sys
import types

import pytest

from triptych.errors import TriptychError
from triptych.training.monitoring.log import RunLog


def test_rows_are_json_lines_and_the_screen_gets_plain_ones(tmp_path, capsys):
    with RunLog(tmp_path, total=10, resumed=0, interval=0.0) as log:
        log.write([{"step": 1, "loss": 0.5}, {"step": 2, "eval": {"top1": 0.25}}])
        assert log.due()
        log.show(2, "loss 0.5")
        log.message("[1/2] done")
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "eval": {"top1": 0.25}},
    ]
    assert capsys.readouterr().err == "step 2/10  loss 0.5\n[1/2] done\n"


def test_what_was_lost_and_is_done_again_is_taken_out(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"ste')
    with RunLog(tmp_path, total=10, resumed=2, interval=1.0) as log:
        log.write([{"step": 3, "again": 1}])
    assert (tmp_path / "log.jsonl").read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": 1}\n'


def test_tensorboard_gets_every_number_under_its_name(tmp_path, monkeypatch):
    wrote = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            wrote.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            wrote.append((name, value, step))

        def close(self):
            wrote.append("closed")

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    with RunLog(tmp_path, total=10, resumed=0, interval=1.0, tensorboard=True) as log:
        log.write([{"step": 4, "loss": 0.5, "eval": {"top1": 1}}])
    assert wrote == [(str(tmp_path / "tensorboard"), 1), ("loss", 0.5, 4), ("eval/top1", 1.0, 4), "closed"]


def test_tensorboard_that_is_not_there_names_its_pip_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(TriptychError, match="pip install 'triptych"):
        RunLog(tmp_path, total=10, resumed=0, interval=1.0, tensorboard=True)
