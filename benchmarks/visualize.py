"""What an image of a channel costs: seconds at an early, a middle and a late module.

    python benchmarks/visualize.py [--steps 16] [--size 128] [--device auto] [--threads 1]

Runs `--steps` steps and prints the seconds per image of 256, alone and eight at a time, beside how
many plain forward passes of the whole network would take as long. One CPU thread is timed by its
own clock, anything else by the wall's.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time

import torch

import gnetlab as gl
from gnetlab.measure.latency import device_name, resolve_device
from gnetlab.measure.visualize import visualize_channel

WHOLE = 256  # steps of an image
MODULES = ("conv2", "inception3a", "inception4c", "inception5b")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    own_clock = device.type == "cpu" and options.threads == 1
    clock = time.thread_time if own_clock else time.perf_counter
    print(
        f"{device_name(device)}; torch {torch.__version__}, gnetlab {gl.__version__}, "
        f"Python {platform.python_version()}; {options.size} px, medians of {options.rounds} runs "
        f"of {options.steps} steps, {'CPU time' if own_clock else 'wall time'}"
    )
    model = gl.googlenet("torchvision", seed=0).to(device).eval()
    image = torch.zeros(1, 3, options.size, options.size, device=device)

    def seconds(run) -> float:
        times = []
        for _ in range(options.rounds + 1):  # one more warms up
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(clock() - start)
        return statistics.median(times[1:])

    with torch.no_grad():
        forward = seconds(lambda: model(image))
    print(f"plain forward pass of the whole network: {forward:.4f} s\n")
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
