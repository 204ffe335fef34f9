"""How well multiply-adds, the roofline and a calibration predict the time of layers and networks.

    python benchmarks/roofline.py [--device auto] [--threads 1] [--channels-last] [--rounds 7]

The calibration measures PyTorch's own products, copies and poolings; no network takes part in it.
What enters the calibrated prediction was chosen on these networks, its numbers were not. Targets:
rank correlation of at least 0.93 over all layers, sums within 15% on average over the networks.
"""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path

import pandas as pd
import torch
import torchvision.models

sys.path.insert(0, str(Path(__file__).parent))
from costs import NETWORKS, build

import gnetlab as gl
from gnetlab.measure.devices import device_name, resolve_device
from gnetlab.measure.layers import layer_times
from gnetlab.measure.roofline import agreement, calibrate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    layout = torch.channels_last if options.channels_last else torch.contiguous_format
    found = calibrate(device, channels_last=options.channels_last)
    print(
        f"{device_name(device)}; torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"gnetlab {gl.__version__}, Python {platform.python_version()}; batch 1, float32, "
        f"{found.layout}, medians of {options.rounds} runs\n"
        f"peak {found.flops / 1e9:.0f} GFLOP/s, copy {found.bandwidth / 1e9:.1f} GB/s, "
        f"max pooling {found.pooling / 1e9:.2f} G comparisons/s, "
        f"average pooling {found.averaging / 1e9:.2f} G additions/s, "
        f"weights read at {found.reading / 1e9:.1f} GB/s\n"
    )
    print(f"{'milliseconds':40}{'measured':>10}{'MACs only':>11}{'roofline':>10}{'calibrated':>12}")
    frames = []
    for name, side in NETWORKS:
        model = build(name).to(device, memory_format=layout)
        images = torch.randn(1, 3, side, side, device=device).contiguous(memory_format=layout)
        times = layer_times(model, images, rounds=options.rounds)
        times = gl.roofline(times, calibration=found).assign(network=f"{name}, {side} px")
        columns = ["seconds", "macs_seconds", "roofline_seconds", "calibrated_seconds"]
        sums = 1000 * times[columns].sum()
        print(f"{times.network[0]:40}{sums.iloc[0]:10.2f}{sums.iloc[1]:11.2f}{sums.iloc[2]:10.2f}"
              f"{sums.iloc[3]:12.2f}", flush=True)  # fmt: skip
        frames.append(times)
    print(f"\n{'':14}{'rank correlation, layers':>26}{'mean error of the sums':>26}")
    for row in agreement(pd.concat(frames, ignore_index=True)).itertuples():
        print(f"{row.predictor:14}{row.spearman:26.3f}{row.total_error:26.1%}")


if __name__ == "__main__":
    main()
