"""What recording costs: all 36 branches and 9 modules against a plain forward pass.

    python benchmarks/hooks.py [--rounds 15] [--device auto] [--threads 1]

Prints ratios of medians; the variants take turns in every round, so that what else the machine
does falls on all of them. One CPU thread is timed by its own clock, anything else by the wall's.
Absolute times are this machine's, ratios carry over.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import gnetlab as gl
from gnetlab.measure.latency import device_name, resolve_device
from gnetlab.net.model import GoogLeNet, Inception


def sums(state: tuple[Tensor, ...] | None, maps: Tensor) -> tuple[Tensor, ...]:
    """Per channel: sum, 2-norm, count of non-zeros; what a streamed statistic costs at least."""
    norms = [torch.linalg.vector_norm(maps, order, (0, 2, 3)) for order in (2, 0)]
    new = (maps.sum((0, 2, 3)), *norms)
    return new if state is None else tuple(a + b for a, b in zip(state, new, strict=True))


def variants(model: GoogLeNet, images: Tensor) -> dict[str, Callable[[], object]]:
    branches = gl.branch_names(model)
    modules = [name for name, m in model.named_modules() if isinstance(m, Inception)]

    def recorded(names: list[str], **options: object) -> Callable[[], object]:
        def run() -> object:
            with gl.record(model, names, **options) as maps:
                model(images)
            return maps

        return run

    both = [*branches, *modules]
    return {
        "plain forward": lambda: model(images),
        f"{len(branches)} branches + {len(modules)} modules": recorded(both),
        f"{len(branches)} branches": recorded(branches),
        "both, clone=True": recorded(both, clone=True),
        "branches, reduce= (sum, 2-norm, 0-norm)": recorded(branches, reduce=sums),
    }


def measure(
    runs: dict[str, Callable[[], object]],
    rounds: int,
    device: torch.device,
    clock: Callable[[], float],
) -> dict[str, list[float]]:
    """Seconds of every round by variant; one more round before warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if round_:
                seconds[name].append(clock() - start)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    own_clock = device.type == "cpu" and options.threads == 1
    print(
        f"{device_name(device)}; torch {torch.__version__}, gnetlab {gl.__version__}, "
        f"Python {platform.python_version()}; medians of {options.rounds} interleaved runs, "
        f"{'CPU time' if own_clock else 'wall time'}"
    )
    model = gl.googlenet("torchvision", seed=0).to(device).eval()
    for batch_size in (1, 8):
        images = torch.randn(batch_size, 3, 224, 224, device=device)
        with torch.no_grad():
            clock = time.thread_time if own_clock else time.perf_counter
            seconds = measure(variants(model, images), options.rounds, device, clock)
        plain = seconds["plain forward"]
        print(f"\nbatch {batch_size}, 224 x 224: plain forward {statistics.median(plain):.4f} s")
        for name, times in seconds.items():
            ratio = statistics.median(times) / statistics.median(plain)
            in_pairs = statistics.median(a / b for a, b in zip(times, plain, strict=True))
            print(f"  {name:42} x {ratio:.3f}   (median of the rounds' ratios {in_pairs:.3f})")


if __name__ == "__main__":
    main()
