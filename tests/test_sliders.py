"""The sliders over what a network costs."""

import numpy as np
import pandas as pd
import pytest
from IPython.display import Image

from gnetlab.draw import sliders
from gnetlab.measure.sweeps import adjusted_costs, closed_form
from gnetlab.net.architecture import MODULES

PNG = b"\x89PNG"


@pytest.fixture
def asked(monkeypatch):
    """What the sliders ask for, and a live notebook."""
    monkeypatch.delenv(sliders.BATCH, raising=False)
    calls = []

    def costs_of(**values):
        calls.append(values)
        return adjusted_costs(**values)

    return calls, costs_of


def test_bars_have_the_lengths_of_the_costs():
    bars = sliders.CostBars(closed_form("paper"))
    costs = adjusted_costs(128, 1.5, "4a", 8, 8)
    assert bars.draw(costs).startswith(PNG)
    sums = costs.groupby(["branch", "stage"]).macs.sum() / 1e6
    for branch, drawn in bars.bars.items():
        lengths = pd.Series([bar.get_width() for bar in drawn], index=bars.stages)
        known = sums[branch].reindex(bars.stages, fill_value=0)
        np.testing.assert_allclose(lengths, known)
    row = bars.stages.index("4a")  # the bars of a stage follow one another
    spans = [(bar[row].get_x(), bar[row].get_width()) for bar in bars.bars.values()]
    ends = np.cumsum([width for _, width in spans])
    np.testing.assert_allclose([start for start, _ in spans], [0, *ends[:-1]])
    right = max(bar.get_x() + bar.get_width() for bars_ in bars.bars.values() for bar in bars_)
    assert right == pytest.approx(costs.groupby("stage").macs.sum().max() / 1e6)
    assert f"{costs.macs.sum() / 1e9:.3f} billion" in bars.ax.get_title("left")
    outline = [bar.get_width() for bar in bars.ax.containers[0]]
    assert outline[0] == pytest.approx((118_013_952 + 359_661_568) / 1e6)


def test_moving_a_slider_draws_anew(asked):
    calls, costs_of = asked
    box = sliders.cost_sliders(costs_of, MODULES)
    side, width, stage, reduce3x3, reduce5x5, image = box.children
    first = bytes(image.value)
    assert first.startswith(PNG)
    side.value = 64
    assert bytes(image.value) != first
    assert calls[-1] == {"side": 64, "width": 1.0, "stage": "3b", "reduce3x3": 128, "reduce5x5": 32}
    width.value, reduce3x3.value, reduce5x5.value = 0.5, 64, 16
    assert list(calls[-1].values()) == [64, 0.5, "3b", 64, 16]
    drawn = len(calls)
    stage.value = "4e"  # its own reductions, in one drawing
    assert calls[-1] == {"side": 64, "width": 0.5, "stage": "4e", "reduce3x3": 160, "reduce5x5": 32}
    assert len(calls) == drawn + 1
    reduce3x3.value = 8  # still listened to
    assert calls[-1]["reduce3x3"] == 8


def test_a_batch_run_gets_a_still_image(asked, monkeypatch):
    monkeypatch.setenv(sliders.BATCH, "1")
    shown = sliders.cost_sliders(asked[1], MODULES, stage="4a")
    assert isinstance(shown, Image)
    assert shown.data.startswith(PNG)
    assert asked[0][-1]["stage"] == "4a"


@pytest.mark.parametrize("width", [0.25, 2.0])
def test_every_position_of_the_sliders_has_costs(width):
    for stage in MODULES:
        for side in (32, 512):
            assert adjusted_costs(side, width, stage, 4, 4).macs.sum() > 0
    wide = adjusted_costs(224, 1.0, "3b", *MODULES["3b"][1:4:2])
    assert wide.equals(closed_form("paper"))
