"""Predicted and measured times per layer."""

import math
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch import nn

import gnetlab as gl
from gnetlab.measure import layers
from gnetlab.measure import roofline as measured_rates
from gnetlab.measure.costs import layer_costs
from gnetlab.measure.layers import layer_times, shares, variant_times
from gnetlab.measure.roofline import (
    PREDICTORS,
    Calibration,
    agreement,
    calibrate,
    predict,
    roofline,
)

MADE_UP = Calibration(
    device="made up", dtype="float32", layout="contiguous", flops=1e9, convolving=2e9,
    bandwidth=1e8,
    copies=((1e3, 1e-5), (1e6, 1e-2)), pooling=1e6, averaging=2e6, normalizing=4e6, reading=1e7,
    overheads={"conv2d": 0.5, "relu": 0.25, "max_pool2d": 0.125, "avg_pool2d": 0.0625,
               "linear": 0.03125, "local_response_norm": 1.0},
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.LocalResponseNorm(5), nn.AvgPool2d(2),
        nn.Dropout(), nn.Flatten(), nn.Linear(72, 5), nn.Softmax(1),
    )  # fmt: skip


def test_predictions_by_hand(model):
    costs = layer_costs(model, (3, 14, 14))  # 12 x 12 after the convolution, 6 x 6, 3 x 3
    frame = roofline(costs, batch_size=2, calibration=MADE_UP).set_index("operation")
    assert frame.macs_seconds["conv2d"] == pytest.approx(2 * 2 * 144 * 8 * 27 / 2e9)
    assert frame.macs_seconds["linear"] == pytest.approx(2 * 2 * 72 * 5 / 1e9)
    moved = 4 * (2 * (3 * 196 + 8 * 144) + 8 * 28)
    assert frame.roofline_seconds["conv2d"] == pytest.approx(moved / 1e8)
    assert frame.calibrated_seconds["conv2d"] == pytest.approx(moved * 1e-8 + 0.5)
    pooled = 2 * 3 * 8 * 36 / 1e6
    assert frame.calibrated_seconds["max_pool2d"] == pytest.approx(pooled + 0.125)
    averaged = 2 * 4 * 8 * 9 / 2e6
    assert frame.calibrated_seconds["avg_pool2d"] == pytest.approx(averaged + 0.0625)
    normalized = 2 * 10 * 8 * 36 / 4e6
    assert frame.calibrated_seconds["local_response_norm"] == pytest.approx(normalized + 1)
    read = 4 * (72 * 5 + 5) / 1e7
    assert frame.calibrated_seconds["linear"] == pytest.approx(read + 0.03125)
    assert frame.calibrated_seconds["softmax"] >= 0.25  # as a ReLU, for want of its own
    assert (frame.loc[["dropout", "flatten"], "calibrated_seconds"] == 0).all()
    assert (frame.macs_seconds <= frame.roofline_seconds).all()


def test_compute_bounds_where_there_is_much_of_it():
    costs = layer_costs(nn.Sequential(nn.Conv2d(256, 256, 3)), (256, 14, 14))
    slow = MADE_UP._replace(convolving=1e6)
    frame = roofline(costs, calibration=slow)
    assert frame.roofline_seconds[0] == frame.macs_seconds[0]
    assert frame.calibrated_seconds[0] == pytest.approx(frame.macs_seconds[0] + 0.5)


def test_layer_times_are_the_rows_of_layer_costs():
    model = gl.googlenet("torchvision", width=0.1).eval()
    model.inception4b.train()
    modes = [module.training for module in model.modules()]
    begun = time.perf_counter()
    times = layer_times(model, torch.randn(2, 3, 64, 64), rounds=2)
    took = time.perf_counter() - begun
    costs = layer_costs(model, (3, 64, 64))
    pd.testing.assert_frame_equal(times.drop(columns="seconds"), costs)
    works = times.input_bytes > 0
    assert (times.seconds[works] > 0).all()
    assert times.seconds.sum() < took
    assert [module.training for module in model.modules()] == modes
    assert not any("_compiled_call_impl" in vars(module) for module in model.modules())


def test_variants_have_the_same_work_and_leave_the_model_as_it_was():
    model = gl.googlenet("torchvision", width=0.1).eval()
    times = variant_times(model, torch.randn(1, 3, 64, 64), rounds=1)
    by_variant = times.groupby("variant", sort=False)
    assert list(by_variant.groups) == ["as it is", "channels last", "fused"]
    assert by_variant.macs.sum().nunique() == 1
    assert (by_variant.get_group("fused").operation != "batch_norm").all()
    assert all(p.is_contiguous() for p in model.parameters())


def test_shares_are_of_macs_bytes_and_time(model):
    times = layer_costs(model, (3, 14, 14)).assign(seconds=2.0)
    frame = shares(times)
    assert len(frame) == 3 * len(times)
    sums = frame.groupby("quantity").amount.sum()
    assert sums["multiply-adds"] == times.macs.sum()
    assert sums["time"] == 2 * len(times)
    assert sums["bytes"] == sum(times[f"{k}_bytes"].sum() for k in ("input", "output", "weight"))


def test_predictions_of_several_networks_stand_beside_what_was_measured(model):
    images = torch.randn(2, 3, 14, 14)
    frame = predict({"a": model, "b": model}, images, MADE_UP)
    assert frame.network.tolist() == ["a"] * 9 + ["b"] * 9
    once = roofline(layer_costs(model, (3, 14, 14)), batch_size=2, calibration=MADE_UP)
    assert frame.calibrated_seconds[:9].tolist() == once.calibrated_seconds.tolist()
    assert (frame.seconds[frame.macs > 0] > 0).all()


def test_layer_times_go_to_the_layers_that_take_them(monkeypatch):
    class Slow(nn.Module):
        def forward(self, x):
            late.append(1000)
            return x + x

    late: list[int] = []  # 1000 s pass for each, but no one waits for them
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(late))
    monkeypatch.setattr(layers, "time", clock)
    model = nn.Sequential(nn.ReLU(), Slow(), nn.Conv2d(3, 1, 1))
    times = layer_times(model, torch.randn(1, 3, 32, 32), rounds=3)
    assert times.seconds[1] > 1000 > times.seconds[0] + times.seconds[2]


class Wavers(nn.Module):
    """Takes another way when it sees values than when it only sees shapes."""

    def forward(self, x):
        if type(x) is torch.Tensor and x.device.type != "meta":
            return torch.relu(torch.tanh(x))
        return torch.relu(x)


def test_a_model_that_takes_another_way_is_refused():
    model = nn.Sequential(nn.Sequential(Wavers(), nn.ReLU()), nn.ReLU())
    model[0][0].child = nn.Identity()  # a container: its functions have rows
    with pytest.raises(RuntimeError, match="tanh"):
        layer_times(model, torch.randn(1, 3, 4, 4), rounds=1)


def test_agreement_by_hand():
    times = pd.DataFrame(
        {
            "network": ["a", "a", "a", "b", "b"],
            "seconds": [1.0, 2.0, 4.0, 3.0, 9.0],
            "input_bytes": 1,
            "output_bytes": 1,
            "macs_seconds": [4.0, 2.0, 1.0, 0.0, 0.0],
            "roofline_seconds": [1.0, 4.0, 16.0, 9.0, 81.0],  # squares: the order is right
            "calibrated_seconds": [2.0, 4.0, 8.0, 6.0, 6.0],
        }
    )
    frame = agreement(times).set_index("predictor")
    assert list(frame.index) == list(PREDICTORS)
    assert frame.spearman["roofline"] == pytest.approx(1)
    assert frame.spearman["macs"] < 0
    assert frame.total_error.tolist() == pytest.approx([0.5, 4.25, 0.5])


def test_calibration_is_measured_once():
    found = calibrate("cpu")
    assert calibrate("cpu") is found
    assert found.convolving >= found.flops > 1e8
    assert found.bandwidth > 1e7
    assert min(found.pooling, found.averaging, found.normalizing, found.reading) > 1e5
    assert set(found.overheads) >= {"conv2d", "batch_norm", "relu", "max_pool2d", "linear", "cat"}
    assert 0 < min(found.overheads.values()) < max(found.overheads.values()) < 0.1
    sizes = [size for size, _ in found.copies]
    assert sizes == sorted(sizes)


@pytest.mark.gpu
def test_layer_times_on_a_gpu():
    model = gl.googlenet("torchvision", width=0.25).cuda()
    times = layer_times(model, torch.randn(2, 3, 64, 64, device="cuda"), rounds=3)
    assert (times.seconds[times.macs > 0] > 0).all()
    frame = roofline(times, "cuda", batch_size=2)
    assert (frame.calibrated_seconds[times.macs > 0] > 0).all()


def test_wrong_devices_and_batches_are_refused(model):
    costs = layer_costs(model, (3, 16, 16))
    with pytest.raises(ValueError, match="device='gpu' asked; choose 'auto'"):
        roofline(costs, "gpu")
    with pytest.raises(ValueError, match="batch_size=0 asked; give at least 1"):
        roofline(costs, batch_size=0, calibration=MADE_UP)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cpu_is_calibrated_in_half_precision(dtype):
    found = calibrate("cpu", dtype=dtype)
    assert found.dtype == str(dtype).removeprefix("torch.")
    assert 0 < found.normalizing < math.inf
    assert found.overheads["local_response_norm"] > 0


@pytest.mark.parametrize(("takes", "calls"), [(0.125, 9), (0.375, 5), (2.0, 3)])
def test_what_takes_long_is_measured_in_fewer_rounds(takes, calls, monkeypatch):
    clock, made = [0.0], []
    monkeypatch.setattr(measured_rates, "time", SimpleNamespace(perf_counter=lambda: clock[0]))

    def run():
        made.append(None)
        clock[0] += takes if len(made) > 2 else 100  # until it is warm

    assert measured_rates._seconds(run, torch.device("cpu")) == takes
    assert len(made) == calls
