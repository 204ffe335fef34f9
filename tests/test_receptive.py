"""Receptive fields, against where a gradient can be at all."""

import numpy as np
import pytest
import torch
from torch import nn

import gnetlab as gl
from gnetlab.measure.receptive import effective_receptive_fields, receptive_fields

# Of the reference: pixels for 1x1, 3x3, 5x5, pool.
KNOWN = {
    ("paper", "3a"): [27, 43, 59, 43],
    ("paper", "4c"): [235, 267, 299, 267],
    ("paper", "5b"): [587, 651, 715, 651],
    ("torchvision", "3a"): [27, 43, 43, 43],
    ("torchvision", "4c"): [139, 171, 171, 171],
    ("torchvision", "5b"): [315, 379, 379, 379],
}


@pytest.mark.parametrize(("preset", "stage"), KNOWN)
def test_sizes_are_the_known_ones(preset, stage):
    frame = receptive_fields(gl.googlenet(preset, width=0.1))
    assert frame[frame.stage == stage]["size"].tolist() == KNOWN[preset, stage]
    assert list(frame.columns) == ["module", "stage", "branch", "size", "stride", "start"]
    assert frame.module.tolist() == gl.branch_names(gl.googlenet(preset, width=0.1))
    strides = frame.drop_duplicates("stage").set_index("stage").stride
    assert (strides["3a"], strides["4a"], strides["5a"]) == (8, 16, 32)


def positive(**options):
    """A network through which every path has a positive gradient; max pools become means."""
    model = gl.googlenet("paper", aux=False, width=0.07, norm=None, **options).eval()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.05)
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.MaxPool2d):
                mean = nn.AvgPool2d(
                    child.kernel_size, child.stride, child.padding, ceil_mode=True,
                    count_include_pad=False,
                )  # fmt: skip
                setattr(module, name, mean)
    return model.double()


def test_sizes_and_places_are_those_that_a_gradient_reaches():
    model = positive()
    names = ["inception3a.branch1x1", "inception3b.branch5x5", "inception4a.branch_pool"]
    frame = receptive_fields(gl.googlenet("paper", width=0.07)).set_index("module")
    image = torch.ones(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    outputs = {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _m, _i, output, name=name: outputs.update({name: output})
        )
    model(image)
    for name in names:
        row, side = frame.loc[name], outputs[name].shape[-1]
        unit = outputs[name][0, 0, side // 2, side // 2]
        (gradient,) = torch.autograd.grad(unit, image, retain_graph=True)
        seen = np.flatnonzero(gradient[0, 0].abs().sum(0).numpy())
        assert seen[0] == row.start + side // 2 * row.stride
        assert len(seen) == row["size"]


def test_effective_fields_lie_within_the_theoretical_ones():
    model = gl.googlenet("paper", weights="auto", aux=False, width=0.25).train()
    with torch.no_grad():
        frame, energies = effective_receptive_fields(model, torch.randn(2, 3, 160, 160))
    assert list(frame.columns) == ["module", "stage", "branch", "theoretical", "size", "ratio"]
    small = frame[frame.theoretical < 150]
    assert len(small) >= 6
    assert ((small.ratio > 0.2) & (small.ratio <= 1)).all()
    assert frame.ratio.iloc[-1] < frame.ratio.iloc[0]
    for name, energy in energies.items():
        assert energy.shape == (160, 160)
        assert energy.sum() == pytest.approx(1), name
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_whole_gradient_is_held_by_the_theoretical_field():
    model = positive()
    frame, _ = effective_receptive_fields(
        model, torch.ones(1, 3, 128, 128, dtype=torch.float64), share=1 - 1e-12
    )
    first = frame[frame.stage == "3a"]
    assert first["size"].tolist() == first.theoretical.tolist() == [27, 43, 59, 43]


def test_a_dead_branch_has_no_effective_field():
    model = positive()
    nn.init.constant_(model.inception3a.branch1x1.conv.bias, -1e9)
    images = torch.ones(1, 3, 64, 64, dtype=torch.float64)
    frame, energies = effective_receptive_fields(model, images)
    dead = frame.module == "inception3a.branch1x1"
    assert frame["size"].isna().tolist() == frame.ratio.isna().tolist() == dead.tolist()
    assert not energies["inception3a.branch1x1"].any()


def test_other_networks_are_refused():
    with pytest.raises(ValueError, match="Sequential is not gnetlab's"):
        receptive_fields(nn.Sequential(nn.Conv2d(3, 3, 1)))
