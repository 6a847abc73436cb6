"""Plots of costs against pixels, with the exponents of their growth."""

import pytest

from triptych.plots import style
from triptych.plots.scaling import Curve, scaling

SIDES = [224, 448, 896]


def words(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


def test_each_curve_is_named_with_its_exponent(tmp_path):
    panels = {
        "seconds": {
            "a": Curve(values=[1, 4, 16], exponent=1.0),
            "b": Curve(values=[1, 16, 256], exponent=2.0),
        },
        "memory": {"a": Curve(values=[0.01, 0.02, 0.04]), "b": Curve(values=[0.01, 0.02, 0.04])},
    }
    figure = scaling(SIDES, panels, "Growth")
    assert words(figure) == ["a\npixels$^{1.00}$", "b\npixels$^{2.00}$", "a", "b"]
    assert [ax.get_xscale() + ax.get_yscale() for ax in figure.axes] == ["loglog"] * 2
    style.save(figure, tmp_path / "growth.png")
    assert 10_000 < (tmp_path / "growth.png").stat().st_size < 200_000


@pytest.mark.parametrize("values", [[0, 0, 0], [0, 1, 2], [1, 1, 1]])
def test_values_without_a_logarithm_are_left_out(values, tmp_path):
    style.save(scaling(SIDES, {"memory": {"a": Curve(values=values)}}, "Growth"), tmp_path / "growth.png")
