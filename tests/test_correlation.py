"""Correlation within and between branches: planted structure, numpy, and chance."""

import numpy as np
import pytest
import torch
from torch import nn

import gnetlab as gl
from gnetlab.measure import correlation
from gnetlab.measure.correlation import branch_correlation
from gnetlab.net.data import preprocess


@pytest.fixture(scope="module")
def model():
    return gl.googlenet("paper", weights="auto", aux=False, width=0.1).train()


@pytest.fixture(scope="module")
def batches():
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(6, 3, 64, 64, generator=generator).split(4))


def test_correlations_are_numpys(model, batches):
    with torch.no_grad(), gl.record(model.eval(), "inception4a") as maps:
        model(torch.cat(batches))
    values = maps["inception4a"].transpose(0, 1).flatten(1).numpy()
    expected = np.corrcoef(values)
    moments = None
    for part in maps["inception4a"].split(4):
        moments = correlation.add_moments(moments, part)
    found, varies = correlation._correlation(moments)
    kept = values.std(1) > 0
    assert (varies == kept).all()
    np.testing.assert_allclose(found, expected[np.ix_(kept, kept)], atol=1e-4)


def test_frame_is_as_documented(model, batches):
    modes = [module.training for module in model.train().modules()]
    frame = branch_correlation(model, batches, permutations=20)
    assert list(frame.columns) == [
        "module", "stage", "channels", "within", "between", "difference", "z", "p", "rand_index",
        "largest_cluster", "values",
    ]  # fmt: skip
    assert frame.stage.tolist() == ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
    assert frame["values"].tolist()[:3] == [6 * 64, 6 * 64, 6 * 16]
    assert ((frame.difference - frame.within + frame.between).abs() < 1e-12).all()
    assert frame.p.between(1 / 21, 1).all()
    assert [module.training for module in model.modules()] == modes
    again = branch_correlation(model, torch.cat(batches), permutations=20)
    np.testing.assert_allclose(again.within, frame.within, rtol=1e-4)
    assert again.p.tolist() == frame.p.tolist()


def planted(strength):
    """Correlation of 3 groups of 10 channels, `strength` within them."""
    branch = np.repeat([0, 1, 2], 10)
    random = np.random.default_rng(0)
    common = random.standard_normal((3, 5000))[branch]
    values = strength**0.5 * common + (1 - strength) ** 0.5 * random.standard_normal((30, 5000))
    return np.corrcoef(values), branch


def test_planted_groups_are_found_and_noise_is_not():
    found, branch = planted(0.5)
    result = correlation._against_chance(np.abs(found), branch, 200, np.random.default_rng(1))
    assert result["within"] == pytest.approx(0.5, abs=0.03)
    assert result["between"] < 0.03
    assert result["z"] > 15
    assert result["p"] == 1 / 201
    assert correlation._rand_index(correlation._clusters(found, 3), branch) == 1
    noise, branch = planted(0.0)
    result = correlation._against_chance(np.abs(noise), branch, 200, np.random.default_rng(1))
    assert abs(result["z"]) < 3
    assert abs(correlation._rand_index(correlation._clusters(noise, 3), branch)) < 0.2


def test_no_cluster_swallows_nearly_all_channels():
    """As one does by average linkage, whose index is about 0 whatever the branches do."""
    views = list(gl.photographs())[:8]
    pixels = torch.cat([preprocess(gl.photographs()[name].pixels, 96) for name in views])
    frame = branch_correlation(gl.googlenet(weights="bundled"), pixels, permutations=5)
    assert (frame.largest_cluster < 0.6).all()
    assert frame.rand_index.abs().max() < 0.3


def test_what_does_not_vary_is_left_out_and_a_dead_module_has_none(batches):
    model = gl.googlenet("paper", aux=False, width=0.1, norm="batch", seed=0)
    with torch.no_grad():
        for branch in ("branch1x1", "branch3x3", "branch5x5", "branch_pool"):
            last = list(model.inception4a.get_submodule(branch).modules())
            norm = [m for m in last if isinstance(m, nn.BatchNorm2d)][-1]
            norm.weight.zero_()
            norm.bias.fill_(1 / 3)  # constant, and not exactly zero
    frame = branch_correlation(model, batches, permutations=5).set_index("stage")
    assert frame.channels["4a"] == 0
    assert frame.loc["4a", ["within", "z", "p", "rand_index", "largest_cluster"]].isna().all()
    assert frame.channels["3a"] > 20


def test_rand_index_by_hand():
    # Hubert and Arabie's adjustment: 2 pairs in common of 4 and 3; expected 4 * 3 / 15.
    clusters, branch = np.array([1, 1, 1, 2, 2, 3]), np.array([0, 0, 1, 1, 2, 2])
    together = 1
    expected = 4 * 3 / 15
    assert correlation._rand_index(clusters, branch) == pytest.approx(
        (together - expected) / (3.5 - expected)
    )
    assert correlation._rand_index(branch, branch) == 1


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="not gnetlab's"):
        branch_correlation(nn.Sequential(nn.ReLU()), torch.zeros(1, 3, 8, 8))


def test_no_batches(model):
    with pytest.raises(ValueError, match="no images were given; give a batch"):
        branch_correlation(model, iter([]))
