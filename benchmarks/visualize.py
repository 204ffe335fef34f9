"""What an image of a channel costs: seconds at an early, a middle and a late module.

    python benchmarks/visualize.py [--steps 16] [--size 128] [--device auto] [--threads 1]

Runs `--steps` steps and prints the seconds per image of 256, alone and eight at a time, beside how
many plain forward passes of the whole network would take as long. One CPU thread is timed by its
own clock, anything else by the wall's.
"""

from __future__ import annotations

import statistics

import torch
from machine import prepare

import gnetlab as gl
from gnetlab.measure.visualize import visualize_channel

WHOLE = 256  # steps of an image
MODULES = ("conv2", "inception3a", "inception4c", "inception5b")


def main() -> None:
    options, machine = prepare(
        __doc__, rounds=3, steps=(16, "that are run"), size=(128, "side of the images, pixels")
    )
    device = machine.device
    model = gl.googlenet("torchvision", seed=0).to(device).eval()
    image = torch.zeros(1, 3, options.size, options.size, device=device)

    def seconds(run) -> float:
        times = [machine.timed(run) for _ in range(options.rounds + 1)]  # one more warms up
        return statistics.median(times[1:])

    with torch.no_grad():
        forward = seconds(lambda: model(image))
    print(
        f"{options.size} px, {options.steps} of {WHOLE} steps run; plain forward pass of the whole "
        f"network: {forward:.4f} s\n"
    )
    print(f"{'module':14}{'one image':>12}{'of 8, each':>12}{'forward passes':>16}")
    for name in MODULES:
        each = {}
        for count in (1, 8):
            taken, start = (
                seconds(
                    lambda steps=steps, count=count, name=name: visualize_channel(
                        model, name, range(count), steps=steps, size=options.size
                    )
                )
                for steps in (options.steps, 0)
            )
            each[count] = ((taken - start) / options.steps * WHOLE + start) / count
        alone, together = each.values()
        print(f"{name:14}{alone:10.2f} s{together:10.2f} s{alone / forward:16.0f}")


if __name__ == "__main__":
    main()
