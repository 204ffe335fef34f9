"""Counting costs: gnetlab's table against fvcore and torch's FlopCounterMode, and what it predicts.

    python benchmarks/costs.py [--rounds 9] [--fvcore-rounds 3]

CPU time of one thread, medians of rounds in which each tool takes its turn for five calls; ratios
carry over, absolute times do not.
Memory is the growth of the process's peak over what it held before (Linux only). The last table
compares the multiply-adds with fvcore's and FlopCounterMode's on every network; one mismatch makes
the exit status 1.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torchvision.models
from fvcore.nn import FlopCountAnalysis
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import gnetlab as gl
from gnetlab.measure.devices import device_name

OURS = {
    "GoogLeNet, paper": lambda: gl.googlenet("paper"),
    "GoogLeNet, paper, separable stem": lambda: gl.googlenet("paper", stem="separable"),
    "GoogLeNet, cifar preset": lambda: gl.googlenet("cifar"),
}
THEIRS = (
    "googlenet", "vgg11", "vgg13", "vgg16", "vgg19", "alexnet", "resnet18", "resnet50",
    "inception_v3", "mobilenet_v2",
)  # fmt: skip
NETWORKS = [
    *((name, 32 if "cifar" in name else 224) for name in OURS),
    *((name, 224) for name in THEIRS),
    ("inception_v3", 299),
]


def build(name: str) -> nn.Module:
    if name in OURS:
        return OURS[name]().eval()
    slow = name in ("googlenet", "inception_v3")  # to initialize
    options = {"init_weights": False} if slow else {}
    return getattr(torchvision.models, name)(**options).eval()


def fvcore(model: nn.Module, side: int) -> int:
    analysis = FlopCountAnalysis(model, torch.zeros(1, 3, side, side))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    counts = analysis.by_operator()
    return int(counts["conv"] + counts["linear"])


def flop_counter(model: nn.Module, side: int) -> int:
    """On a model that lies on the meta device."""
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, side, side, device="meta"))
    return counter.get_total_flops() // 2


def gnetlab(model: nn.Module, side: int) -> int:
    return int(gl.layer_costs(model, (3, side, side)).macs.sum())


def seconds(run: Callable[[], object]) -> float:
    start = time.thread_time()
    run()
    return time.thread_time() - start


def extra_peak(run: Callable[[], object]) -> float:
    """MB by which the process's peak grows over what it holds; NaN where Linux does not say."""
    status = Path("/proc/self/status")
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status.read_text()
    except OSError:
        return float("nan")
    run()
    kilobytes = [
        int(next(line for line in text.splitlines() if line.startswith(key)).split()[1])
        for text, key in ((before, "VmRSS"), (status.read_text(), "VmHWM"))
    ]
    return (kilobytes[1] - kilobytes[0]) / 1000


@torch.no_grad()
def speed(rounds: int, fvcore_rounds: int) -> None:
    print(f"\n{'CPU ms (x gnetlab / it), extra MB':34}{'gnetlab':>16}{'fvcore':>26}"
          f"{'FlopCounterMode on meta':>30}")  # fmt: skip
    for name in ("googlenet", "vgg16", "vgg19", "resnet50"):
        model = build(name)
        with torch.device("meta"):
            empty = build(name)
        runs = {
            "gnetlab": (lambda m=model: gnetlab(m, 224), rounds),
            "fvcore": (lambda m=model: fvcore(m, 224), fvcore_rounds),
            "torch": (lambda m=empty: flop_counter(m, 224), rounds),
        }
        times: dict[str, list[float]] = {tool: [] for tool in runs}
        for run, _ in runs.values():
            run()  # warms up
        for round_ in range(rounds):
            for tool, (run, most) in runs.items():
                if round_ < most:
                    gc.collect()  # nobody pays for another's garbage
                    times[tool] += [1000 * seconds(run) for _ in range(5)]
        medians = {tool: statistics.median(values) for tool, values in times.items()}
        memory = {tool: extra_peak(run) for tool, (run, _) in runs.items()}
        row = f"{name:34}{medians['gnetlab']:8.2f} {memory['gnetlab']:5.1f} MB"
        for tool in ("fvcore", "torch"):
            ratio = medians["gnetlab"] / medians[tool]
            row += f"{medians[tool]:10.1f} ({ratio:.4f}) {memory[tool]:5.1f} MB"
        print(row)


@torch.no_grad()
def agreement() -> int:
    print(f"\n{'multiply-adds':40}{'gnetlab':>16}{'fvcore':>16}{'FlopCounterMode':>17}")
    mismatches = 0
    for name, side in NETWORKS:
        model = build(name)
        with torch.device("meta"):
            empty = build(name)
        counts = (gnetlab(model, side), fvcore(model, side), flop_counter(empty, side))
        mismatches += len(set(counts)) > 1
        print(f"{f'{name}, {side} px':40}" + "".join(f"{count:16,}" for count in counts))
    print(f"{mismatches} mismatches on {len(NETWORKS)} networks")
    return mismatches


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--fvcore-rounds", type=int, default=3, help="it really computes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # fvcore uses what torch calls deprecated
    print(
        f"{device_name('cpu')}; torch {torch.__version__}, torchvision {torchvision.__version__}, "
        f"gnetlab {gl.__version__}, Python {platform.python_version()}"
    )
    speed(options.rounds, options.fvcore_rounds)
    sys.exit(int(agreement() > 0))


if __name__ == "__main__":
    main()
