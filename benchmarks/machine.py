"""What benchmarks share: options, device and clock, turns, and the line that says what ran."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

import gnetlab as gl
from gnetlab.measure.devices import device_name, resolve_device


class Machine(NamedTuple):
    """`clock()` gives seconds: one CPU thread's own, or else the wall's."""

    device: torch.device
    clock: Callable[[], float]

    def timed(self, run: Callable[[], object]) -> float:
        """Seconds that one call takes, the device's work included."""
        start = self.clock()
        run()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return self.clock() - start


def measure(
    runs: dict[str, Callable[[], object]], rounds: int, machine: Machine
) -> dict[str, list[float]]:
    """Seconds of every round by variant, which take turns; one more round before warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            taken = machine.timed(run)
            if round_:
                seconds[name].append(taken)
    return seconds


def prepare(
    doc: str, *, rounds: int = 15, **own: tuple[int, str]
) -> tuple[argparse.Namespace, Machine]:
    """Read the options, print what runs where, and return both.

    doc    the benchmark's docstring; rounds: how often by default
    own    further whole-number options: name=(default, help)
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    for name, (default, explained) in own.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=explained)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = resolve_device(options.device)
    own_clock = device.type == "cpu" and options.threads == 1
    print(
        f"{device_name(device)}; torch {torch.__version__}, gnetlab {gl.__version__}, "
        f"Python {platform.python_version()}; medians of {options.rounds} runs, "
        f"{'CPU time' if own_clock else 'wall time'}"
    )
    return options, Machine(device, time.thread_time if own_clock else time.perf_counter)
