"""Why multiply-adds are not time: what a device can do, and where a network's time goes.

`calibrate()`     the device's peak, bandwidth, pooling speed and overhead, measured in seconds
`roofline()`      time predicted per layer, three ways: MACs, roofline, calibrated
`predict()`       the same beside the time measured, for several networks
`agreement()`     how well each prediction ranks the layers, and how far the networks' sums are off

Roofline: Williams, Waterman and Patterson 2009, doi 10.1145/1498765.1498785.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gnetlab.measure.devices import device_name, resolve_device, wait
from gnetlab.measure.layers import layer_times
from gnetlab.net.model import LocalResponseNorm

PREDICTORS = ("macs", "roofline", "calibrated")


class Calibration(NamedTuple):
    """What a device does, measured: rates per second, times in seconds."""

    device: str
    dtype: str
    layout: str
    flops: float  # of the faster of two matrix products, two per multiply-add
    convolving: float  # of a 1 x 1 convolution if that is faster still, else the same
    bandwidth: float  # bytes read and written by the largest copy
    copies: tuple[tuple[float, float], ...]  # bytes, seconds: small ones stay in caches
    pooling: float  # comparisons of a 3 x 3 max pooling
    averaging: float  # additions of a 3 x 3 average pooling
    normalizing: float  # operations of local response normalization
    reading: float  # bytes of weights, in the product of a large matrix and one vector
    overheads: dict[str, float]  # operation -> seconds of a layer on next to nothing


def calibrate(
    device: torch.device | str = "cpu", *, dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
) -> Calibration:  # fmt: skip
    """Measure what the device can do; takes a second or two, and is kept for the session.

    `dtype` and `channels_last` are those of the matrices and maps that it is measured with.

    The rates are those of PyTorch's own matrix product, convolution, copy and pooling, with the
    threads that it uses now; no network takes part. Convolutions have a peak of their own: on a
    GPU PyTorch by default rounds their float32 to TF32, and not that of matrix products. Raises
    ValueError for a device that is absent.
    """
    device = resolve_device(str(device))
    return _calibrate(str(device), device_name(device), dtype, channels_last)


@functools.lru_cache(maxsize=32)
def _calibrate(where: str, name: str, dtype: torch.dtype, channels_last: bool) -> Calibration:
    device = torch.device(where)
    scale = 1 if device.type == "cpu" else 8  # a GPU needs more work to be busy
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def tensor(*shape: int) -> Tensor:
        return torch.rand(shape, device=device).to(dtype)

    with torch.inference_mode():
        flops = []
        for side in (256 * scale, 1024 * scale):
            a, b = tensor(side, side), tensor(side, side)
            flops.append(2 * side**3 / _seconds(lambda a=a, b=b: a @ b, device))
        maps, kernels = tensor(scale**2, 1024, 32, 32), tensor(1024, 1024, 1, 1)
        maps = maps.contiguous(memory_format=torch.channels_last)  # a product, and nothing else
        convolving = 2 * maps.numel() * 1024 / _seconds(lambda: F.conv2d(maps, kernels), device)
        copies = []
        for exponent in range(10, 26, 3):
            source = tensor(2**exponent * scale)
            target, moved = torch.empty_like(source), 2 * source.numel() * source.element_size()
            number = max(1, 2 ** (16 - exponent))
            seconds = _seconds(lambda s=source, t=target: t.copy_(s), device, number=number)
            copies.append((float(moved), seconds))
        images = tensor(scale**2, 192, 28, 28).contiguous(memory_format=layout)
        pooling = _seconds(lambda: F.max_pool2d(images, 3, 1, 1), device)
        averaging = _seconds(lambda: F.avg_pool2d(images, 3, 1, 1), device)
        normalizing = _seconds(lambda: LocalResponseNorm(5)(images), device)
        matrix, vector = tensor(4096 * scale, 4096), tensor(1, 4096)
        reading = _seconds(lambda: F.linear(vector, matrix), device)
    return Calibration(
        device=name,
        dtype=str(dtype).removeprefix("torch."),
        layout="channels_last" if channels_last else "contiguous",
        flops=max(flops),
        convolving=max(convolving, *flops),
        bandwidth=copies[-1][0] / copies[-1][1],
        copies=tuple(copies),
        pooling=8 * images.numel() / pooling,
        averaging=9 * images.numel() / averaging,
        normalizing=10 * images.numel() / normalizing,
        reading=matrix.numel() * matrix.element_size() / reading,
        overheads=_overheads(tensor(1, 8, 4, 4).contiguous(memory_format=layout)),
    )


class _Little(nn.Module):
    """One of each operation that convolutional networks use."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), LocalResponseNorm(3),
            nn.MaxPool2d(2, 1), nn.AvgPool2d(2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 8),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(x)
        return torch.cat([x + x, x], dim=1)


def _overheads(images: Tensor) -> dict[str, float]:
    """Seconds that a layer takes that has next to nothing to do, by operation."""
    model = _Little().to(device=images.device, dtype=images.dtype)
    times = layer_times(model.to(memory_format=torch.channels_last), images, rounds=60)
    return times.groupby("operation").seconds.median().to_dict()


def _seconds(
    run: Callable[[], object], device: torch.device, *, number: int = 1, rounds: int = 7
) -> float:
    """Median seconds of a call; fewer rounds of one that takes long, as in a CPU's float16."""
    times: list[float] = []
    for round_ in range(rounds + 2):  # the first two warm up
        wait(device)
        start = time.perf_counter()
        for _ in range(number):
            run()
        wait(device)
        if round_ > 1:
            times.append((time.perf_counter() - start) / number)
        if sum(times) * number > 1:
            break
    return statistics.median(times)


def roofline(
    costs: pd.DataFrame,
    device: torch.device | str = "cpu",
    *,
    batch_size: int = 1,
    calibration: Calibration | None = None,
    channels_last: bool = False,
) -> pd.DataFrame:
    """Predict each layer's time, in seconds per batch.

    costs          as from `layer_costs` (per image; weights are read once per batch)
    device         where `calibration` is measured, unless it is given: a second or two, once
    batch_size     images per batch
    channels_last  memory format of the maps that it is measured with

    Returns the costs with three more columns:

    macs_seconds        multiply-adds at the device's peak for such an operation, nothing else
    roofline_seconds    the larger of that and of the bytes moved at its bandwidth
    calibrated_seconds  the largest of: multiply-adds at the peak, bytes as a copy of that size
                        takes, the windows of pooling and of response normalization at the rates
                        measured for them, a linear layer's weights as read for one image; plus
                        what such an operation takes on next to nothing

    Raises ValueError for a device that is absent and for a batch without images. Source: Williams,
    Waterman and Patterson 2009, doi 10.1145/1498765.1498785.

    >>> import gnetlab as gl
    >>> costs = gl.layer_costs(gl.googlenet("cifar", width=0.125), (3, 32, 32))
    >>> times = gl.roofline(costs, batch_size=8)
    >>> list(times.columns[-3:])
    ['macs_seconds', 'roofline_seconds', 'calibrated_seconds']
    >>> bool((times.roofline_seconds >= times.macs_seconds).all())
    True
    >>> by_stage = times.groupby("stage", sort=False).calibrated_seconds.sum()
    >>> len(by_stage), bool((by_stage > 0).all())
    (11, True)
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} asked; give at least 1 image")
    found = calibration or calibrate(device, channels_last=channels_last)
    macs = costs.macs.fillna(0).astype(float) * batch_size
    moved = (costs.input_bytes + costs.output_bytes) * batch_size + costs.weight_bytes
    convolutions = costs.operation.str.startswith("conv")
    compute = 2 * macs / np.where(convolutions, found.convolving, found.flops)
    rate = costs.operation.map(
        {"avg_pool2d": found.averaging, "local_response_norm": found.normalizing}
    )
    windows = costs.comparisons / found.pooling + (costs.elementwise / rate).fillna(0)
    reading = costs.weight_bytes * (costs.operation == "linear") / found.reading
    overhead = costs.operation.map(found.overheads).fillna(found.overheads["relu"])
    calibrated = np.maximum.reduce([compute, _copying(moved, found), windows * batch_size, reading])
    return costs.assign(
        macs_seconds=compute,
        roofline_seconds=np.maximum(compute, moved / found.bandwidth),
        calibrated_seconds=(calibrated + overhead) * (moved > 0),
    )


def _copying(moved: pd.Series, found: Calibration) -> np.ndarray:
    """Seconds that a copy takes which moves as many bytes."""
    sizes, seconds = np.array(found.copies).T
    within = np.interp(np.log(np.maximum(moved, 1)), np.log(sizes), np.log(seconds / sizes))
    return np.exp(within) * moved


def predict(
    models: Mapping[str, nn.Module], images: Tensor, calibration: Calibration | None = None
) -> pd.DataFrame:
    """Predicted and measured time of every layer of several networks, on the device of `images`.

    The networks must be there. Columns: those of `roofline`, `seconds` (measured), `network`.
    """
    rows = []
    for name, model in models.items():
        times = layer_times(model, images)
        found = roofline(times, images.device, batch_size=len(images), calibration=calibration)
        rows.append(found.assign(network=name))
    return pd.concat(rows, ignore_index=True)


def agreement(times: pd.DataFrame) -> pd.DataFrame:
    """How well the predictions agree with what was measured; one row each.

    `times` has `seconds`, the predictions of `roofline`, and `network` where there are several.
    Columns: `predictor`, `spearman` (rank correlation over all layers that take time),
    `total_error` (mean over networks of |predicted / measured - 1|; `macs` and `roofline` assume
    that peak and bandwidth are reached).
    """
    rows = []
    working = times[times.input_bytes + times.output_bytes > 0]
    networks = times.network if "network" in times else pd.Series("", index=times.index)
    for name in PREDICTORS:
        predicted = times[f"{name}_seconds"]
        sums = pd.DataFrame({"p": predicted, "m": times.seconds}).groupby(networks).sum()
        rows.append(
            {
                "predictor": name,
                "spearman": _spearman(working[f"{name}_seconds"], working.seconds),
                "total_error": (sums.p / sums.m - 1).abs().mean(),
            }
        )
    return pd.DataFrame(rows)


def _spearman(a: pd.Series, b: pd.Series) -> float:
    return float(np.corrcoef(a.rank(), b.rank())[0, 1])
