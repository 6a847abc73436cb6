"""`triptych.train` and `triptych.evaluate`, from a folder of images to a score."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest

import triptych as tp
from triptych.config import with_changes
from triptych.recipes import recipe
from triptych.training.configs.base import ClassifyConfig

TINY = {
    "model": "vit-ti16",
    "model_args": ("depth=1", "embed_dim=24", "mlp_ratio=2", "patch_size=8"),
    "image_size": (16, 16),
    "epochs": 1,
    "batch_size": 8,
    "workers": 0,
    "eval_fraction": 0.2,
    "precision": "fp32",
    "device": "cpu",
}


def test_a_folder_of_images_becomes_a_trained_and_evaluated_model(color_images, tmp_path):
    out = tmp_path / "run"
    result = tp.train("vit", data=color_images, out=out, **TINY, **{"optim.lr": 3e-3})
    assert result.finished
    assert (result.run, result.step) == (out, 4)
    assert result.score == result.best["top1"]
    assert json.loads(json.dumps(result.to_json()))["run"] == str(out)
    config = json.loads((out / "config.json").read_text())
    assert (config["optim"]["lr"], config["loop"]["epochs"], config["loading"]["batch_size"]) == (3e-3, 1, 8)

    evaluation = tp.evaluate(out, workers=0, dtype="fp32")
    assert evaluation.task == "classification"
    assert evaluation.count == 8
    assert evaluation.top1 == result.score
    assert evaluation.classes == ("blue", "green", "red")
    assert evaluation.confusion.sum() == 8
    stored = json.loads(json.dumps(evaluation.to_json()))
    assert stored["top1"] == evaluation.top1
    assert stored["per_class"]["red"]["count"] == 3

    full = tp.evaluate(tp.load(out), str(color_images), workers=0, batch_size=5)
    assert full.count == 42

    # The same call finds the run finished.
    assert tp.train("vit", data=color_images, out=out, **TINY, **{"optim.lr": 3e-3}) == result


def test_a_run_config_is_a_recipe(color_images, tmp_path):
    config = with_changes(recipe("vit")(), {**TINY, "data": str(color_images)})
    assert tp.train(config, out=tmp_path / "run").finished


def test_fields_are_found_by_their_own_dotted_or_parent_name():
    config = ClassifyConfig()
    wanted = replace(config, loop=replace(config.loop, epochs=3.0), data="here")
    assert with_changes(config, {"data": "here", "epochs": 3}) == wanted
    assert with_changes(config, {"data": "here", "loop.epochs": 3}) == wanted
    assert with_changes(config, {"data": "here", "loop": {"epochs": 3}}) == wanted
    assert with_changes(config, {"loop": replace(config.loop, epochs=3.0), "data": "here"}) == wanted
    assert with_changes(config, {"loop": {"epochs": 2}, "seed": 5}).loop.seed == 5
    # A field of the config itself takes precedence over a nested one.
    first_stage = recipe("autoencoder")()
    assert with_changes(first_stage, {"model": "kl-f4"}).model == "kl-f4"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"epoch": 3}, "ClassifyConfig has no field 'epoch'; near names: loop.epochs"),
        ({"loop.epocks": 3}, "ClassifyConfig has no field 'loop.epocks'; near names: loop.epochs"),
        ({"loop": {"epoch": 3}}, "LoopConfig has no field 'epoch'; near names: epochs"),
        ({"epochs": 3, "loop.epochs": 4}, "ClassifyConfig.loop.epochs is given twice; leave one of the two out"),
        ({"epochs": "many"}, "LoopConfig.epochs is 'many', which must be float"),
    ],
)  # fmt: skip
def test_wrong_fields_are_refused_in_one_line(fields, message, tmp_path):
    with pytest.raises(tp.ConfigError) as caught:
        tp.train("vit", out=tmp_path, **fields)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_name_of_several_fields_is_refused():
    with pytest.raises(
        tp.ConfigError, match=r"several fields called 'weight'; name one of perceptual\.weight, "
    ):
        with_changes(recipe("autoencoder")(), {"weight": 0.0})


def test_an_unknown_recipe_is_refused(tmp_path):
    with pytest.raises(tp.ConfigError, match="no recipe is called 'vitt'; near names: vit"):
        tp.train("vitt", out=tmp_path)


def test_train_is_a_function_in_whatever_order_modules_are_imported():
    for first in ("import triptych.training.configs.base", "tp.train", "tp.evaluate"):
        script = f"import triptych as tp\n{first}\nimport triptych.training.configs.base as base\n"
        script += "from triptych.training import run\nassert callable(tp.train) and callable(run) and base"
        subprocess.run([sys.executable, "-c", script], check=True)
