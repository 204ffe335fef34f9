"""What fusing wins, step by step, against torchvision's own GoogLeNet in eager mode.

    python benchmarks/fuse.py [--rounds 15] [--device auto] [--threads 1]

Prints how many times as fast as torchvision each variant is, at batch 1 and 8. On CUDA also
torch.compile(mode="reduce-overhead") at batch 1, and everything in bfloat16 at batch 256. The
variants take turns in every round, and a ratio is the median over rounds, as in hooks.py.
"""

from __future__ import annotations

import copy
import statistics

import torch
import torchvision
from machine import Machine, measure, prepare
from torch import Tensor, nn

import gnetlab as gl
from gnetlab.net.fuse import fuse

BASE = "torchvision, contiguous"


def networks(device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = torchvision.models.googlenet(weights=None, init_weights=False)
    paper = gl.googlenet("paper", seed=0)
    models = {
        BASE: base,
        "torchvision, channels last": copy.deepcopy(base).to(memory_format=torch.channels_last),
        "gnetlab, preset torchvision": gl.googlenet("torchvision", seed=0),
        "fused": fuse(base),
        "fused, without merging": fuse(base, merge=False),
        "fused, without channels last": fuse(base, channels_last=False),
        "gnetlab, preset paper": paper,
        "gnetlab, preset paper, fused": fuse(paper),
    }
    return {name: model.to(device, dtype).eval() for name, model in models.items()}


def compiled(model: nn.Module, images: Tensor) -> nn.Module:
    """Compiled with CUDA graphs; the first calls compile, record and replay."""
    fast = torch.compile(model, mode="reduce-overhead", dynamic=False)
    for _ in range(3):
        fast(images)
    torch.cuda.synchronize(images.device)
    return fast


def show(
    models: dict[str, nn.Module],
    images: Tensor,
    rounds: int,
    machine: Machine,
) -> None:
    runs = {name: lambda model=model: model(images) for name, model in models.items()}
    with torch.inference_mode():
        seconds = measure(runs, rounds, machine)
    base = seconds[BASE]
    kind = str(images.dtype).removeprefix("torch.")
    print(f"\nbatch {len(images)}, 224 x 224, {kind}: {BASE} {statistics.median(base):.4f} s")
    for name, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(base, times, strict=True))
        print(f"  {name:42} {statistics.median(ratios):5.2f} times as fast   "
              f"(rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip


def main() -> None:
    options, machine = prepare(__doc__)
    device = machine.device
    settings = [(1, torch.float32), (8, torch.float32)]
    if device.type == "cuda":
        settings.append((256, torch.bfloat16))
    for batch_size, dtype in settings:
        models = networks(device, dtype)
        images = torch.randn(batch_size, 3, 224, 224, device=device, dtype=dtype)
        if device.type == "cuda" and batch_size in (1, 256):
            with torch.inference_mode():
                models["fused, compiled"] = compiled(models["fused"], images)
        show(models, images, options.rounds, machine)


if __name__ == "__main__":
    main()
