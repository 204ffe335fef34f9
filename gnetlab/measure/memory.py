"""Batches that fit into memory: one rule to choose them, one answer where they do not.

`fitting_batch_size()`  the largest of wanted, wanted / 2, wanted / 4 ... that is predicted to fit
`predicted_bytes()`     what a forward pass or a training step is predicted to need
`halving()`             a function of a batch size, once more with half of it if memory runs out
`in_parts()`            the same for images at hand, where two halves give what the whole gives
`in_one_piece()`        a clear error, where they do not
`out_of_memory()`, `release_memory()`  what those consist of, for loops of their own

The prediction is of tensors alone (`layer_costs`): 0.85 to 1.15 times what PyTorch's own MemTracker
counts, for seven networks in both modes. Workspaces of cuDNN, fragmentation and what else runs on
the device come on top, for which `MARGIN` leaves room; on a GPU it was not measured.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import re
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import psutil
import torch
from torch import nn

from gnetlab.measure.costs import layer_costs
from gnetlab.measure.devices import tell

MARGIN = 0.8  # of the free memory may be used, by prediction
# Copies of its output that a function makes on its way, beyond what `layer_costs` counts.
_TEMPORARY = {"local_response_norm": 2}
_FULL = re.compile("out of memory|can't allocate memory|not enough memory|ALLOC_FAILED", re.I)

T = TypeVar("T")


def predicted_bytes(
    model: nn.Module, input_size: tuple[int, ...], batch_size: int, *, training: bool = False
) -> int:
    """Peak memory of a forward pass, or of a forward and backward pass, in bytes.

    Weights (twice in training: their gradients) and the most activations alive at once, in the
    model's own precision; no optimizer's state. Raises what the model raises for such an image.
    """
    weights = _weight_bytes(model) * (2 if training else 1)
    return weights + batch_size * _bytes_per_image(model, input_size, training)


def _bytes_per_image(model: nn.Module, input_size: tuple[int, ...], training: bool) -> int:
    costs = layer_costs(model, input_size, training=training)
    temporary = costs.operation.map(_TEMPORARY).fillna(0) * costs.output_bytes
    return int((costs.live_bytes + temporary).max())


def _weight_bytes(model: nn.Module, beside: torch.device | None = None) -> int:
    """Of parameters and buffers; of those that lie elsewhere than on `beside`."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return sum(t.nbytes for t in tensors if t.device != beside)


def free_bytes(device: torch.device) -> int:
    """What PyTorch can still allocate there, its cache included."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    return psutil.virtual_memory().available


def fitting_batch_size(
    models: nn.Module | Iterable[nn.Module],
    input_size: tuple[int, ...],
    wanted: int,
    *,
    device: torch.device,
    training: bool = False,
) -> int:
    """The largest of wanted, wanted / 2, wanted / 4 ... 1 that is predicted to fit on the device.

    That is, for each of the models by itself, to take at most `MARGIN` of the memory that is free
    now, beside the weights of all. Anything less than wanted is told of, once. A network that
    `layer_costs` cannot run is left to be tried.

    >>> fitting_batch_size(nn.Conv2d(3, 8, 3), (3, 32, 32), 4, device=torch.device("cpu"))
    4
    """
    if wanted == 1:
        return 1
    models = [models] if isinstance(models, nn.Module) else list(models)
    device = torch.empty(0, device=device).device  # with its index, as tensors have it
    found = MARGIN * free_bytes(device) - sum(_weight_bytes(model, device) for model in models)
    batch_size = wanted
    for model in models:
        try:
            each = _bytes_per_image(model, input_size, training)
        except Exception:  # what the model raises; it will again when it runs
            continue
        room = found - (_weight_bytes(model) if training else 0)
        while batch_size > 1 and batch_size * each > room:
            batch_size //= 2
    if batch_size < wanted:
        tell(
            f"batch size {wanted} asked; by prediction it does not fit into {MARGIN:.0%} of the "
            f"{free_bytes(device) / 1e9:.1f} GB that are free on {device}: it is {batch_size} here"
        )
    return batch_size


def out_of_memory(error: RuntimeError | MemoryError) -> bool:
    """Whether this is a device's, or the CPU's, way to say that memory is full."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or bool(_FULL.search(str(error)))


def release_memory() -> None:
    """Give back what is not used any more, PyTorch's caches on the device included."""
    gc.collect()
    # torch.accelerator's raises in builds for the CPU, and on MPS (pytorch issue 186430).
    torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def halving(measure: Callable[[int], T], batch_size: int, *, result: str = "") -> T:
    """`measure(batch_size)`; if memory runs out, `measure(batch_size // 2)`, told of once.

    result   what half a batch means for the result, for the message

    Raises RuntimeError, from the original error, if that is too much as well.
    """
    try:
        return measure(batch_size)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        if batch_size <= 1:
            raise _too_much(str(batch_size), error) from error
        said = _said(error)
    release_memory()  # only here is the error gone, which held on to all that was allocated
    half = batch_size // 2
    tell(f"out of memory at batch size {batch_size} ({said}): going on with {half}{result}")
    try:
        return measure(half)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise _too_much(f"{batch_size}, then {half}", error) from error


def _said(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:200] or type(error).__name__


def _too_much(tried: str, error: BaseException, why: str = "") -> RuntimeError:
    return RuntimeError(
        f"batch size {tried} asked, and out of memory: {_said(error)}{why}. Try a smaller batch or "
        "smaller images, end other programs on this device (nvidia-smi lists them), or take "
        "device='cpu'"
    )


def in_parts(run: Callable[[slice], T], count: int) -> list[T]:
    """`[run(slice(0, count))]`; if memory runs out, the results of parts half as large.

    For what treats each of `count` images by itself, so that the results of parts, put together,
    are that of the whole. Raises RuntimeError as `halving` does.
    """

    def measure(size: int) -> list[T]:
        return [run(slice(start, start + size)) for start in range(0, max(count, 1), max(size, 1))]

    return halving(measure, count, result=" at a time, for the same result")


@contextlib.contextmanager
def in_one_piece(count: int, why: str) -> Iterator[None]:
    """Turns a lack of memory into an error that says why `count` images were not halved."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise _too_much(str(count), error, f"; it was not halved, as {why}") from error
