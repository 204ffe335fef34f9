"""Selectivity of filters set by hand, and tests against chance."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from torch import nn

import gnetlab as gl
from gnetlab.measure import specialization as spec
from gnetlab.net.architecture import MODULES
from gnetlab.net.data import DEVIATION, MEAN

COLUMNS = [
    "module", "stage", "branch", "channel", "concat_index", "responds", "orientation",
    "preferred_orientation", "scale", "preferred_frequency", "colour",
]  # fmt: skip
LUMA = np.array(spec.LUMA)
PLACE = np.arange(7) - 3.0


def gabor(angle, frequency):
    """7 x 7; bars lie at `angle`, degrees counter-clockwise from lying."""
    x, y = np.meshgrid(PLACE, -PLACE)  # y points upwards
    across = -np.sin(np.deg2rad(angle)) * x + np.cos(np.deg2rad(angle)) * y
    window = np.exp(-(x**2 + y**2) / 8)
    wave = np.cos(2 * np.pi * frequency * across) * window
    return wave - window * wave.sum() / window.sum()  # nothing for plain grey


def blob():
    x, y = np.meshgrid(PLACE, PLACE)
    return np.exp(-(x**2 + y**2) / 4)


FILTERS = {  # of conv1: what it looks like, and its weights for R, G, B
    "gabor 45": (gabor(45, 1 / 8), LUMA),
    "gabor 135": (gabor(135, 1 / 8), LUMA),
    "gabor 90": (gabor(90, 1 / 4), LUMA),
    "gabor 0": (gabor(0, 1 / 16), LUMA),
    "blob": (blob(), LUMA),
    "red against green": (blob(), np.array([1, -1, 0])),
    "dead": (0 * blob(), LUMA),
    "constant": (0 * blob(), LUMA),
}


@pytest.fixture(scope="module")
def by_hand():
    """A network whose 1x1 branch of 3a passes conv1 on, which holds FILTERS; and its frame."""
    model = gl.googlenet("paper", norm=None, aux=False, width=0.25, seed=0)
    with torch.no_grad():
        for unit in (model.conv1, model.conv2_reduce, model.conv2, model.inception3a.branch1x1):
            nn.init.zeros_(unit.conv.weight)
            nn.init.zeros_(unit.conv.bias)
            middle = unit.conv.kernel_size[0] // 2
            for i, (name, (shape, colours)) in enumerate(FILTERS.items()):
                if unit is not model.conv1:
                    unit.conv.weight[i, i, middle, middle] = 1.0
                    continue
                kernel = torch.tensor(np.einsum("yx,c->cyx", shape, colours * DEVIATION))
                unit.conv.weight[i] = kernel
                offset = (spec.GREY - np.array(MEAN)) / DEVIATION
                grey = float((kernel.sum((1, 2)).numpy() * offset).sum())
                unit.conv.bias[i] = {"dead": -1.0, "constant": 1.0}.get(name, -grey)
    model.train()
    frame = spec.channel_selectivity(model, size=64)
    assert model.training
    assert list(frame.columns) == COLUMNS
    assert frame.stage.drop_duplicates().tolist() == list(MODULES)
    assert frame[frame.stage == "3b"].concat_index.tolist() == list(range(120))
    return (
        frame[frame.module == "inception3a.branch1x1"].iloc[: len(FILTERS)].set_axis(list(FILTERS))
    )


def amplitude(shape, angle, frequency):
    """How strongly a filter answers a grating, from its Fourier transform."""
    x, y = np.meshgrid(PLACE, -PLACE)
    across = -np.sin(np.deg2rad(angle)) * x + np.cos(np.deg2rad(angle)) * y
    return abs((shape * np.exp(2j * np.pi * frequency * across)).sum())


@pytest.mark.parametrize(
    ("name", "angle"), [("gabor 45", 45), ("gabor 135", 135), ("gabor 90", 90)]
)
def test_gabor_filters_prefer_their_own_orientation_and_frequency(by_hand, name, angle):
    row, shape = by_hand.loc[name], FILTERS[name][0]
    assert row.orientation > 0.5
    assert row.preferred_orientation == pytest.approx(angle, abs=0.5)
    strengths = [sum(amplitude(shape, a, f) for a in spec.ORIENTATIONS) for f in spec.FREQUENCIES]
    assert row.preferred_frequency == spec.FREQUENCIES[int(np.argmax(strengths))]
    assert row.colour == pytest.approx(-1, abs=1e-4)


def test_lying_bars_are_at_zero_or_nearly_180(by_hand):
    angle = by_hand.loc["gabor 0", "preferred_orientation"]
    assert min(angle, 180 - angle) < 0.5


def test_a_blob_has_no_orientation_and_a_narrow_filter_more_scale(by_hand):
    assert by_hand.loc["blob", "orientation"] < 0.01
    assert by_hand.loc["blob", "preferred_frequency"] < 0.1
    assert by_hand.loc["gabor 45", "scale"] > 0.3 > by_hand.loc["blob", "scale"] + 0.05


def test_mirrored_filters_are_equally_selective(by_hand):
    values = by_hand.loc[["gabor 45", "gabor 135"], ["orientation", "scale"]].to_numpy()
    assert np.ptp(values, axis=0).max() < 0.015  # with four phases, 0.07


def test_colour_opponent_filters_answer_colour_only(by_hand):
    row = by_hand.loc["red against green"]
    assert row.colour == pytest.approx(1, abs=1e-4)
    assert by_hand.loc["blob", "colour"] == pytest.approx(-1, abs=1e-4)


def test_dead_channels_are_na_and_constant_ones_unselective(by_hand):
    values = ["orientation", "preferred_orientation", "scale", "preferred_frequency", "colour"]
    assert not by_hand.loc["dead", "responds"]
    assert by_hand.loc["dead", values].isna().all()
    assert by_hand.loc["constant", "responds"]
    assert by_hand.loc["constant", ["orientation", "scale", "colour"]].abs().max() < 1e-6


def test_gratings_are_what_they_say():
    gratings = spec._gratings()
    mean, deviation = (torch.tensor(v).view(1, 3, 1, 1) for v in (MEAN, DEVIATION))
    images = spec._draw(gratings, 64) * deviation + mean
    assert len(images) == 3 * len(gratings) == 276
    assert images.min() >= 0
    assert images.max() <= 1
    cells = images.unflatten(0, (-1, 3))
    contrast = (cells - spec.GREY).square().sum(2).mean((1, 2, 3)).sqrt()
    torch.testing.assert_close(contrast, torch.full_like(contrast, spec.CONTRAST / 2**0.5))
    luma = torch.einsum("npchw,c->nphw", cells, torch.tensor(spec.LUMA))
    coloured = torch.tensor([g.hue >= 0 for g in gratings])
    assert (luma[coloured] - spec.GREY).abs().max() < 1e-5
    assert (cells[~coloured][:, :, 0] - cells[~coloured][:, :, 2]).abs().max() < 1e-6
    for grating, image in zip(gratings, cells[:, 1, 0], strict=True):
        angle = spec.ORIENTATIONS[grating.orientation]
        if grating.hue < 0 and angle in (0, 45, 90, 135):  # these stay equal along the bars
            along = {0: (0, 1), 45: (-1, 1), 90: (1, 0), 135: (1, 1)}[angle]
            moved = torch.roll(image, along, (0, 1))[1:-1, 1:-1]
            assert (moved - image[1:-1, 1:-1]).abs().max() < 1e-4
    upright = next(g for g in gratings if spec.ORIENTATIONS[g.orientation] == 90 and g.frequency)
    row = cells[gratings.index(upright), 0, 0, 0] - spec.GREY
    peak = np.abs(np.fft.rfft(row.numpy(), 4096)).argmax() / 4096
    assert peak == pytest.approx(spec.FREQUENCIES[upright.frequency], rel=0.1)


def test_tuning_of_known_curves():
    gratings, angles = spec._gratings(), np.deg2rad(spec.ORIENTATIONS)
    grey = np.zeros((8, 7, 4))
    grey[:, 3, 0] = 1 + np.cos(2 * (angles - np.deg2rad(30)))  # one frequency: half selective
    grey[:, :, 1] = 5.0
    grey[2, 1, 2] = 1.0  # a single grating
    grey[[0, 4], 6, 3] = 1.0  # a cross
    coloured = np.zeros((len(gratings) - 56, 4))
    coloured[:, 1] = 2.5
    frame = spec._tuning(np.concatenate([grey.reshape(56, 4), coloured]), gratings)
    assert frame.orientation.tolist() == pytest.approx([0.5, 0, 1, 0], abs=1e-12)
    assert frame.preferred_orientation[[0, 2]].tolist() == pytest.approx([30, 45])
    assert frame.scale.tolist() == pytest.approx([1, 0, 1, 1])
    assert frame.preferred_frequency[[0, 2]].tolist() == [spec.FREQUENCIES[3], spec.FREQUENCIES[1]]
    assert frame.colour[1] == pytest.approx((2.5 - 5) / (2.5 + 5))


def test_the_border_does_not_count():
    maps = torch.zeros(3, 2, 8, 8)
    maps[:, :, :2], maps[:, :, 6:], maps[:, :, :, :2], maps[:, :, :, 6:] = 9, 9, 9, 9
    assert spec._respond(None, maps)[0].abs().max() == 0
    small = torch.arange(9.0).view(1, 1, 3, 3).square().expand(3, 2, 3, 3)  # counts as a whole
    assert spec._respond(None, small)[0][0].tolist() == pytest.approx([204 / 9] * 2)


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="Sequential asked"):
        spec.channel_selectivity(nn.Sequential())
    with pytest.raises(ValueError, match="for grey images"):
        spec.channel_selectivity(gl.googlenet("cifar", width=0.1, in_channels=1))


def channels(random, shift=0.0, missing=0):
    """A module of 60 channels in three branches; the last stands out by `shift`."""
    branch = np.repeat(["1x1", "3x3", "5x5"], [30, 20, 10])
    values = {name: random.normal(size=60) + shift * (branch == "5x5") for name in spec.PROPERTIES}
    values["colour"][:missing] = np.nan
    return pd.DataFrame({"stage": "3a", "branch": branch, **values})


def test_p_is_uniform_under_chance_and_that_of_the_f_test():
    random = np.random.default_rng(0)
    ours, theirs = [], []
    for _ in range(60):
        frame = channels(random)
        tests = spec.specialization(frame, permutations=199, seed=int(random.integers(1000)))
        for name, row in tests.set_index("property").iterrows():
            groups = [rows[name].to_numpy() for _, rows in frame.groupby("branch")]
            f, p = scipy.stats.f_oneway(*groups)
            assert row.eta_squared / (1 - row.eta_squared) * 57 / 2 == pytest.approx(f)
            ours.append(row.p)
            theirs.append(p)
    assert scipy.stats.kstest(ours, "uniform").pvalue > 0.05
    assert np.abs(np.subtract(ours, theirs)).max() < 0.15
    assert np.corrcoef(ours, theirs)[0, 1] > 0.99


def test_a_planted_difference_is_found_and_missing_channels_do_not_count():
    frame = channels(np.random.default_rng(1), shift=2.0, missing=12)
    tests = spec.specialization(frame, permutations=199)
    assert list(tests.columns) == [
        "stage", "property", "eta_squared", "p", "p_adjusted", "highest", "lowest", "channels",
    ]  # fmt: skip
    assert tests.property.tolist() == list(spec.PROPERTIES)
    assert (tests.p == 1 / 200).all()
    assert tests.p_adjusted.tolist() == pytest.approx([3 / 200] * 3)
    assert (tests.highest == "5x5").all()
    assert tests.channels.tolist() == [60, 60, 48]
    alone = spec.specialization(frame[frame.branch == "1x1"], permutations=9)
    assert alone[["p", "p_adjusted", "eta_squared", "highest"]].isna().all(axis=None)


def test_holm_by_hand():
    found = spec._holm(np.array([0.5, 0.01, np.nan, 0.02]))
    assert found[[0, 1, 3]].tolist() == pytest.approx([0.5, 0.03, 0.04])
    assert np.isnan(found[2])


def test_published_counts_have_the_published_p():
    counts = spec.published_counts().set_index("label")
    assert f"{counts.p['black-white against colour']:.1e}" == "2.5e-09"
    assert f"{counts.p['curve-related']:.1e}" == "1.7e-23"
    stated = counts[counts.published_bound.notna()]
    assert len(stated) == 2
    assert (stated.p < stated.published_bound).all()
    assert counts.width.unique().tolist() == [256, 480, 508]  # Inception5h's 4a
    chance = np.prod([(32 - i) / (256 - i) for i in range(9)])
    assert counts.p["black-white against colour"] == pytest.approx(chance)
    fields = ("width", "branch_width", "units", "inside", "p")
    for row in counts[list(fields)].itertuples():
        table = [[row.inside, row.branch_width - row.inside],
                 [row.units - row.inside,
                  row.width - row.branch_width - row.units + row.inside]]  # fmt: skip
        assert scipy.stats.fisher_exact(table, "greater").pvalue == pytest.approx(row.p)


def test_p_needs_permutations():
    with pytest.raises(ValueError, match="permutations=0 asked; p needs some"):
        spec.specialization(channels(np.random.default_rng(0)), permutations=0)
