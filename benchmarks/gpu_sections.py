"""What gpu.py measures itself, each section in a process of its own.

    python benchmarks/gpu_sections.py throughput [--device auto] [--quick]

Prints one JSON object per number as soon as it is there: what, value, unit. `--quick` takes tiny
settings, for a try on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time

import pandas as pd
import torch
from machine import Machine, measure
from torch import nn
from torchvision.models import resnet50, vgg16
from training import PLAIN, ours, plain

import gnetlab as gl
from gnetlab.measure.devices import resolve_device
from gnetlab.measure.roofline import agreement, calibrate, predict
from gnetlab.measure.sparsity import sparse_speed
from gnetlab.net.data import PhotoCrops

RATES = {  # of a calibration
    "flops": "FLOP/s", "convolving": "FLOP/s", "bandwidth": "bytes/s", "reading": "bytes/s",
    "pooling": "comparisons/s", "averaging": "additions/s", "normalizing": "operations/s",
}  # fmt: skip


def say(what: str, value: float, unit: str) -> None:
    print(json.dumps({"what": what, "value": float(value), "unit": unit}), flush=True)


def networks() -> dict[str, nn.Module]:
    googlenet = gl.googlenet("paper", aux=False, norm="batch", seed=0)
    return {"GoogLeNet": googlenet, "VGG-16": vgg16(init_weights=False), "ResNet-50": resnet50()}


def throughput(device: torch.device, quick: bool) -> None:
    """Images per second in float32 and bfloat16, contiguous and channels last; GoogLeNet fused."""
    models = networks()
    models["GoogLeNet, fused"] = gl.fuse(models["GoogLeNet"])
    side, sizes, least = (64, (1, 2), 0.02) if quick else (224, (1, 64, 256), 0.5)
    for size, dtype in itertools.product(sizes, (torch.float32, torch.bfloat16)):
        frame = gl.measure_latency(
            models, input_size=(3, side, side), batch_sizes=[size], device=device, dtype=dtype,
            channels_last=(False, True), min_run_time=least,
        )  # fmt: skip
        _say_throughput(frame)


def compiled(device: torch.device, quick: bool) -> None:
    """torch.compile beside eager mode, bfloat16, channels last: batch 256, and 1 as a graph."""
    models, side, modes = networks(), 224, {256: "compile", 1: "compile:reduce-overhead"}
    del models["VGG-16"]  # nothing to gain: its time is in large convolutions
    if quick:
        models, side, modes = {"one layer": nn.Conv2d(3, 4, 3)}, 32, {2: "compile"}
    for (size, mode), (name, model) in itertools.product(modes.items(), models.items()):
        frame = gl.measure_latency(
            {name: model}, input_size=(3, side, side), batch_sizes=[size], device=device,
            dtype=torch.bfloat16, channels_last=True, mode=("eager", mode), min_run_time=0.5,
        )  # fmt: skip
        _say_throughput(frame)


def _say_throughput(frame: pd.DataFrame) -> None:
    for row in frame.itertuples():
        layout = row.memory_format.replace("_", " ")
        what = f"{row.model}, {row.dtype}, {layout}, {row.mode}, batch {row.batch_size}"
        say(what, row.images_per_second, "images/s")


def training(device: torch.device, quick: bool) -> None:
    """Steps per second of `gl.train`, captured as a graph and not; capturing it is included."""
    options: dict[str, dict[str, bool]] = {"": {}, ", bfloat16": {"mixed_precision": True}}
    if device.type == "cuda":
        options |= {f"{k}, not captured": {**v, "capture": False} for k, v in options.items()}
    # At 32 pixels the network of notebook 03, else torchvision's.
    cases = ((32, 2, 1), (64, 2, 1)) if quick else ((32, 128, 200), (64, 32, 100), (224, 128, 20))
    for size, batch_size, steps in cases:
        data = PhotoCrops(size=size, test_size=2, device=device)
        if size == 32:
            model = gl.googlenet(stem="compact", norm="batch", num_classes=16, seed=0).to(device)
            train = functools.partial(
                functools.partial, gl.train, model, data, steps=steps, batch_size=batch_size,
                learning_rate=0.01, progress=False,
            )  # fmt: skip
            runs = {}
        else:
            train = functools.partial(ours, data, batch_size, steps)
            runs = {PLAIN: plain(data, batch_size, steps)}
        runs |= {f"gl.train{name}": train(**changed) for name, changed in options.items()}
        found = measure(runs, 1 if quick else 3, Machine(device, time.perf_counter))
        for name, seconds in found.items():
            rate = steps / statistics.median(seconds)
            say(f"{name}, {size} px, batch {batch_size}", rate, "steps/s")


def roofline(
    device: torch.device, quick: bool, dtype: torch.dtype = torch.float32, tf32: bool = False
) -> None:
    """What the device can do, and the time of networks that follows from it beside the measured."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = tf32
    found = calibrate(device, dtype=dtype)
    for name, unit in RATES.items():
        say(name, getattr(found, name), unit)
    models = {name: model.to(device, dtype).eval() for name, model in networks().items()}
    side, sizes = (64, (1,)) if quick else (224, (1, 64))
    for size in sizes:
        images = torch.randn(size, 3, side, side, device=device, dtype=dtype)
        times = predict(models, images, found)
        columns = [name for name in times if name.endswith("seconds")]
        for name, row in times.groupby("network", sort=False)[columns].sum().iterrows():
            for column, value in row.items():
                how = column.removesuffix("seconds").rstrip("_") or "measured"
                say(f"{name}, batch {size}, {how}", value, "s")
        for row in agreement(times).itertuples():
            say(f"{row.predictor}, batch {size}, rank correlation over layers", row.spearman, "")
            say(f"{row.predictor}, batch {size}, mean error of the sums", row.total_error, "")


def sparse(device: torch.device, quick: bool) -> None:
    """An Inception module as sparse arithmetic, over the time of the dense 5x5 convolution."""
    with torch.device("meta"):
        model = gl.googlenet("naive", aux=False)
    stages, shares, size, rounds = ("3a", "4a", "5a"), (0.9, 0.99), 64, 5
    if quick:
        stages, shares, size, rounds = stages[:1], (0.99,), 1, 1
    for stage in stages:
        frame = sparse_speed(
            model, [stage], sparsities=shares, batch_sizes=[size], device=device, rounds=rounds
        )
        for row in frame.itertuples():
            what = f"{row.form}, {row.dtype}, zeros: {row.sparsity:.0%} {row.zeros}, {stage}"
            say(f"{what}, batch {size}", row.ratio, "of dense time")


SECTIONS = {
    "throughput": throughput,
    "training": training,
    "roofline-float32": roofline,
    "roofline-tf32": functools.partial(roofline, tf32=True),
    "roofline-bfloat16": functools.partial(roofline, dtype=torch.bfloat16),
    "sparse": sparse,
    "compiled": compiled,
}
# A CPU has no TF32, and PyTorch for it no response normalization in bfloat16.
ON_CUDA_ONLY = ("roofline-tf32", "roofline-bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("section", choices=SECTIONS)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    SECTIONS[options.section](resolve_device(options.device), options.quick)


if __name__ == "__main__":
    main()
