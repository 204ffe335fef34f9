"""What recording costs: all 36 branches and 9 modules against a plain forward pass.

    python benchmarks/hooks.py [--rounds 15] [--device auto] [--threads 1]

Prints ratios of medians; the variants take turns in every round, so that what else the machine
does falls on all of them. One CPU thread is timed by its own clock, anything else by the wall's.
Peak memory is what torch allocates beyond weights and images. Absolute times are this machine's,
ratios carry over. torchlens (pip install torchlens) is compared where it is installed.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Iterator

import torch
from machine import Machine, measure, prepare
from torch import Tensor

import gnetlab as gl
from gnetlab.measure.activations import branch_statistics
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
        "branch_statistics, its frame included": lambda: branch_statistics(model, images),
    }


def torchlens_seconds(model: GoogLeNet, images: Tensor, machine: Machine) -> float | None:
    """Of one pass that keeps the same 36 maps; None where torchlens is not installed."""
    try:
        import torchlens
    except ImportError:
        return None
    log = getattr(torchlens, "log_forward_pass", None) or torchlens.trace
    return machine.timed(lambda: log(model, images))


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Bytes that torch allocates at most while `run` runs, its result included."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        kept = run()
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            kept = run()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        live = peak = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            live += event.nbytes()
            peak = max(peak, live)
    del kept
    return peak


def growth(device: torch.device, few: int = 100, many: int = 10_000) -> tuple[int, int]:
    """Bytes in use after `few` images and after `many`, streamed through a small network."""
    model = gl.googlenet("torchvision", width=0.1, num_classes=5, seed=0).to(device)
    used = []

    def batches() -> Iterator[Tensor]:
        for i in range(many // few):
            yield torch.randn(few, 3, 32, 32, device=device)
            if i in (0, many // few - 1):
                used.append(_in_use(device))

    branch_statistics(model, batches())
    return used[0], used[1]


def _in_use(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    options, machine = prepare(__doc__)
    device = machine.device
    model = gl.googlenet("torchvision", seed=0).to(device).eval()
    for batch_size in (1, 8):
        images = torch.randn(batch_size, 3, 224, 224, device=device)
        with torch.no_grad():
            runs = variants(model, images)
            seconds = measure(runs, options.rounds, machine)
            memory = {name: peak_memory(run, device) for name, run in runs.items()}
            lens = torchlens_seconds(model, images, machine)
        plain = seconds["plain forward"]
        print(f"\nbatch {batch_size}, 224 x 224: plain forward {statistics.median(plain):.4f} s")
        for name, times in seconds.items():
            ratio = statistics.median(times) / statistics.median(plain)
            in_pairs = statistics.median(a / b for a, b in zip(times, plain, strict=True))
            bytes_ = memory[name] / memory["plain forward"]
            print(
                f"  {name:42} time x {ratio:.3f} (median of the rounds' ratios {in_pairs:.3f}), "
                f"peak memory x {bytes_:.3f}"
            )
        kept = statistics.median(seconds["36 branches"])
        lens_says = "not installed" if lens is None else f"{lens / kept:.1f} x as long"
        print(f"  {'torchlens, against 36 branches':42} {lens_says}")
    few, many = growth(device)
    print(f"\nstreaming 32 x 32 images: {few / 2**20:.0f} MiB in use after 100, "
          f"{many / 2**20:.0f} MiB after 10,000")  # fmt: skip


if __name__ == "__main__":
    main()
