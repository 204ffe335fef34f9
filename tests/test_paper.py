"""The paper's own numbers against what its architecture computes to."""

import pandas as pd
import pytest
import torch
from networks import MACS, PARAMETERS, build, costs_of

import gnetlab as gl
from gnetlab.measure.costs import layer_costs
from gnetlab.measure.paper import (
    classifier_metadata,
    depth,
    reduction_costs,
    reduction_savings,
    table_1,
)


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("paper", 22), ("torchvision", 22), ("cifar", 29), ("naive", 13), ("alexnet", 8),
        ("vgg11", 11), ("vgg13", 13), ("vgg16", 16), ("vgg19", 19), ("vgg19_bn", 19),
    ],
)  # fmt: skip
def test_depth(name, layers):
    assert depth(costs_of(name)) == layers


def test_heads_do_not_add_to_the_depth():
    assert depth(layer_costs(build("paper"), training=True)) == 22


EXACT_TABLE = {  # weights, MACs
    "conv1": (9_408, 118_013_952),
    "conv2": (114_688, 359_661_568),
    "3a": (163_328, 128_049_152),
    "3b": (388_096, 304_267_264),
    "4a": (375_552, 73_608_192),
    "4b": (448_512, 87_908_352),
    "4c": (509_440, 99_850_240),
    "4d": (604_672, 118_515_712),
    "4e": (867_328, 169_996_288),
    "5a": (1_042_432, 51_079_168),
    "5b": (1_442_816, 70_697_984),
    "linear": (1_024_000, 1_024_000),
}


@pytest.fixture(scope="module")
def table():
    return table_1().set_index("stage")


def test_table_1_is_exact(table):
    exact = dict(zip(table.index, zip(table.parameters, table.macs, strict=True), strict=True))
    assert exact == EXACT_TABLE
    assert list(table.columns) == [
        "parameters", "printed_params", "computed_params", "macs", "printed_ops", "computed_ops",
        "params_agree", "ops_agree", "verdict", "contradictory",
    ]  # fmt: skip
    assert table.computed_params.equals(table.parameters / 1024)
    assert table.computed_ops.equals(table.macs / 1e6)


def test_operations_that_agree_with_table_1(table):
    disagree = table.index[~table.ops_agree].tolist()
    assert disagree == ["conv1", "4a", "5a"]
    assert abs(table.macs["4a"] / 1e6 - table.printed_ops["4a"]) == pytest.approx(0.608192)


def test_parameters_that_agree_with_table_1(table):
    # Printed as rounded up or down: 3a has 159.5 K and is printed as 159 K.
    assert table.index[table.params_agree].tolist() == ["conv2", "3a", "linear"]


def test_rows_that_contradict_themselves(table):
    # By hand, 3b: 304 +- 0.5 million operations at 28 x 28 are 387,117 to 388,393 weights, but
    # 380 +- 0.5 K are 388,608 to 389,632.
    assert table.index[table.contradictory].tolist() == ["3b", "4c", "4d", "4e", "5b"]
    assert (table.verdict[table.contradictory] == "ops").all()
    assert table.index[table.verdict == "neither"].tolist() == ["conv1", "4a", "5a"]
    assert table.index[table.verdict == "both"].tolist() == ["conv2", "3a", "linear"]


def test_the_separable_stem_fits_table_1_in_both_columns():
    row = table_1(build("separable")).set_index("stage").loc["conv1"]  # 2.65 K as 2.7 K
    assert (row.parameters, row.macs) == (2_712, 34_019_328)
    assert row.params_agree
    assert row.ops_agree


def test_table_1_leaves_normalization_out(table):
    with torch.device("meta"):
        model = gl.googlenet("paper", norm="batch")
    normalized = table_1(model).set_index("stage")
    assert normalized.parameters.equals(table.parameters)
    assert normalized.macs.equals(table.macs)


def test_table_1_of_torchvisions_network_is_that_of_the_same_one_here():
    assert table_1(build("googlenet")).equals(table_1(build("torchvision")))


@pytest.mark.parametrize(
    ("name", "rows"), [("cifar", "no conv2;"), ("vgg11", "VGG asked, which has no conv1, conv2,")]
)
def test_table_1_needs_its_rows(name, rows):
    with pytest.raises(ValueError, match=rows):
        table_1(build(name))


def test_reductions_change_what_the_formulas_say():
    frame = reduction_costs()
    assert list(frame.columns) == ["variant", "stage", "macs", "out_channels", "pool_share"]
    assert frame.index.equals(pd.RangeIndex(18))
    by_variant = {variant: rows.set_index("stage") for variant, rows in frame.groupby("variant")}
    channels = 192
    for row in gl.TABLE_1[2:-1]:
        n1, _, n3, _, n5, pool = row.widths
        reduced = by_variant["with reductions"].loc[row.stage]
        assert reduced.macs == EXACT_TABLE[row.stage][1]
        assert reduced.out_channels == n1 + n3 + n5 + pool
        assert reduced.pool_share == pool / reduced.out_channels
        naive = by_variant["without"].loc[row.stage]
        assert naive.macs == row.size**2 * channels * (n1 + 9 * n3 + 25 * n5)
        assert naive.pool_share == channels / naive.out_channels
        channels += n1 + n3 + n5  # the pooling branch passes all of its input on
        assert naive.out_channels == channels
    savings = reduction_savings(frame)
    sums = frame.groupby("variant").macs.sum()
    assert savings["mac_ratio"] == sums["without"] / sums["with reductions"] > 10
    assert savings["final_width_ratio"] == channels / 1024
    assert savings["width_grows"] is True


def test_published_classifiers():
    frame = classifier_metadata()
    assert list(frame.columns) == ["model", "weights", "top1", "top5", "parameters", "macs"]
    assert frame.notna().all(axis=None)
    assert len(frame) > 80
    first = frame[frame.weights == "IMAGENET1K_V1"].set_index("model")
    assert first.top1[["googlenet", "vgg16"]].tolist() == [69.778, 71.592]
    assert (first.top5 > first.top1).all()
    assert first.parameters["vgg16"] == PARAMETERS["vgg16"]
    for name in ("googlenet", "vgg16", "resnet50", "inception_v3"):  # printed to a million
        assert first.macs[name] == pytest.approx(MACS[name], abs=1e6)
