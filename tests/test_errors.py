"""The exception tree, and the hint for misspelled names."""

import pytest

import triptych as tp
from triptych.cli import main
from triptych.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    DeviceError,
    StorageError,
    TriptychError,
    did_you_mean,
    near_names,
    near_names_hint,
    require_known,
)


@pytest.mark.parametrize("error", [ConfigError, DataError, CheckpointError, DeviceError, StorageError])
def test_one_base_catches_every_error(error):
    assert issubclass(error, TriptychError)
    assert issubclass(error, ValueError)
    assert getattr(tp, error.__name__) is error


def test_the_command_line_prints_any_of_them_and_exits_with_2(capsys, monkeypatch):
    def refuse(args):
        raise StorageError("cannot write a.png: disk full; free space")

    monkeypatch.setattr("triptych.cli._run", refuse)
    assert main(["list"]) == 2
    assert capsys.readouterr().err == "triptych: cannot write a.png: disk full; free space\n"


def test_near_names_ignore_case_and_hyphens_and_keep_their_spelling():
    assert near_names("dpm++ 2M", ["euler", "dpm++2m", "dpm++2m-sde"]) == ["dpm++2m", "dpm++2m-sde"]
    assert near_names("watercolor", ["Ink", "Watercolor"]) == ["Watercolor"]
    assert near_names("vit-b61", [f"vit-b{n}" for n in range(9)], limit=2) == ["vit-b6", "vit-b1"]
    assert near_names("xyzzy", ["euler"]) == []


def test_hints():
    assert near_names_hint("eular", ["euler", "ddim"]) == "near names: euler"
    assert near_names_hint("???", ["euler", "ddim"]) == "there are euler, ddim"
    assert near_names_hint("???", ["euler", "ddim"], otherwise="give a number") == "give a number"
    assert did_you_mean("cuont", ["count", "flag"]) == "; did you mean 'count'?"
    assert did_you_mean("xyzzy", ["count", "flag"]) == ""


def test_a_known_name_is_returned_and_an_unknown_one_refused():
    assert require_known("ddim", iter(["euler", "ddim"]), "sampler") == "ddim"
    with pytest.raises(ConfigError, match="no sampler is called 'dimm'; near names: ddim"):
        require_known("dimm", ["euler", "ddim"], "sampler")
