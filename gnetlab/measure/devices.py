"""Which device to measure on, and what differs between CPU, CUDA and Apple's MPS.

`resolve_device()`  "auto" -> CUDA where it works, else MPS, else the CPU
`device_name()`     the device in words, for footers
`wait()`            until the device has done what it was given
`as_current()`      streams, events and clocks are this device's, inside a with-block
`float64()`         a tensor in double precision, where the device has none on the CPU
`fork_random()`     random state of CPU and device as before, after a with-block
`deterministic()`   equal seeds give equal bits, on a GPU too
"""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.backends import cudnn
from torch.utils import deterministic as filling

# What PyTorch says where there is nothing to use, and so nothing to tell.
_ABSENT = re.compile("not compiled with|no NVIDIA driver|No CUDA GPUs|no MPS device")
_TRY = {
    "cuda": "a newer NVIDIA driver, or a build of PyTorch for this driver and card "
    "(https://pytorch.org/get-started)",
    "mps": "a newer macOS and PyTorch",
}


def resolve_device(device: str = "auto", *, sparse: bool = False) -> torch.device:
    """A torch device: "auto", "cpu", "cuda", "cuda:1", "mps", ... as given, once it works.

    "auto" takes CUDA, else MPS (Apple), else the CPU; a device works if a small kernel runs on it.
    A GPU that is there and does not work (its driver is too old, say) is told of, once.
    sparse   whether sparse matrices are needed, which PyTorch does not have on MPS

    Raises ValueError, with the cause, for a device that does not work.

    MPS follows PyTorch's documentation and has not been run. Where PyTorch lacks an operation there
    its error says so: set PYTORCH_ENABLE_MPS_FALLBACK=1 before Python starts (`gnetlab report` does
    it), or take device="cpu".

    >>> resolve_device("cpu")
    device(type='cpu')
    """
    if device == "auto":
        for kind in ("cuda",) if sparse else ("cuda", "mps"):
            cause = _fault(torch.device(kind))
            if cause is None:
                return torch.device(kind)
            if not _ABSENT.search(cause):
                tell(
                    f"there is a {kind.upper()} device, but it does not work: {cause} Going on "
                    f"without it, which is slow; try {_TRY[kind]}, or device='cpu' for silence"
                )
        return torch.device("cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"device={device!r} asked; choose 'auto', 'cpu', 'cuda', 'cuda:1', ... or 'mps'"
        ) from error
    cause = _fault(found)
    if cause is None and sparse and found.type == "mps":
        cause = "PyTorch has no sparse matrices there."
    if cause is not None:
        what = _TRY.get(found.type)
        raise ValueError(
            f"device={device!r} asked, but PyTorch cannot use such a device: {cause} "
            f"{f'Try {what}; or' if what else 'Use'} device='auto' or 'cpu'"
        )
    return found


def _fault(device: torch.device) -> str | None:
    """Why a device does not work, in a sentence; None if it does."""
    if device.type == "mps" and not torch.backends.mps.is_available():
        return "it finds no MPS device."
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of what it raises too
            torch.ones(1, device=device).add(1).item()
        return None
    except (AssertionError, RuntimeError, torch.cuda.DeferredCudaCallError) as error:
        first = f"{error}".strip().partition("\n")[0]
        return re.split(r"(?<=\.) (?=[A-Z])", first)[0].rstrip(".") + "."


@functools.cache
def tell(text: str) -> None:
    """A warning that is given once, however often it applies."""
    warnings.warn(text, stacklevel=2)


def device_name(device: torch.device | str) -> str:
    """The device in words: the GPU's name, or the CPU's model and PyTorch's thread count."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "mps":
        return f"{torch.backends.mps.get_name()} (MPS)"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        name = next((x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")), name)
    threads = torch.get_num_threads()
    return f"{name} ({threads} thread{'s' * (threads > 1)})"


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def as_current(device: torch.device) -> contextlib.AbstractContextManager:
    """Within it PyTorch's streams, events and timers are this GPU's, be it not the first."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def float64(tensor: Tensor) -> Tensor:
    """In double precision, on the tensor's device; on the CPU for MPS, which has none."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


@contextlib.contextmanager
def fork_random(device: torch.device) -> Iterator[None]:
    """Random state of the CPU and of the device as before afterwards."""
    gpu = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng([device] if gpu else [], **gpu):
        yield


@contextlib.contextmanager
def deterministic(on: bool = True) -> Iterator[None]:
    """Inside, equal seeds give equal bits on the same GPU, driver and PyTorch, where PyTorch can.

    >>> import gnetlab as gl
    >>> model, images = gl.googlenet("cifar", width=0.125), torch.randn(2, 3, 32, 32)
    >>> with deterministic():
    ...     flow = gl.gradient_flow(model, images, torch.tensor([0, 1]))

    On the CPU they do anyway, with equal thread counts. On CUDA convolutions take cuDNN's
    deterministic algorithms, chosen without trying which is fastest, and cuBLAS a fixed workspace.
    That has to be so from the process's first matrix product on: set
    CUBLAS_WORKSPACE_CONFIG=:4096:8 before Python starts, or begin with this block.

    PyTorch has no deterministic form for some gradients on CUDA, and warns when one runs: local
    response normalization's (average pooling in 3D), adaptive average pooling's to more than 1x1
    (auxiliary heads of small networks and of the torchvision preset), `grid_sample`'s
    (`visualize_channel`). To rule those out: norm="batch", or no norm; heads at 224 px only.

    On a CPU a training step of a small network took 1.00 times as long inside (quartiles 0.98 and
    1.02); on a GPU, where deterministic algorithms are the slower ones, it was not measured.
    `on=False` changes nothing.
    """
    if not on:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill, benchmark = filling.fill_uninitialized_memory, cudnn.benchmark
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, for the whole process
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        filling.fill_uninitialized_memory = False  # finds faults in programs, and takes time
        cudnn.benchmark = False
        yield
    finally:
        cudnn.benchmark, filling.fill_uninitialized_memory = benchmark, fill
        torch.use_deterministic_algorithms(before, warn_only=warn_only)
