"""Costs from an architecture's numbers, against those of the networks themselves."""

import pandas as pd
import pytest
import torch
import torchvision.models
from networks import MACS, PARAMETERS

from gnetlab.measure.costs import layer_costs
from gnetlab.measure.sweeps import (
    closed_form,
    early_inception,
    implementations,
    resolution_costs,
    width_costs,
)
from gnetlab.net.architecture import MODULES, architecture
from gnetlab.net.model import build

ARCHITECTURES = [
    ("paper", {}, 224),
    ("paper", {"stem": "separable", "norm": "batch"}, 224),
    ("paper", {"stem": "compact", "norm": "batch"}, 65),
    ("paper", {"stem": "inception"}, 65),
    ("paper", {"width": 0.37}, 131),
    ("paper", {"in_channels": 1, "num_classes": 7}, 33),
    ("torchvision", {}, 97),
    ("torchvision", {"branch5x5": "3x3+3x3", "conv_bias": True}, 64),
    ("cifar", {}, 32),
    ("cifar", {"branch5x5": "3x3", "num_classes": 7}, 41),
    ("naive", {}, 64),
    ("naive", {"stem": "inception"}, 64),
    ("paper", {"extra_modules": 3}, 64),
]


@pytest.mark.parametrize(("preset", "changes", "side"), ARCHITECTURES)
def test_closed_form_equals_the_networks_own_costs(preset, changes, side):
    arch = architecture(preset, heads=(), **changes)
    with torch.device("meta"):
        model = build(arch)
    costs = layer_costs(model, (arch.in_channels, side, side))
    costs = costs[(costs.macs > 0) | (costs.parameters > 0)]
    key = ["stage", "branch"]
    expected = costs.groupby(key, sort=False)[["macs", "parameters"]].sum().astype("int64")
    found = closed_form(arch, side)
    pd.testing.assert_frame_equal(
        found.set_index(key).sort_index(), expected.sort_index(), check_names=False
    )


def test_closed_form_of_other_module_widths():
    wide = MODULES["4a"]._replace(reduce5x5=32)
    before, after = (closed_form(modules=m).set_index(["stage", "branch"]).macs
                     for m in ({}, {"4a": wide}))  # fmt: skip
    changed = after - before
    assert changed["4a", "5x5"] == 14**2 * 16 * (480 + 25 * 48)
    assert (changed.drop(("4a", "5x5")) == 0).all()


def test_closed_form_refuses_images_that_are_too_small():
    with pytest.raises(ValueError, match=r"side = 8 asked.*'paper' stem"):
        closed_form("paper", 8)


def test_widening_modules_is_quadratic():
    frame = width_costs([0.5, 1, 2])
    assert list(frame.columns) == [
        "width", "macs", "module_macs", "parameters", "exponent", "module_exponent",
    ]  # fmt: skip
    assert frame.module_exponent[2] == pytest.approx(2)
    assert frame.macs[1] == MACS["paper"]
    assert frame.parameters[1] == PARAMETERS["paper"]
    # Every channel count doubles, the image's do not.
    assert frame.module_macs[2] == 4 * frame.module_macs[1]
    assert frame.exponent.isna().tolist() == [True, False, False]
    assert 1.8 < frame.exponent[1] < frame.exponent[2] < 2


def test_at_32_pixels_googlenet_can_cost_more_than_vgg():
    frame = resolution_costs([24, 32, 224]).set_index(["network", "side"]).macs
    assert frame["GoogLeNet, cifar stem", 32] == pytest.approx(MACS["cifar"], rel=0.06)
    assert frame["VGG-16", 224] == MACS["vgg16"]
    assert frame["GoogLeNet, paper stem", 224] == MACS["paper"]
    with torch.device("meta"):
        convolutions = torchvision.models.vgg16().features
    by_hand = 9 * sum(
        (s**2) * (a * b)
        for s, a, b in [
            (32, 3, 64), (32, 64, 64), (16, 64, 128), (16, 128, 128), (8, 128, 256),
            (8, 256, 256), (8, 256, 256), (4, 256, 512), (4, 512, 512), (4, 512, 512),
            (2, 512, 512), (2, 512, 512), (2, 512, 512),
        ]
    )  # fmt: skip
    assert layer_costs(convolutions, (3, 32, 32)).macs.sum() == by_hand
    assert frame["VGG-16, one linear layer", 32] == by_hand + 5120
    assert frame["GoogLeNet, cifar stem", 32] > 4 * frame["VGG-16, one linear layer", 32]
    assert frame["VGG-16", 32] > 10 * frame["GoogLeNet, paper stem", 32]
    assert ("VGG-16", 24) not in frame.index  # smaller than its pools can take


def test_implementations_are_the_presets_and_their_changes():
    frame = implementations().set_index("implementation")
    assert frame.macs["torchvision"] == MACS["torchvision"]
    assert frame.parameters["torchvision"] == PARAMETERS["torchvision"]
    assert frame.parameters["kuangliu, weiaicunzai"] == PARAMETERS["cifar"]
    assert frame.macs["kuangliu, weiaicunzai"] == MACS["cifar"]
    first, separable, inception5h = frame.iloc[0], frame.iloc[1], frame.iloc[2]
    assert (first.parameters, first.macs) == (PARAMETERS["paper"], MACS["paper"])
    assert (separable.parameters, separable.macs) == (PARAMETERS["separable"], MACS["separable"])
    # By hand: 4 channels fewer out of 4a and into 4b, 5a's reduction 16 wider, 8 logits more.
    less = 4 * (9 * 96 + 1) + 4 * (160 + 112 + 24 + 64)
    more = 16 * (832 + 1) + 25 * 16 * 128 + 8 * 1025
    assert inception5h.parameters == PARAMETERS["paper"] - less + more
    assert frame.differs.str.len().min() > 10


def test_inception_from_the_first_layer_on():
    frame = early_inception().set_index("stem")
    plain, early = frame.loc["plain"], frame.loc["inception"]
    assert plain.macs == MACS["paper"]
    assert plain.parameters == 13_378_280
    # By hand: the modules' convolutions at 224 and 56 pixels, less conv1 and conv2.
    first = 3 * (16 + 24 + 4 + 8) + 24 * 9 * 32 + 4 * 25 * 8
    second = 64 * (48 + 72 + 12 + 24) + 72 * 9 * 96 + 12 * 25 * 24
    assert early.macs - plain.macs == 224**2 * first + 56**2 * second - 118_013_952 - 359_661_568
    assert early.stored_bytes - early.stem_bytes == plain.stored_bytes - plain.stem_bytes
    assert early.stem_bytes > 2 * plain.stem_bytes
    assert frame.step_seconds.isna().all()


def test_inception_from_the_first_layer_on_is_timed_on_a_device():
    frame = early_inception(32, device="cpu", batch_size=1, min_run_time=0.01)
    assert (frame.step_seconds > 0).all()
