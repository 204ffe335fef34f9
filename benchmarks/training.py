"""Training throughput, beside the plain PyTorch loop with torchvision's GoogLeNet.

    python benchmarks/training.py [--rounds 5] [--steps 12] [--device auto] [--threads 1]

Images per second in training with both auxiliary heads, SGD with momentum. The plain loop is that
of tutorials: contiguous memory, `loss.item()` at every step. `gnetlab.train` runs the same network
(preset torchvision) on the same crops, channels last, and on CUDA as a captured graph. Cutting the
batches is part of both; keeping every loss and accuracy, and two test images, of gnetlab's.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torchvision
from machine import measure, prepare
from torch.nn import functional as F

import gnetlab as gl
from gnetlab.net.data import PhotoCrops

PLAIN = "plain loop, torchvision"


def plain(data: PhotoCrops, batch_size: int, steps: int) -> Callable[[], object]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torchvision.models.googlenet(weights=None, init_weights=False, num_classes=16)
    model = model.to(data.device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)

    def run() -> None:
        for step in range(steps):
            images, labels = data.train_batch(step, batch_size)
            output = model(images)
            loss = F.cross_entropy(output.logits, labels)
            for logits in (output.aux_logits1, output.aux_logits2):
                loss = loss + 0.3 * F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss.item()

    return run


def ours(data: PhotoCrops, batch_size: int, steps: int, **options: bool) -> Callable[[], object]:
    model = gl.googlenet("torchvision", num_classes=16, seed=0).to(data.device)
    return lambda: gl.train(
        model, data, steps=steps, batch_size=batch_size, learning_rate=0.01, channels_last=True,
        progress=False, **options,
    )  # fmt: skip


def main() -> None:
    options, machine = prepare(__doc__, rounds=5, steps=(12, "training steps in a round"))
    on_gpu = machine.device.type == "cuda"
    for size, batch_size in ((64, 32), (224, 128 if on_gpu else 8)):
        data = PhotoCrops(size=size, test_size=2, device=machine.device)
        runs = {PLAIN: plain(data, batch_size, options.steps)}
        runs["gnetlab.train"] = ours(data, batch_size, options.steps)
        runs["gnetlab.train, bfloat16"] = ours(
            data, batch_size, options.steps, mixed_precision=True
        )
        if on_gpu:
            runs["gnetlab.train, not captured"] = ours(
                data, batch_size, options.steps, capture=False
            )
        seconds = measure(runs, options.rounds, machine)
        print(f"\nbatch {batch_size}, {size} x {size}")
        for name, times in seconds.items():
            rate = batch_size * options.steps / statistics.median(times)
            ratios = sorted(a / b for a, b in zip(seconds[PLAIN], times, strict=True))
            print(f"  {name:30} {rate:9,.0f} images/s  {statistics.median(ratios):5.2f}x   "
                  f"(rounds: {ratios[0]:.2f} to {ratios[-1]:.2f})")  # fmt: skip


if __name__ == "__main__":
    main()
