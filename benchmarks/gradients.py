"""What it costs to watch gradients while training, beside what people use.

    python benchmarks/gradients.py [--rounds 15] [--steps 20] [--device auto] [--threads 1]

A round is `--steps` training steps (forward, backward, SGD) of each variant in turn; a ratio is the
median over rounds of its time over the plain step's. `--steps` is also how often the recorder
splits, so that each round has one split. The network is the fast profile's of notebook 03, with and
without batch norm.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from machine import measure, prepare
from torch import nn

import gnetlab as gl
from gnetlab.measure.gradients import (
    GradientRecorder,
    gradient_flow,
    split_gradients,
    weighted_losses,
)
from gnetlab.net.data import PhotoCrops

PLAIN = "plain step"


def training(
    norm: str | None, device: torch.device, steps: int
) -> Callable[..., Callable[[], object]]:
    """A function that makes variants of one training: what to do before and after backward."""
    data = PhotoCrops(size=32, device=device)
    images, labels = data.train_batch(0, 32, 0)

    def variant(watch: str) -> Callable[[], object]:
        model = gl.googlenet(
            stem="compact", norm=norm, init=("gain", 0.6), width=0.25, num_classes=16, seed=0
        ).to(device)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
        looks: dict[str, Callable[[nn.Module], object]] = {
            "per parameter": lambda m: [p.grad.norm().item() for p in m.parameters()],
            "histograms": lambda m: [torch.histc(p.grad, 64).tolist() for p in m.parameters()],
        }
        every = {"recorder": 0, "recorder with splits": steps, "recorder, each": 1}.get(watch)

        def run() -> None:
            recorder = None if every is None else GradientRecorder(model, every=every)
            for _ in range(steps):
                losses = weighted_losses(model(images), labels)
                optimizer.zero_grad()
                if recorder:
                    recorder.before_backward(losses)
                torch.stack(list(losses.values())).sum().backward()
                if recorder:
                    recorder.after_backward()
                if watch in looks:
                    looks[watch](model)
                optimizer.step()
                if watch == "split":
                    split_gradients(model, images, labels)
                if watch == "table":
                    gradient_flow(model, images, labels)
            if recorder:
                recorder.totals()
                recorder.splits()

        return run

    return variant


def main() -> None:
    options, machine = prepare(__doc__, steps=(20, "training steps in a round"))
    variants = {
        "recorder, total at every step": "recorder",
        f"recorder, and the split every {options.steps} steps": "recorder with splits",
        "recorder, and the split at every step": "recorder, each",
        "per-parameter loop, .norm().item()": "per parameter",
        "histogram of every parameter": "histograms",
    }
    alone = {"split_gradients": "split", "gradient_flow": "table"}
    for norm in (None, "batch"):
        variant = training(norm, machine.device, options.steps)
        runs = {PLAIN: variant("")}
        runs |= {name: variant(watch) for name, watch in {**variants, **alone}.items()}
        seconds = measure(runs, options.rounds, machine)
        plain = seconds[PLAIN]
        each = statistics.median(plain) / options.steps
        print(f"\n{norm or 'no'} norm, batch 32, 32 x 32: {PLAIN} {each * 1e3:.1f} ms")
        for name, times in seconds.items():
            is_alone = name in alone  # a round of it took plain steps, too
            ratios = sorted(a / b - is_alone for a, b in zip(times, plain, strict=True))
            note = ", by itself" if is_alone else ""
            print(f"  {name + note:42} {statistics.median(ratios):6.3f}x   "
                  f"(rounds: {ratios[0]:.3f} to {ratios[-1]:.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
