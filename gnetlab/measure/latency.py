"""How long a forward pass takes on a device, and what memory it needs.

`measure_latency()`  median time, spread, throughput, peak memory per batch size
`resolve_device()`   "auto" -> CUDA where there is one, else CPU
`device_name()`      the device in words, for footers
"""

from __future__ import annotations

import contextlib
import logging
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from gnetlab.measure.hooks import in_mode


def resolve_device(device: str = "auto") -> torch.device:
    """A torch device; "auto" takes CUDA where it works. Raises ValueError for one that is absent.

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} asked; choose 'auto', 'cpu' or 'cuda'") from error
    backends = {"cpu": torch.cpu, "cuda": torch.cuda, "mps": torch.backends.mps, "xpu": torch.xpu}
    backend = backends.get(found.type)
    there = backend is not None and backend.is_available()
    if not there or (found.index or 0) >= getattr(backend, "device_count", lambda: 1)():
        raise ValueError(
            f"device={device!r} asked, but PyTorch finds no {found.type.upper()} device of this "
            "number (a missing driver, or a build of PyTorch without it?); use device='auto' or "
            "'cpu'"
        )
    return found


def device_name(device: torch.device | str) -> str:
    """The device in words: the GPU's name, or the CPU's model and PyTorch's thread count."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name} ({threads} thread{'s' * (threads > 1)})"


def measure_latency(
    models: nn.Module | Mapping[str, nn.Module],
    *,
    input_size: tuple[int, ...] = (3, 224, 224),
    batch_sizes: Iterable[int] = (1,),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    min_run_time: float = 1.0,
    rounds: int = 5,
) -> pd.DataFrame:
    """Time of a forward pass in eval mode, one row per model and batch size.

    models        a model, or several by name: they take turns, so that what else the machine does
                  falls on all of them and their ratio can be trusted
    min_run_time  seconds to measure each model and batch size for, over all rounds, after one
                  warm-up pass; torch's benchmark timer synchronizes CUDA

    Columns: `model`, `device`, `dtype`, `memory_format`, `batch_size`, `threads`, `seconds`
    (median per batch), `iqr` (interquartile range, seconds), `runs`, `images_per_second`,
    `peak_memory` (bytes allocated beyond the weights, CUDA only, else NA).

    The models are moved to the device and left there; their modes are restored.
    """
    # This import warns on machines with a CUDA toolkit and no GPU, where nothing is amiss.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Measurement, Timer

    if isinstance(models, nn.Module):
        models = {type(models).__name__: models}
    device = torch.device(device)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    rows = []
    with contextlib.ExitStack() as stack:
        for model in models.values():
            model.to(device=device, dtype=dtype, memory_format=layout)
            stack.enter_context(in_mode(model, training=False))
        for batch_size in batch_sizes:
            images = torch.randn(batch_size, *input_size, device=device, dtype=dtype)
            images = images.contiguous(memory_format=layout)
            timers = {
                name: Timer("with no_grad(): model(images)", num_threads=torch.get_num_threads(),
                            globals={"model": model, "images": images,
                                     "no_grad": torch.inference_mode})
                for name, model in models.items()
            }  # fmt: skip
            # This first pass also warms up.
            peaks = {name: _peak_memory(model, images) for name, model in models.items()}
            measured: dict[str, list[Measurement]] = {name: [] for name in models}
            for _ in range(rounds):
                for name, timer in timers.items():
                    measured[name].append(
                        timer.blocked_autorange(min_run_time=min_run_time / rounds)
                    )
            for name in models:
                times = pd.Series([t for m in measured[name] for t in m.times])
                rows.append(
                    {
                        "model": name,
                        "device": device.type,
                        "dtype": str(dtype).removeprefix("torch."),
                        "memory_format": "channels_last" if channels_last else "contiguous",
                        "batch_size": batch_size,
                        "threads": torch.get_num_threads(),
                        "seconds": times.median(),
                        "iqr": times.quantile(0.75) - times.quantile(0.25),
                        "runs": sum(len(m.times) * m.number_per_run for m in measured[name]),
                        "images_per_second": batch_size / times.median(),
                        "peak_memory": peaks[name],
                    }
                )
    return pd.DataFrame(rows).astype({"peak_memory": "Int64"})


@torch.inference_mode()
def _peak_memory(model: nn.Module, images: torch.Tensor) -> int | None:
    if images.device.type != "cuda":
        model(images)
        return None
    torch.cuda.synchronize(images.device)
    torch.cuda.reset_peak_memory_stats(images.device)
    before = torch.cuda.memory_allocated(images.device)
    model(images)
    torch.cuda.synchronize(images.device)
    return torch.cuda.max_memory_allocated(images.device) - before
