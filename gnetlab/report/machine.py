"""The machine that a report is made on, without loading torch: cores, memory, GPUs, versions."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

try:
    import resource
except ImportError:  # Windows
    resource = None

PACKAGES = (
    "torch", "torchvision", "jupyterlab", "matplotlib", "pandas", "numpy", "fvcore", "captum",
    "papermill", "scikit-image",
)  # fmt: skip
# Of x86 CPUs and of ARM's, the best first: PyTorch's kernels and their last digits hang on them.
_SIMD = ("avx512f", "avx2", "avx", "sve", "asimd")
_GB_PER_NOTEBOOK = 4  # at the fast profile the largest process has 1.9, three of a study 1 each


def versions() -> dict[str, str]:
    """Of Python and of the packages that results hang on."""
    found = {name: importlib.metadata.version(name) for name in PACKAGES}
    return {"python": platform.python_version(), **found}


def available_cores() -> int:
    """Cores that this process may use."""
    has_affinity = hasattr(os, "sched_getaffinity")
    return len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1


@functools.cache
def gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs that may be used: `name`, `driver`, and `id` for CUDA_VISIBLE_DEVICES.

    In CUDA_VISIBLE_DEVICES' order, as CUDA counts them.
    """
    query = ["nvidia-smi", "--query-gpu=name,driver_version,uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return []
    if listed.returncode:
        return []
    rows = [re.split(r",\s*", line.strip()) for line in listed.stdout.splitlines() if line.strip()]
    found = [dict(zip(("name", "driver", "id"), row, strict=True)) for row in rows if len(row) == 3]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return found
    wanted = [name.strip() for name in visible.split(",")]
    known = {name: gpu for i, gpu in enumerate(found) for name in (str(i), gpu["id"])}
    return [known[name] for name in wanted if name in known]


def describe() -> dict[str, Any]:
    """For the manifest: operating system, CPU, cores, memory, GPUs; no name of machine or user."""
    import psutil

    return {
        "os": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "machine": platform.machine(),
        "cpu": _cpu(),
        "simd": _simd(),
        "cores": available_cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": [{"name": gpu["name"], "driver": gpu["driver"]} for gpu in gpus()],
    }


def _cpu() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _simd() -> str:
    """The widest vector instructions, "" if unknown: CPUs of one name may differ in them."""
    known = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return next((name for name in _SIMD if name in known), "")


def _cpuinfo(field: str) -> str:
    """What Linux says of the first CPU; "" elsewhere."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.is_file() else ""
    found = re.search(rf"^{field}\s*:\s*(.+)$", text, re.M)
    return found[1] if found else ""


class OtherLoad:
    """How much other processes take of the cores that this one may use, from now on.

    `share()`  the mean since then, 0 to 1, without this process and its descendants; None where
               the system does not tell what those took that have ended (Windows)
    """

    def __init__(self) -> None:
        self.begun, self.busy, self.own = time.monotonic(), _busy_seconds(), _own_seconds()

    def share(self) -> float | None:
        if self.own is None:
            return None
        offered = available_cores() * (time.monotonic() - self.begun)
        taken = _busy_seconds() - self.busy - (_own_seconds() - self.own)
        return min(max(taken / offered, 0.0), 1.0) if offered > 0 else None


def _busy_seconds() -> float:
    """That the cores have worked, for anybody; a virtual machine's host counts too (steal)."""
    import psutil

    cores = psutil.cpu_times(percpu=True)
    if hasattr(os, "sched_getaffinity"):
        cores = [cores[i] for i in os.sched_getaffinity(0) if i < len(cores)]
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")
    return sum(getattr(core, kind, 0.0) for core in cores for kind in kinds)


def _own_seconds() -> float | None:
    """That this process and its descendants, ended or alive, have worked."""
    import psutil

    if resource is None:
        return None
    ended = [resource.getrusage(w) for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    seconds = sum(usage.ru_utime + usage.ru_stime for usage in ended)
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            seconds += sum(child.cpu_times()[:4])  # its own, and those of its ended children
    return seconds


def bearable_workers(device: str) -> int:
    """Notebooks that this machine bears at a time: two cores and 4 GB each, and a GPU each.

    `device`: "auto", "cpu", "cuda", "cuda:1" (that GPU alone) or "mps" (a machine has one).
    """
    import psutil

    by_memory = psutil.virtual_memory().available // (_GB_PER_NOTEBOOK * 10**9)
    most = min(4, available_cores() // 2, by_memory)
    if ":" in device or device == "mps":
        most = 1
    elif device != "cpu" and gpus():
        most = min(most, len(gpus()))
    return max(1, most)
